//! A measurement, run by hand: `cargo test --release -p longshore-model --lib linear -- --ignored --nocapture`.

use longshore_compute::{ComputePool, InstructionSet, PoolOptions};

use super::random;
use crate::cpu::linear::{Input, Linear, PackedMatrix, Plain, Then, multiply};
use crate::files::TensorType;

/// A layer of SmolLM2-135M.
struct Layer {
    qkv: [PackedMatrix; 3],
    attn_out: PackedMatrix,
    gate: PackedMatrix,
    up: PackedMatrix,
    down: PackedMatrix,
}

impl Layer {
    fn new(pool: &ComputePool, kind: TensorType, linear: Linear, seed: u64) -> Self {
        let matrix = |outputs: usize, inputs: usize| {
            let bytes = kind.random_blocks(outputs * inputs / kind.block().0, seed);
            PackedMatrix::pack(pool, linear, kind, [outputs, inputs], &bytes).unwrap()
        };
        Self {
            qkv: [matrix(576, 576), matrix(192, 576), matrix(192, 576)],
            attn_out: matrix(576, 576),
            gate: matrix(1536, 576),
            up: matrix(1536, 576),
            down: matrix(576, 1536),
        }
    }

    /// Inputs are prepared as the backend does, the norms aside.
    fn pass(&self, pool: &ComputePool, set: InstructionSet, input: &mut Input, x: &[f32], out: &mut [f32]) {
        let rows = x.len() / 1536;
        let fill = |input: &mut Input, inputs: usize| {
            input.fill(pool, set, [rows, inputs], self.down.forms(), &Plain { x, width: inputs });
        };
        let (q, rest) = out.split_at_mut(rows * 576);
        let (k, v) = rest.split_at_mut(rows * 192);
        let (k, v) = (k, &mut v[..rows * 192]);
        fill(input, 576);
        let [a, b, c] = &self.qkv;
        multiply(pool, set, input, vec![(a, Then::Store(q)), (b, Then::Store(k)), (c, Then::Store(v))]);
        fill(input, 576);
        multiply(pool, set, input, vec![(&self.attn_out, Then::Store(&mut out[..rows * 576]))]);
        fill(input, 576);
        multiply(pool, set, input, vec![(&self.gate, Then::Gate(&self.up, &mut out[..rows * 1536]))]);
        fill(input, 1536);
        multiply(pool, set, input, vec![(&self.down, Then::Add(&mut out[..rows * 576]))]);
    }
}

#[test]
#[ignore = "a measurement"]
fn measures_speed() {
    let pool = ComputePool::new(&PoolOptions::default()).unwrap();
    let mut rng = rand::SeedableRng::seed_from_u64(9);
    let cases =
        [(TensorType::Q4_1, Linear::Auto), (TensorType::Q8_0, Linear::Auto), (TensorType::F32, Linear::F32)];
    for (kind, linear) in cases {
        let layers: Vec<Layer> = (0..30).map(|seed| Layer::new(&pool, kind, linear, seed)).collect();
        for set in InstructionSet::available().into_iter().skip(1).rev() {
            for rows in [1, 2, 4, 8, 16, 64, 512] {
                let (x, mut out) = (random(rows * 1536, &mut rng), vec![0.0; rows * 1536]);
                let mut input = Input::default();
                let mut pass = |_| {
                    let start = std::time::Instant::now();
                    layers.iter().for_each(|layer| layer.pass(&pool, set, &mut input, &x, &mut out));
                    start.elapsed().as_secs_f64()
                };
                let best = (0..if rows < 64 { 30 } else { 5 }).map(&mut pass).fold(f64::INFINITY, f64::min);
                let macs = rows as f64 * 106_168_320.0;
                println!("{kind} {set} {rows} rows: {:.2} ms, {:.0} GMAC/s", best * 1e3, macs / best / 1e9);
            }
        }
    }
}
