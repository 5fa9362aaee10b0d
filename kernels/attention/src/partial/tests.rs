//! Merge, finish and the wire form.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use longshore_compute::{ComputePool, PoolOptions};

use super::Partials;

/// Partials of `rows` rows of 2 heads of 5 elements, some of them without keys.
fn random(rng: &mut ChaCha8Rng, rows: usize, magnitude: f32) -> Partials {
    let mut partials = Partials::identity(rows, 2, 5);
    for row in 0..rows {
        for head in 0..2 {
            if rng.random_bool(0.8) {
                let m = rng.random_range(-magnitude..magnitude);
                let o: Vec<f32> = (0..5).map(|_| rng.random_range(-3.0..3.0)).collect();
                set_row(&mut partials, row * 2 + head, m, rng.random_range(1.0..50.0), &o);
            }
        }
    }
    partials
}

fn set_row(partials: &mut Partials, index: usize, m: f32, l: f32, o: &[f32]) {
    let parts = partials.parts_mut();
    (parts.m[index], parts.l[index]) = (m, l);
    parts.o[index * o.len()..][..o.len()].copy_from_slice(o);
}

fn bits(partials: &Partials) -> Vec<u32> {
    partials.to_interleaved().iter().map(|x| x.to_bits()).collect()
}

fn merged(mut a: Partials, b: &Partials) -> Partials {
    a.merge(b).unwrap();
    a
}

fn generator(seed: u64) -> ChaCha8Rng {
    println!("seed {seed}");
    ChaCha8Rng::seed_from_u64(seed)
}

/// The merge in f64, from the definition: o / l over all parts.
fn reference(parts: &[Partials]) -> Vec<f64> {
    let (rows, heads, dim) = parts[0].shape();
    let mut output = Vec::new();
    for (row, head) in (0..rows).flat_map(|row| (0..heads).map(move |head| (row, head))) {
        let rows: Vec<_> = parts.iter().map(|part| part.row(row, head)).collect();
        let top = rows.iter().map(|&(m, ..)| f64::from(m)).fold(f64::NEG_INFINITY, f64::max);
        let weight = |m: f32| if m == f32::NEG_INFINITY { 0.0 } else { (f64::from(m) - top).exp2() };
        let l: f64 = rows.iter().map(|&(m, l, _)| weight(m) * f64::from(l)).sum();
        output.extend((0..dim).map(|i| {
            let o: f64 = rows.iter().map(|&(m, _, o)| weight(m) * f64::from(o[i])).sum();
            if l == 0.0 { 0.0 } else { o / l }
        }));
    }
    output
}

#[test]
fn merge_is_associative_up_to_rounding() {
    let mut rng = generator(1);
    for round in 0..100 {
        let magnitude = [1.0, 100.0, 1e4][round % 3];
        let mut parts: Vec<Partials> =
            (0..rng.random_range(2..9)).map(|_| random(&mut rng, 6, magnitude)).collect();
        let expected = reference(&parts);
        // Neighbours merge in random order until one is left.
        while parts.len() > 1 {
            let at = rng.random_range(0..parts.len() - 1);
            let later = parts.remove(at + 1);
            parts[at].merge(&later).unwrap();
        }
        for (found, expected) in parts.remove(0).finish().iter().zip(&expected) {
            let error = (f64::from(*found) - expected).abs();
            assert!(error < 2e-6 * (1.0 + expected.abs()), "round {round}: {found} for {expected}");
        }
    }
}

#[test]
fn the_identity_changes_no_bit_on_either_side() {
    let mut rng = generator(2);
    for magnitude in [1.0, 1e4, 1e30] {
        let partials = random(&mut rng, 20, magnitude);
        let identity = Partials::identity(20, 2, 5);
        assert_eq!(bits(&merged(partials.clone(), &identity)), bits(&partials));
        assert_eq!(bits(&merged(identity.clone(), &partials)), bits(&partials));
        assert_eq!(bits(&merged(identity.clone(), &identity)), bits(&identity));
    }
}

/// The signs of zeros and the rounding of tiny outputs survive a merge with the identity.
#[test]
fn the_identity_keeps_zeros_and_denormals() {
    let mut partials = Partials::identity(1, 1, 5);
    set_row(&mut partials, 0, -0.0, 1.0, &[-0.0, 0.0, 1e-45, -1e-45, f32::MAX]);
    let identity = Partials::identity(1, 1, 5);
    assert_eq!(bits(&merged(partials.clone(), &identity)), bits(&partials));
    assert_eq!(bits(&merged(identity, &partials)), bits(&partials));
}

#[test]
fn far_smaller_maxima_vanish() {
    let mut low = Partials::identity(1, 1, 1);
    set_row(&mut low, 0, -1e4, 3.0, &[9.0]);
    let mut high = Partials::identity(1, 1, 1);
    set_row(&mut high, 0, 1e4, 2.0, &[5.0]);
    assert_eq!(merged(low.clone(), &high), high);
    assert_eq!(merged(high.clone(), &low), high);
}

