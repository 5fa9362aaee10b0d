//! Every format, instruction set and number of rows against f64, and bit for bit against one another.

mod speed;

use longshore_compute::{ComputePool, InstructionSet, PoolOptions};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::input::{is_fine, quantise_group, refine_group};
use super::*;
use crate::files::{TensorType, dequantize};

const SEED: u64 = 11;

/// A matrix, and the same weights in f32.
struct Case {
    kind: TensorType,
    outputs: usize,
    inputs: usize,
    bytes: Vec<u8>,
    weights: Vec<f32>,
}

impl Case {
    /// Random blocks with random constants.
    fn new(kind: TensorType, outputs: usize, inputs: usize) -> Self {
        let (elements, block_bytes) = kind.block();
        let mut bytes = kind.random_blocks(outputs * inputs / elements, SEED + inputs as u64);
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        for block in bytes.chunks_exact_mut(block_bytes) {
            // Scatters the constants, which `random_blocks` sets alike: a mantissa byte changes them by up to a quarter.
            match kind {
                TensorType::F32 | TensorType::F16 | TensorType::Bf16 => {}
                TensorType::Q6K => block[208] = rng.random(),
                TensorType::Q4_1 | TensorType::Q5_1 | TensorType::Q4K | TensorType::Q5K => {
                    (block[0], block[2]) = (rng.random(), rng.random());
                }
                _ => block[0] = rng.random(),
            }
        }
        let mut weights = vec![0.0; outputs * inputs];
        assert!(dequantize(kind, &bytes, &mut weights));
        Self { kind, outputs, inputs, bytes, weights }
    }

    fn pack(&self, linear: Linear) -> PackedMatrix {
        let size = [self.outputs, self.inputs];
        PackedMatrix::pack(&ComputePool::serial(), linear, self.kind, size, &self.bytes).unwrap()
    }
}

/// `[n]` numbers in [-1, 1) times a magnitude that changes from group to group; one in eleven stands out.
fn random(n: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    let magnitude = |group: usize| if group % 11 == 5 { 100.0 } else { [1.0, 0.01, 3.0][group % 3] };
    (0..n).map(|i| rng.random_range(-1.0..1.0) * magnitude(i / 32)).collect()
}

fn product(
    pool: &ComputePool,
    set: InstructionSet,
    matrix: &PackedMatrix,
    x: &[f32],
    rows: usize,
) -> Vec<f32> {
    let (mut input, inputs) = (Input::default(), matrix.inputs());
    input.fill(pool, set, [rows, inputs], matrix.forms(), &Plain { x, width: inputs });
    let mut out = vec![f32::NAN; rows * matrix.outputs()];
    multiply(pool, set, &input, vec![(matrix, Then::Store(&mut out))]);
    out
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// A row of activations as the int8 kernels see it.
fn as_quantised(x: &[f32]) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    let group = |x: &[f32; 32]| {
        let mut quants = [0; 32];
        let scale = quantise_group(x, &mut quants);
        let mut seen = quants.map(|quant| f64::from(quant) * f64::from(scale));
        if is_fine(scale, mean) {
            let finer = f64::from(refine_group(x, scale, &mut quants));
            seen.iter_mut().zip(quants).for_each(|(seen, quant)| *seen += f64::from(quant) * finer);
        }
        seen
    };
    x.as_chunks::<32>().0.iter().flat_map(group).collect()
}

/// Sum of products and sum of their magnitudes.
fn exact(weights: &[f32], x: &[f64]) -> (f64, f64) {
    let products = || weights.iter().zip(x).map(|(w, x)| f64::from(*w) * x);
    (products().sum(), products().map(f64::abs).sum())
}

/// Widths that the type can have: one block, and some that fill no panel or block of any kernel.
fn widths(kind: TensorType) -> Vec<usize> {
    match kind.block().0 {
        1 => vec![1, 5, 33, 100],
        block => vec![block, block * 3, (block * 20).min(2560 / block * block)],
    }
}

