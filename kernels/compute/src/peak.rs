//! Work against which kernels are measured: multiply-adds out of registers, reads and copies of memory.
//!
//! They only do the work; who times them divides. Every sum starts from a number that the compiler cannot know and ends
//! in the result, so that no round can be left out or merged with another.
#![allow(unsafe_code, reason = "functions of an instruction set are called once its presence was seen")]

use std::hint::black_box;

use crate::InstructionSet;

/// Sums that run side by side: enough to hide four cycles of latency on two units, few enough for 16 registers.
const SUMS: usize = 12;
/// Elements of the widest vector.
const LANES_MAX: usize = 16;

/// First values of the sums, all different.
type Start = [[f32; LANES_MAX]; SUMS];

/// Floating-point operations of one round of [`multiply_add`]: a multiplication and an addition per element.
pub fn round_flops(set: InstructionSet) -> u64 {
    (2 * SUMS * lanes(set)) as u64
}

/// Runs `rounds` rounds of multiply-adds on the calling thread, with the vectors of `set`; `None` when this machine lacks
/// it. The number means nothing, it must only be used.
pub fn multiply_add(set: InstructionSet, rounds: u64) -> Option<f32> {
    if !InstructionSet::available().contains(&set) {
        return None;
    }
    let mut start: Start = std::array::from_fn(|sum| [1.0 + sum as f32; LANES_MAX]);
    // Close to 1, so that no sum overflows or becomes subnormal, which some processors do slowly.
    let (factor, term) = black_box((0.999_999, 1e-6));
    black_box(&mut start);
    Some(match set {
        InstructionSet::Portable => portable(&start, factor, term, rounds),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the set is available, which was checked above.
        InstructionSet::Avx2 => unsafe { x86::avx2(&start, factor, term, rounds) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the set is available, which was checked above.
        InstructionSet::Avx512 => unsafe { x86::avx512(&start, factor, term, rounds) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: the set is available, which was checked above.
        InstructionSet::Neon => unsafe { neon(&start, factor, term, rounds) },
        #[allow(unreachable_patterns, reason = "sets of other processors are never available")]
        _ => return None,
    })
}

/// Adds up all words, so that each is read once.
pub fn read(words: &[u64]) -> u64 {
    let mut sums = [0u64; 32];
    let (chunks, rest) = words.as_chunks::<32>();
    for chunk in chunks {
        for (sum, word) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*word);
        }
    }
    rest.iter().chain(&sums).fold(0, |sum, word| sum.wrapping_add(*word))
}

/// Copies `from` over `to`, of equal length: every byte is read once and written once.
pub fn copy(from: &[u64], to: &mut [u64]) {
    to.copy_from_slice(from);
    black_box(to);
}

fn lanes(set: InstructionSet) -> usize {
    match set {
        InstructionSet::Portable | InstructionSet::Neon => 4,
        InstructionSet::Avx2 => 8,
        InstructionSet::Avx512 => 16,
    }
}

/// What every machine can do: a multiplication and an addition, which the compiler may put into vectors.
fn portable(start: &Start, factor: f32, term: f32, rounds: u64) -> f32 {
    let mut sums = start.map(|elements| [elements[0], elements[1], elements[2], elements[3]]);
    for _ in 0..rounds {
        sums = sums.map(|sum| sum.map(|element| element * factor + term));
    }
    sums.as_flattened().iter().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        _mm256_fmadd_ps, _mm256_set1_ps, _mm256_setr_ps, _mm256_storeu_ps, _mm512_fmadd_ps,
        _mm512_reduce_add_ps, _mm512_set1_ps,
    };

    use super::{SUMS, Start};

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn avx2(start: &Start, factor: f32, term: f32, rounds: u64) -> f32 {
        let (factor, term) = (_mm256_set1_ps(factor), _mm256_set1_ps(term));
        let mut sums = [term; SUMS];
        for (sum, [a, b, c, d, e, f, g, h, ..]) in sums.iter_mut().zip(start) {
            *sum = _mm256_setr_ps(*a, *b, *c, *d, *e, *f, *g, *h);
        }
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, factor, term);
            }
        }
        let mut total = 0.0;
        for sum in sums {
            let mut elements = [0f32; 8];
            // SAFETY: the array has room for the eight elements of the vector; unaligned stores are asked for.
            unsafe { _mm256_storeu_ps(elements.as_mut_ptr(), sum) };
            total += elements.iter().sum::<f32>();
        }
        total
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512(start: &Start, factor: f32, term: f32, rounds: u64) -> f32 {
        let (factor, term) = (_mm512_set1_ps(factor), _mm512_set1_ps(term));
        let mut sums = [term; SUMS];
        for (sum, elements) in sums.iter_mut().zip(start) {
            *sum = _mm512_set1_ps(elements[0]);
        }
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, factor, term);
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
    }
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
fn neon(start: &Start, factor: f32, term: f32, rounds: u64) -> f32 {
    use std::arch::aarch64::{vaddvq_f32, vdupq_n_f32, vfmaq_f32};
    let (factor, term) = (vdupq_n_f32(factor), vdupq_n_f32(term));
    let mut sums = [term; SUMS];
    for (sum, elements) in sums.iter_mut().zip(start) {
        *sum = vdupq_n_f32(elements[0]);
    }
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = vfmaq_f32(term, *sum, factor);
        }
    }
    sums.into_iter().map(|sum| vaddvq_f32(sum)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_does_every_round() {
        for set in InstructionSet::available() {
            // Sum `s` starts at 1 + s and goes through x -> 0.999999 x + 0.000001, towards 1.
            let expected = |rounds: u64| {
                let left = 0.999_999f64.powi(rounds as i32);
                (0..SUMS).map(|sum| sum as f64 * left + 1.0).sum::<f64>() * lanes(set) as f64
            };
            for rounds in [0, 1, 1000, 300_000] {
                let found = f64::from(multiply_add(set, rounds).unwrap());
                let want = expected(rounds);
                // f32 steps near 1 are 6e-8 of the value and 1e-6 is what a round changes: the drift is some percent.
                assert!(
                    (found - want).abs() < 0.1 * want,
                    "{set}: {rounds} rounds gave {found}, expected {want}"
                );
            }
            assert!(multiply_add(set, 2_000_000).unwrap() < multiply_add(set, 0).unwrap());
        }
    }

    #[test]
    fn a_set_that_is_not_there_is_refused() {
        let other = if cfg!(target_arch = "aarch64") { InstructionSet::Avx2 } else { InstructionSet::Neon };
        assert_eq!(multiply_add(other, 1), None);
    }

    #[test]
    fn every_word_is_read_and_copied() {
        let words: Vec<u64> = (0..1003).map(|i: u64| i.wrapping_mul(0x9E37_79B9_7F4A_7C15)).collect();
        assert_eq!(read(&words), words.iter().copied().fold(0, u64::wrapping_add));
        let mut to = vec![0; words.len()];
        copy(&words, &mut to);
        assert_eq!(to, words);
    }

    /// Run by hand: `cargo test -p longshore-compute peak -- --ignored --nocapture`.
    #[test]
    #[ignore = "a measurement"]
    fn measures_one_core() {
        for set in InstructionSet::available() {
            let rounds = 20_000_000 / lanes(set) as u64;
            let best = (0..10)
                .map(|_| {
                    let began = std::time::Instant::now();
                    black_box(multiply_add(set, rounds));
                    began.elapsed().as_secs_f64()
                })
                .fold(f64::INFINITY, f64::min);
            println!("{set}: {:.1} GFLOP/s", (rounds * round_flops(set)) as f64 / best / 1e9);
        }
    }
}