#[test]
fn different_shapes_do_not_merge() {
    for other in [(2, 2, 3), (3, 1, 3), (3, 2, 4), (0, 0, 0)] {
        let mut partials = Partials::identity(3, 2, 3);
        let before = partials.clone();
        let error = partials.merge(&Partials::identity(other.0, other.1, other.2)).unwrap_err();
        assert!(error.to_string().starts_with("`partials` has shape"), "{error}");
        assert_eq!(partials, before);
    }
}

#[test]
fn the_wire_form_returns() {
    let mut rng = generator(3);
    let partials = random(&mut rng, 9, 100.0);
    let wire = partials.to_interleaved();
    assert_eq!(wire.len(), 9 * 2 * 7);
    let (m, l, o) = partials.row(4, 1);
    assert_eq!((wire[63], wire[64], &wire[65..70]), (m, l, o));
    assert_eq!(Partials::from_interleaved(9, 2, 5, &wire).unwrap(), partials);
    assert_eq!(Partials::from_interleaved(0, 2, 5, &[]).unwrap(), Partials::identity(0, 2, 5));
}

#[test]
fn hostile_wire_forms_are_refused() {
    let good = [1.0, 2.0, 3.0, 4.0, f32::NEG_INFINITY, 0.0, 0.0, 0.0];
    assert!(Partials::from_interleaved(1, 2, 2, &good).is_ok());
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    for (index, value, problem) in [
        (0, nan, "maximum NaN in row 0, query head 0"),
        (0, inf, "maximum inf"),
        (0, -inf, "sum 2 under maximum -inf"),
        (1, nan, "sum NaN"),
        (1, inf, "sum inf"),
        (1, -inf, "sum -inf"),
        (1, -1e-45, "sum -0.000"),
        (1, 0.0, "sum 0 under maximum 1"),
        (2, nan, "output NaN"),
        (3, inf, "output inf"),
        (3, -inf, "output -inf"),
        (4, 7.0, "sum 0 under maximum 7 in row 0, query head 1"),
        (5, 1.0, "sum 1 under maximum -inf"),
        (6, 1.0, "output without keys"),
        (7, nan, "output NaN"),
    ] {
        let mut bad = good;
        bad[index] = value;
        let error = Partials::from_interleaved(1, 2, 2, &bad).unwrap_err().to_string();
        assert!(error.starts_with("`partials` has ") && error.contains(problem), "{index}: {error}");
    }
    for length in [0, 1, 7] {
        assert!(Partials::from_interleaved(1, 2, 2, &good[..length]).is_err(), "{length} elements");
    }
    for (rows, heads, dim) in [(2, 2, 2), (usize::MAX, 2, 2), (usize::MAX, usize::MAX, 1), (1, 1, usize::MAX)]
    {
        assert!(Partials::from_interleaved(rows, heads, dim, &good).is_err(), "{rows}, {heads}, {dim}");
    }
}

#[test]
fn parts_are_placed_where_they_belong() {
    let mut rng = generator(77);
    let part = random(&mut rng, 3, 5.0);
    let mut whole = Partials::identity(7, 6, 5);
    whole.place(2, 4, &part).unwrap();
    for (row, head) in (0..7).flat_map(|row| (0..6).map(move |head| (row, head))) {
        let inside = (2..5).contains(&row) && head >= 4;
        let expected =
            if inside { part.row(row - 2, head - 4) } else { (f32::NEG_INFINITY, 0.0, &[0.0; 5][..]) };
        assert_eq!(whole.row(row, head), expected, "row {row}, head {head}");
    }
    for (row, head) in [(5, 0), (0, 5), (usize::MAX, 0), (0, usize::MAX)] {
        assert!(whole.place(row, head, &part).is_err(), "row {row}, head {head}");
    }
    assert!(whole.place(0, 0, &Partials::identity(1, 1, 4)).is_err());
}

#[test]
fn merging_at_once_is_merging_one_by_one() {
    let mut rng = generator(41);
    for threads in [1, 3] {
        let pool = ComputePool::new(&PoolOptions { threads, pin: Vec::new() }).unwrap();
        for rows in [0, 1, 127, 128, 129, 700] {
            for count in 0..5 {
                let first = random(&mut rng, rows, 20.0);
                let later: Vec<Partials> = (0..count).map(|_| random(&mut rng, rows, 20.0)).collect();
                let one_by_one = later.iter().fold(first.clone(), merged).finish();
                let at_once = first.merge_and_finish(&later, &pool).unwrap();
                let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&at_once), bits(&one_by_one), "{rows} rows, {count} more");
            }
        }
    }
    let (pool, other) = (ComputePool::serial(), Partials::identity(2, 2, 5));
    assert!(Partials::identity(3, 2, 5).merge_and_finish(&[other], &pool).is_err());
}

#[test]
fn an_executors_own_numbers_are_taken_as_they_are() {
    let records = [1.0, 2.0, f32::NAN, 3.0, f32::NEG_INFINITY, 0.0, 0.0, 0.0];
    let partials = Partials::from_executor(1, 2, 2, &records).unwrap();
    let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&partials.to_interleaved()), bits(&records));
    assert!(Partials::from_interleaved(1, 2, 2, &records).is_err());
    for length in [0, 7] {
        assert!(Partials::from_executor(1, 2, 2, &records[..length]).is_err(), "{length} elements");
    }
}
