//! The second plane: finer quants for groups that stand out of their row.
//!
//! The rounding error of a group is a share of its largest number. A few groups with outliers, which some models have in every
//! row, so bring most of the error of a whole row. Their remainders are quantised once more, which makes them as exact as 16
//! bits would, for about a fifth of the groups.

use super::{GROUP, ROUND, SCALE, WORDS, write_sums};
use crate::cpu::rows::sum_of_squares;
use crate::cpu::versions::versions;

/// A group is refined when its largest number is more than this many times the root mean square of its row.
const OUTLIER: f32 = 4.0;

/// Quants of the largest remainder, half a unit of the first plane, times two.
const FINER: f32 = 254.0;

versions! {
    /// Fills the second plane of a row's outlying groups, f32 `[inputs]`, whose first plane is there; `at` is the slot of the
    /// row and the size of the block, `fine` says of each group whether any row of the block has finer quants.
    pub(super) fn refine(
        x: &[f32], coarse: &[i32], finer: &mut [i32], fine: &mut [bool], at: (usize, usize)
    ) = refine_row;
}

#[inline(always)]
fn refine_row(x: &[f32], coarse: &[i32], finer: &mut [i32], fine: &mut [bool], (slot, size): (usize, usize)) {
    let (mean, len) = (sum_of_squares(x) / x.len() as f32, WORDS * size);
    let planes = coarse.chunks_exact(len).zip(finer.chunks_exact_mut(len)).zip(fine);
    for (x, ((coarse, finer), fine)) in x.as_chunks::<GROUP>().0.iter().zip(planes) {
        let scale = f32::from_bits(coarse[SCALE * size + slot] as u32);
        if !is_fine(scale, mean) {
            continue;
        }
        if !*fine {
            // The other rows of the block have nothing here.
            finer.fill(0);
            *fine = true;
        }
        let mut quants = [0; GROUP];
        for (word, quants) in quants.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            *quants = coarse[word * size + slot].to_le_bytes().map(|quant| i32::from(quant as i8));
        }
        let scale = refine_group(x, scale, &mut quants);
        let (mut bytes, mut sums) = ([0; GROUP], [0; 2]);
        for (k, (byte, quant)) in bytes.iter_mut().zip(&quants).enumerate() {
            *byte = *quant as u8;
            sums[k / 16] += quant;
        }
        for (word, quad) in bytes.as_chunks::<4>().0.iter().enumerate() {
            finer[word * size + slot] = i32::from_le_bytes(*quad);
        }
        write_sums(finer, slot, size, scale, sums);
    }
}

/// Whether a group of this scale stands out of a row with this mean square. Not when either is no number.
#[inline(always)]
pub(in crate::cpu::linear) fn is_fine(scale: f32, mean_square: f32) -> bool {
    scale * scale > mean_square * (OUTLIER * OUTLIER / (127.0 * 127.0))
}

/// Turns the quants of a group into those of its remainders, in [-127, 127], and returns their scale.
#[inline(always)]
pub(in crate::cpu::linear) fn refine_group(x: &[f32; GROUP], scale: f32, quants: &mut [i32; GROUP]) -> f32 {
    let inverse = FINER / scale;
    for (quant, x) in quants.iter_mut().zip(x) {
        let remainder = (-*quant as f32).mul_add(scale, *x);
        *quant = remainder.mul_add(inverse, ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    }
    scale / FINER
}

#[cfg(test)]
mod tests {
    use rand::{RngExt as _, SeedableRng as _};

    use super::super::quantise_group;
    use super::*;

    /// Two planes are as exact as 16 bits.
    #[test]
    fn remainders_fit() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(4);
        for magnitude in [1e-21f32, 1e-3, 1.0, 1e30] {
            for _ in 0..200 {
                let x: [f32; GROUP] = std::array::from_fn(|_| magnitude * rng.random_range(-1.0..1.0));
                let mut coarse = [0; GROUP];
                let scale = quantise_group(&x, &mut coarse);
                let mut finer = coarse;
                let finer_scale = refine_group(&x, scale, &mut finer);
                for k in 0..GROUP {
                    let seen = f64::from(coarse[k]) * f64::from(scale)
                        + f64::from(finer[k]) * f64::from(finer_scale);
                    let error = (seen - f64::from(x[k])).abs();
                    assert!(finer[k].abs() <= 127, "seed 4: {}", finer[k]);
                    assert!(error <= f64::from(scale) * 0.0021, "seed 4: {seen} for {}", x[k]);
                }
            }
        }
    }

    #[test]
    fn only_outliers_are_refined() {
        assert!(is_fine(5.0 / 127.0, 1.0) && !is_fine(3.9 / 127.0, 1.0));
        for (scale, mean) in [(f32::NAN, 1.0), (1.0, f32::NAN), (1e30, f32::INFINITY), (0.0, 0.0)] {
            assert!(!is_fine(scale, mean), "{scale} {mean}");
        }
    }
}
