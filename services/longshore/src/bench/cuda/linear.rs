//! Linear layers of few and of many rows, in the shape of a gate of Llama-3-8B.

use std::sync::Arc;

use anyhow::{Result, ensure};
use longshore_compute::ComputePool;
use longshore_cuda::{Buffer, CudaLinear, Device, ModelOptions, Precision};
use longshore_model::{StoredMatrix, TensorType};

use super::{
    Bench,
    report::{Peaks, Point},
};

const OUTPUTS: usize = 14_336;
const INPUTS: usize = 4_096;
/// Types of the weights, with what they are multiplied in.
const KINDS: [(TensorType, Precision); 3] = [
    (TensorType::Bf16, Precision::Bf16),
    (TensorType::Q8_0, Precision::F16),
    (TensorType::Q4_0, Precision::F16),
];
/// A decode step, a batch of them, a chunk of a prompt.
const ROWS: [usize; 3] = [1, 32, 2_048];
/// Bytes of weights that take turns, so that none is found in a cache.
const WEIGHT_BYTES: usize = 512 << 20;

/// Measures every type and number of rows.
pub(super) fn measure(bench: &Bench, peaks: &Peaks, pool: &Arc<ComputePool>) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    for (kind, precision) in KINDS {
        let stack = Stack::new(&bench.queue, pool, kind, precision)?;
        for rows in ROWS {
            points.push(stack.point(bench, peaks, rows)?);
        }
    }
    Ok(points)
}

/// Matrices of one type with weights of their own.
struct Stack {
    kind: TensorType,
    layers: Vec<CudaLinear>,
    /// Row 0 of the weights, which all matrices share, as it is multiplied.
    first: Vec<f32>,
}

impl Stack {
    fn new(
        device: &Arc<dyn Device>,
        pool: &Arc<ComputePool>,
        kind: TensorType,
        precision: Precision,
    ) -> Result<Self> {
        let options = ModelOptions { precision: Some(precision), ..ModelOptions::new(Arc::clone(pool)) };
        let (elements, _) = kind.block();
        let bytes = kind.random_blocks(OUTPUTS * INPUTS / elements, 11);
        let mut layers = vec![CudaLinear::new(device, &options, kind, [OUTPUTS, INPUTS], &bytes)?];
        while layers.len() * layers[0].bytes() < WEIGHT_BYTES {
            layers.push(CudaLinear::new(device, &options, kind, [OUTPUTS, INPUTS], &bytes)?);
        }
        let matrix = StoredMatrix { kind, rows: OUTPUTS, cols: INPUTS, bytes: bytes.as_slice().into() };
        let mut first = vec![0.0; INPUTS];
        ensure!(matrix.dequantize(0..1, &mut first), "random weights of {kind} are not finite");
        Ok(Self { kind, layers, first })
    }

    fn point(&self, bench: &Bench, peaks: &Peaks, rows: usize) -> Result<Point> {
        // Powers of two, which no precision rounds.
        let x: Vec<f32> = (0..rows * INPUTS).map(|index| [0.5, -0.25, 1.0][index % 3]).collect();
        let inputs = self.layers.iter().map(|layer| layer.input(&x)).collect::<Result<Vec<_>, _>>()?;
        let out = Buffer::new(&bench.queue, rows * OUTPUTS * size_of::<f32>())?;
        let room = Buffer::new(&bench.queue, self.layers[0].room_bytes(rows))?;
        let seconds = bench.sample(|| {
            let mut layers = self.layers.iter().zip(&inputs);
            Ok(layers.try_for_each(|(layer, input)| layer.launch(input, rows, &out, &room))?)
        })?;
        self.check(&out, &x)?;
        let seconds = seconds.map(|seconds| seconds / self.layers.len() as f64);
        let name = format!("linear [{OUTPUTS}, {INPUTS}] of {rows} rows, {} weights", self.kind);
        // Up to 32 rows weights are what is waited for.
        if rows <= 32 {
            return Ok(Point::bytes(name, seconds, self.layers[0].bytes() as f64, &peaks.copy_gbps));
        }
        let flops = 2.0 * (rows * OUTPUTS * INPUTS) as f64;
        Ok(Point::flops(name, seconds, flops, &peaks.matrix_bf16_tflops))
    }

    /// Whether the first output of the first row is the sum that it should be.
    fn check(&self, out: &Buffer, x: &[f32]) -> Result<()> {
        let mut found = [0.0_f32];
        out.span(0, size_of::<f32>())?.read(&mut found)?;
        let terms = || self.first.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
        let (wanted, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
        ensure!(
            (f64::from(found[0]) - wanted).abs() <= 8e-3 * size,
            "a product of {} weights gave {}, not {wanted}: its time means nothing",
            self.kind,
            found[0]
        );
        Ok(())
    }
}
