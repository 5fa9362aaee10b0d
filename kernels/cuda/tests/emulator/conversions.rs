//! Conversions against the crate `half`, which is what the CPU executor uses. NaN has one form on the device (0x7fff).

use half::{bf16, f16};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::instructions::run;

fn f16_bits(x: f32) -> u16 {
    if x.is_nan() { 0x7fff } else { f16::from_f32(x).to_bits() }
}

fn bf16_bits(x: f32) -> u16 {
    if x.is_nan() { 0x7fff } else { bf16::from_f32(x).to_bits() }
}

#[test]
fn every_16_bit_number_widens_exactly() {
    let words: Vec<u32> = (0..=0xffff).collect();
    let output = run("widen", 0, &words, 6 * words.len() / 32);
    let same = |got: u32, wanted: f32, what: &str, bits: u16| {
        let got = f32::from_bits(got);
        assert!(
            got.to_bits() == wanted.to_bits() || got.is_nan() && wanted.is_nan(),
            "{what} {bits:#x}: {got} not {wanted}"
        );
    };
    for (word, got) in words.iter().zip(output.chunks(6)) {
        let (bits, other) = (*word as u16, (word ^ 1) as u16);
        same(got[0], f16::from_bits(bits).to_f32(), "f16", bits);
        same(got[1], bf16::from_bits(bits).to_f32(), "bf16", bits);
        same(got[2], f16::from_bits(other).to_f32(), "low f16", other);
        same(got[3], f16::from_bits(bits).to_f32(), "high f16", bits);
        same(got[4], bf16::from_bits(other).to_f32(), "low bf16", other);
        same(got[5], bf16::from_bits(bits).to_f32(), "high bf16", bits);
    }
}

#[test]
fn numbers_are_rounded_to_nearest_even() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let mut words: Vec<u32> =
        vec![0, 1 << 31, 0x7f80_0000, 0xff80_0000, 0x7fc0_0000, 0xff80_0001, 0x7f7f_ffff];
    // Ties between two neighbours, and numbers on both sides of a tie.
    for _ in 0..4000 {
        let exponent = rng.random_range(0x60..0xa0_u32);
        for half in [1 << 12, 1 << 15] {
            let tie: u32 = (exponent << 23) | (rng.random_range(0..1 << 23) / (2 * half) * (2 * half)) | half;
            words.extend([tie - 1, tie, tie + 1, tie | 1 << 31]);
        }
    }
    words.extend((0..50_000).map(|_| rng.random::<u32>()));
    words.truncate(words.len() / 32 * 32);
    let count = words.len() / 32;
    let output = run("narrow", 0, &words, 4 * count);
    for (index, got) in output.chunks(4).enumerate() {
        let (lane, i) = (index / count, index % count);
        let x = f32::from_bits(words[index]);
        let y = f32::from_bits(words[lane * count + count - 1 - i]);
        let both = |low: u16, high: u16| u32::from(low) | u32::from(high) << 16;
        let wanted = [
            u32::from(f16_bits(x)),
            u32::from(bf16_bits(x)),
            both(f16_bits(x), f16_bits(y)),
            both(bf16_bits(x), bf16_bits(y)),
        ];
        assert_eq!(got, wanted, "{x} ({:#x})", words[index]);
    }
}

#[test]
fn exponentials_know_their_limits() {
    let mut words: Vec<u32> =
        [f32::NEG_INFINITY, 0.0, -0.0, 1.0, -1.0, 127.0, -126.0, 0.5].map(f32::to_bits).to_vec();
    words.extend((0..24).map(|i| (i as f32 * 3.7 - 40.0).to_bits()));
    let output = run("exponentials", 0, &words, 2);
    for (word, got) in words.iter().zip(output.chunks(2)) {
        let x = f64::from(f32::from_bits(*word));
        let close = |got: u32, wanted: f64| {
            let got = f64::from(f32::from_bits(got));
            got == wanted || got.is_nan() && wanted.is_nan() || (got - wanted).abs() <= 3e-7 * wanted.abs()
        };
        assert!(close(got[0], x.exp2()) && close(got[1], x.log2()), "{x}");
    }
}
