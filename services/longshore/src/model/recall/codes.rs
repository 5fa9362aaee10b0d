//! Random codes of ±1 that keep their distance.

use anyhow::{Result, bail};

use crate::random::Random;

/// Attempts to find one more code before giving up.
const ATTEMPTS: usize = 100_000;

/// `count` codes of `width` elements, ±1, no two with a product above `width / 2`. Deterministic.
pub(super) fn codes(field: &str, count: usize, width: usize, random: &mut Random) -> Result<Vec<Vec<f32>>> {
    let words = width.div_ceil(64);
    let mut found: Vec<Vec<u64>> = Vec::with_capacity(count);
    // A product of `width / 2` is a distance of `width / 4` signs.
    let far = |a: &[u64], b: &[u64]| {
        let differ: u32 = a.iter().zip(b).map(|(a, b)| (a ^ b).count_ones()).sum();
        differ as usize * 4 >= width
    };
    while found.len() < count {
        let fresh = (0..ATTEMPTS).map(|_| {
            let mut code: Vec<u64> = (0..words).map(|_| random.next()).collect();
            code[words - 1] &= u64::MAX >> (words * 64 - width);
            code
        });
        let Some(code) = fresh.into_iter().find(|code| found.iter().all(|other| far(other, code))) else {
            bail!(
                "`--{field}` is {count}, but no more than {} codes of {width} signs keep apart; hint: use a head size of 128",
                found.len()
            );
        };
        found.push(code);
    }
    let signs = |code: &Vec<u64>| {
        let sign = |i: usize| if code[i / 64] >> (i % 64) & 1 == 1 { 1.0 } else { -1.0 };
        (0..width).map(sign).collect()
    };
    Ok(found.iter().map(signs).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_keep_their_distance_and_do_not_change() {
        for width in [32, 64, 128] {
            let made = codes("keys", 500, width, &mut Random::new(3)).unwrap();
            assert_eq!(made, codes("keys", 500, width, &mut Random::new(3)).unwrap());
            for (i, a) in made.iter().enumerate() {
                assert!(a.len() == width && a.iter().all(|x| x.abs() == 1.0));
                for b in &made[..i] {
                    let product: f32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                    assert!(product <= width as f32 / 2.0, "{product} of {width}");
                }
            }
        }
    }

    #[test]
    fn too_many_codes_are_refused_by_name() {
        let message = codes("keys", 300, 8, &mut Random::new(1)).unwrap_err().to_string();
        assert!(message.contains("`--keys` is 300"), "{message}");
    }
}