#[test]
fn products_agree_with_f64() {
    let pool = ComputePool::serial();
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    for kind in TensorType::ALL {
        for (inputs, outputs) in widths(kind).into_iter().flat_map(|inputs| [(inputs, 1), (inputs, 53)]) {
            let case = Case::new(kind, outputs, inputs);
            let x = random(5 * inputs, &mut rng);
            for linear in [Linear::Auto, Linear::Int8, Linear::F32] {
                let matrix = case.pack(linear);
                let expected = PackedMatrix::expected_bytes(linear, kind, [outputs, inputs]);
                assert_eq!(matrix.bytes(), expected, "{kind} {linear} [{outputs}, {inputs}]");
                let int8 = matrix.forms().int8;
                assert_eq!(
                    int8,
                    linear != Linear::F32
                        && inputs % 32 == 0
                        && (kind.block().0 > 1 || linear == Linear::Int8)
                );
                let out = product(&pool, InstructionSet::detect(), &matrix, &x, 5);
                for (x, out) in x.chunks(inputs).zip(out.chunks(outputs)) {
                    let seen = if int8 { as_quantised(x) } else { x.iter().map(|x| f64::from(*x)).collect() };
                    let true_x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                    let mut weights = vec![0.0; inputs];
                    for (o, out) in out.iter().enumerate() {
                        matrix.row(o, &mut weights);
                        let place = format!("seed {SEED}, {kind} {linear} [{outputs}, {inputs}] output {o}");
                        let stored = &case.weights[o * inputs..][..inputs];
                        if kind.block().0 > 1 || linear != Linear::Int8 {
                            assert_eq!(weights, stored, "{place}");
                        }
                        let (want, size) = exact(&weights, &seen);
                        // Quants with a minimum cancel: the parts are up to 30 times as large as their sum.
                        let tight = inputs as f64 * f64::from(f32::EPSILON) * 4.0 * size + 1e-30;
                        assert!((f64::from(*out) - want).abs() <= tight * 8.0, "{place}: {out} != {want}");
                        let (want, size) = exact(stored, &true_x);
                        let loose = if int8 { 0.03 * size + 1e-6 } else { tight };
                        assert!((f64::from(*out) - want).abs() <= loose, "{place}: {out} is far from {want}");
                    }
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_rows_instruction_set_or_threads() {
    let serial = ComputePool::serial();
    let pools = [2, 3].map(|threads| ComputePool::new(&PoolOptions { threads, pin: vec![] }).unwrap());
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    for kind in TensorType::ALL {
        let inputs = if kind.block().0 == 1 { 70 } else { 768 };
        let case = Case::new(kind, 75, inputs);
        let matrix = case.pack(Linear::Auto);
        let x = random(200 * inputs, &mut rng);
        let whole = bits(&product(&serial, InstructionSet::Portable, &matrix, &x, 200));
        for set in InstructionSet::available() {
            for rows in (1..=33).chain([200]) {
                let out = product(&serial, set, &matrix, &x[..rows * inputs], rows);
                assert!(bits(&out) == whole[..rows * 75], "seed {SEED}, {kind}: {rows} rows, {set}");
            }
            for pool in &pools {
                let out = product(pool, set, &matrix, &x, 200);
                assert!(bits(&out) == whole, "seed {SEED}, {kind}: {} threads, {set}", pool.threads());
            }
        }
        assert!(product(&serial, InstructionSet::detect(), &matrix, &[], 0).is_empty());
    }
}

/// Quants at the ends of their ranges, where 16-bit sums are largest.
#[test]
fn extreme_quants_do_not_saturate() {
    for kind in TensorType::ALL.into_iter().filter(|kind| kind.block().0 > 1) {
        for byte in [0x00, 0x7f, 0x80, 0xff] {
            let mut case = Case::new(kind, 16, 256);
            let (_, block_bytes) = kind.block();
            let quants = match kind {
                TensorType::Q4_0 | TensorType::Q8_0 | TensorType::Q5_0 => 2..block_bytes,
                TensorType::Q4_1 | TensorType::Q5_1 => 4..block_bytes,
                TensorType::Q6K => 0..192,
                _ => 16..block_bytes,
            };
            for block in case.bytes.chunks_exact_mut(block_bytes) {
                block[quants.clone()].fill(byte);
            }
            dequantize(kind, &case.bytes, &mut case.weights);
            let matrix = case.pack(Linear::Auto);
            for x in [[1.0; 256], [-1.0; 256], std::array::from_fn(|i| if i % 2 == 0 { 1.0 } else { -1.0 })] {
                let want = product(&ComputePool::serial(), InstructionSet::Portable, &matrix, &x, 1);
                for (o, want) in want.iter().enumerate() {
                    let (exact, size) = exact(&case.weights[o * 256..][..256], &as_quantised(&x));
                    assert!((f64::from(*want) - exact).abs() <= 1e-4 * (size + 1.0), "{kind} {byte:x}");
                }
                for set in InstructionSet::available() {
                    let found = product(&ComputePool::serial(), set, &matrix, &x, 1);
                    assert_eq!(bits(&found), bits(&want), "{kind}, {byte:x}, {set}");
                }
            }
        }
    }
}

#[test]
fn strange_rows_harm_themselves_only() {
    for kind in [TensorType::Q4_1, TensorType::Q8_0, TensorType::Q6K, TensorType::F32] {
        let inputs = 256;
        let (case, rows) = (Case::new(kind, 40, inputs), 15);
        let matrix = case.pack(Linear::Auto);
        let mut x = random(rows * inputs, &mut ChaCha8Rng::seed_from_u64(SEED));
        let mut set_row = |row: usize, value: f32| x[row * inputs..][..inputs].fill(value);
        set_row(1, 0.0);
        set_row(2, 1e30);
        set_row(3, 1e-42);
        set_row(4, -0.0);
        (x[5 * inputs + 3], x[6 * inputs + 99], x[7 * inputs]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        for set in InstructionSet::available() {
            let together = product(&ComputePool::serial(), set, &matrix, &x, rows);
            for (row, found) in together.chunks(40).enumerate() {
                let place = format!("{kind}, {set}, row {row}");
                let strange = (5..8).contains(&row);
                assert!(found.iter().all(|y| y.is_finite() != strange), "{place}: {found:?}");
                if [1, 4].contains(&row) {
                    assert!(found.iter().all(|y| *y == 0.0), "{place}: {found:?}");
                }
                if !strange {
                    let alone =
                        product(&ComputePool::serial(), set, &matrix, &x[row * inputs..][..inputs], 1);
                    assert_eq!(bits(found), bits(&alone), "{place}");
                }
            }
            let large: Vec<f64> = vec![1e30; inputs];
            for (o, found) in together[2 * 40..3 * 40].iter().enumerate() {
                let (want, size) = exact(&case.weights[o * inputs..][..inputs], &large);
                assert!((f64::from(*found) - want).abs() <= 1e-3 * size, "{kind}, {set}: {found} != {want}");
            }
        }
    }
}

#[test]
fn outputs_are_stored_added_or_gated() {
    let (pool, set) =
        (ComputePool::new(&PoolOptions { threads: 2, pin: vec![] }).unwrap(), InstructionSet::detect());
    for kind in [TensorType::Q4_1, TensorType::F16] {
        let [gate, up] = [1, 2].map(|seed| {
            let bytes = kind.random_blocks(70 * 64 / kind.block().0, seed);
            PackedMatrix::pack(&pool, Linear::Auto, kind, [70, 64], &bytes).unwrap()
        });
        let x = random(20 * 64, &mut ChaCha8Rng::seed_from_u64(SEED));
        let [gates, ups] = [&gate, &up].map(|matrix| product(&pool, set, matrix, &x, 20));
        let mut input = Input::default();
        // A larger call before leaves nothing behind.
        input.fill(&pool, set, [40, 64], gate.forms(), &Computed(|_, to: &mut [f32]| to.fill(7.0)));
        input.fill(&pool, set, [20, 64], gate.forms(), &Plain { x: &x, width: 64 });
        let (mut gated, mut added) = (vec![f32::NAN; 20 * 70], ups.clone());
        let products = vec![(&gate, Then::Gate(&up, &mut gated)), (&gate, Then::Add(&mut added))];
        multiply(&pool, set, &input, products);
        for i in 0..20 * 70 {
            let (g, u) = (f64::from(gates[i]), f64::from(ups[i]));
            let want = g / (1.0 + (-g).exp()) * u;
            assert!((f64::from(gated[i]) - want).abs() < 1e-6 * (1.0 + want.abs()), "{} != {want}", gated[i]);
            assert_eq!(added[i], gates[i] + ups[i]);
        }
    }
}

#[test]
fn damaged_weights_are_refused() {
    let pool = ComputePool::serial();
    for linear in [Linear::Auto, Linear::Int8, Linear::F32] {
        for (kind, at) in
            [(TensorType::Q4_1, 3), (TensorType::Q8_0, 1), (TensorType::Q6K, 209), (TensorType::F32, 7)]
        {
            let mut bytes = kind.random_blocks(512 / kind.block().0, 4);
            assert!(PackedMatrix::pack(&pool, linear, kind, [2, 256], &bytes).is_some());
            // Infinity, or NaN.
            (bytes[at - 1], bytes[at]) = (0x80, 0x7f);
            assert!(PackedMatrix::pack(&pool, linear, kind, [2, 256], &bytes).is_none(), "{kind} {linear}");
        }
    }
}

#[test]
fn layers_stand_alone() {
    let pool = ComputePool::serial();
    let layer = LinearLayer::synthetic(&pool, Linear::Auto, TensorType::Q4_1, [48, 64], 3).unwrap();
    assert_eq!((layer.shape(), layer.bytes()), ([48, 64], 48 * 64 / 32 * 20));
    let set = InstructionSet::detect();
    assert_eq!(layer.describe(), format!("Q4_1: int8 activations ({set})"));
    let x = random(3 * 64, &mut ChaCha8Rng::seed_from_u64(SEED));
    let (mut out, mut again) = (vec![f32::NAN; 3 * 48], vec![f32::NAN; 3 * 48]);
    layer.multiply(&pool, &x, 3, &mut out);
    layer.multiply(&pool, &x, 3, &mut again);
    assert_eq!((&out, out.iter().all(|y| y.is_finite())), (&again, true));
    let refused = |kind, shape, bytes: &[u8]| {
        LinearLayer::new(&pool, Linear::Auto, kind, shape, bytes).unwrap_err().to_string()
    };
    assert!(refused(TensorType::Q4_1, [1, 33], &[0; 20]).starts_with("`shape` is [1, 33]"));
    assert!(refused(TensorType::Q8_0, [1, 32], &[0; 33]).starts_with("`bytes` has 33"));
    assert!(refused(TensorType::F16, [1, 1], &[0, 0x7c]).starts_with("`bytes` holds a value"));
}

#[test]
fn names_of_modes_are_read_back() {
    for linear in [Linear::Auto, Linear::Int8, Linear::F32] {
        assert_eq!(linear.to_string().parse::<Linear>().unwrap(), linear);
    }
    let error = "f16".parse::<Linear>().unwrap_err().to_string();
    assert_eq!(error, "`linear` is `f16`, must be `auto`, `int8` or `f32`");
}
