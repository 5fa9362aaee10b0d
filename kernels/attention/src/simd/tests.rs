//! Every instruction set against plain Rust, bit for bit.

use half::{bf16, f16};
use longshore_compute::InstructionSet;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Kernel, Lane, Simd, dispatch};
use crate::exp2::exp2;
use crate::shape::LANES;

/// Every operation on some lanes.
struct Everything<'a>(&'a [Lane; 3]);

impl Kernel for Everything<'_> {
    type Output = Vec<(&'static str, Lane)>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let [a, b, c] = self.0.map(|lane| s.load(&lane));
        let stored = |x| {
            let mut lane = [0.0; LANES];
            s.store(x, &mut lane);
            lane
        };
        s.prefetch(std::ptr::null());
        vec![
            ("splat", stored(s.splat(self.0[0][3]))),
            ("add", stored(s.add(a, b))),
            ("sub", stored(s.sub(a, b))),
            ("mul", stored(s.mul(a, b))),
            ("fma", stored(s.fma(a, b, c))),
            ("max", stored(s.max(a, b))),
            ("power", stored(s.power(s.add(s.splat(crate::exp2::ROUND), a)))),
            ("zero_below", stored(s.zero_below(a, b, c))),
            ("exp2", stored(s.exp2(a))),
            ("sum", [s.sum(a); LANES]),
            ("top", [s.top(a); LANES]),
        ]
    }
}

fn bits(lane: &Lane) -> [u32; LANES] {
    lane.map(f32::to_bits)
}

#[test]
fn operations_agree() {
    println!("seed 61");
    let mut rng = ChaCha8Rng::seed_from_u64(61);
    for round in 0..2000 {
        let size = [1.0, 100.0, 1e30][round % 3];
        let mut lanes: [Lane; 3] =
            std::array::from_fn(|_| std::array::from_fn(|_| rng.random_range(-size..size)));
        for special in [0.0, -0.0, 1e-42, f32::NEG_INFINITY] {
            lanes[rng.random_range(0..3)][rng.random_range(0..LANES)] = special;
        }
        let expected = dispatch(InstructionSet::Portable, Everything(&lanes));
        for set in InstructionSet::available() {
            for ((what, found), (_, expected)) in dispatch(set, Everything(&lanes)).iter().zip(&expected) {
                let same = found.iter().zip(expected).all(|(found, expected)| {
                    found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan())
                });
                assert!(same, "{set}, {what} of {lanes:?}: {found:?} for {expected:?}");
            }
        }
    }
}

struct Powers<'a>(&'a Lane);

impl Kernel for Powers<'_> {
    type Output = Lane;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Lane {
        let mut lane = [0.0; LANES];
        s.store(s.exp2(s.load(self.0)), &mut lane);
        lane
    }
}

#[test]
fn powers_of_lanes_are_those_of_numbers() {
    for set in InstructionSet::available() {
        let mut x = 0.0_f32;
        while x > -130.0 {
            let lane: Lane = std::array::from_fn(|i| x - i as f32 * 0.000_61);
            assert_eq!(bits(&dispatch(set, Powers(&lane))), bits(&lane.map(exp2)), "{set}, 2^{lane:?}");
            x -= 0.009_7;
        }
        let special = [f32::NEG_INFINITY; LANES];
        assert_eq!(bits(&dispatch(set, Powers(&special))), [0; LANES], "{set}");
        let none = dispatch(set, Powers(&[f32::NAN; LANES]));
        assert!(none.iter().all(|x| x.is_nan()), "{set}");
    }
}

struct Widen<'a>(&'a [u16; LANES]);

impl Kernel for Widen<'_> {
    type Output = [Lane; 3];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> [Lane; 3] {
        let wide = [
            s.widen_f16(&self.0.map(f16::from_bits)),
            s.widen_bf16(&self.0.map(bf16::from_bits)),
            s.widen_i8(&self.0.map(|x| x as i8)),
        ];
        let mut lanes = [[0.0; LANES]; 3];
        for (lane, x) in lanes.iter_mut().zip(wide) {
            s.store(x, lane);
        }
        lanes
    }
}

#[test]
fn everything_widens_exactly() {
    let same = |found: f32, expected: f32| {
        found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan())
    };
    for set in InstructionSet::available() {
        for start in (0..=u16::MAX).step_by(LANES) {
            let lane: [u16; LANES] = std::array::from_fn(|i| start + i as u16);
            let [half, brain, byte] = dispatch(set, Widen(&lane));
            for (i, x) in lane.into_iter().enumerate() {
                assert!(same(half[i], f16::from_bits(x).to_f32()), "{set}: f16 {x:#x} is {}", half[i]);
                assert!(same(brain[i], bf16::from_bits(x).to_f32()), "{set}: bf16 {x:#x} is {}", brain[i]);
                assert!(same(byte[i], f32::from(x as i8)), "{set}: i8 {x:#x} is {}", byte[i]);
            }
        }
    }
}
