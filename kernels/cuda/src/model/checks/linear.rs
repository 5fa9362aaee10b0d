//! Linear layers against sums in f64, and one row against many.

use longshore_compute::ComputePool;
use longshore_model::{Error, StoredMatrix, TensorType};

use super::{case, distance, random, same_bits};
use crate::model::failed;
use crate::model::layer::CudaLinear;
use crate::model::load::ModelOptions;
use crate::model::programs::Precision;
use crate::selftest::Case;

/// A layer and how many rows go through it.
#[derive(Debug, Clone, Copy)]
struct Layer {
    precision: Precision,
    kind: TensorType,
    outputs: usize,
    inputs: usize,
    rows: usize,
}

/// Rows that go through the layer alone; with those of [`Layer::rows`], every kernel has its turn.
const FEWER_ROWS: [usize; 5] = [1, 8, 9, 32, 33];

/// Shapes with a rest in every dimension, and with more parts than there are warps.
const LAYERS: [Layer; 15] = {
    const fn layer(precision: Precision, kind: TensorType, [outputs, inputs, rows]: [usize; 3]) -> Layer {
        Layer { precision, kind, outputs, inputs, rows }
    }
    use Precision::{Bf16, F16, F32};
    use TensorType as T;
    [
        layer(F32, T::F32, [67, 50, 70]),
        layer(F32, T::Q4K, [5, 256, 3]),
        layer(F16, T::F16, [137, 200, 70]),
        layer(F16, T::F32, [16, 1, 3]),
        layer(F16, T::F16, [24, 1_300, 34]),
        layer(F16, T::F16, [130, 140, 131]),
        layer(Bf16, T::Bf16, [130, 140, 131]),
        layer(Bf16, T::F32, [40, 270, 40]),
        layer(F16, T::Q4_0, [37, 160, 100]),
        layer(F16, T::Q4_1, [133, 1_184, 97]),
        layer(F16, T::Q4K, [21, 512, 40]),
        layer(F16, T::Q5_0, [21, 160, 10]),
        layer(F16, T::Q5_1, [21, 160, 10]),
        layer(F16, T::Q6K, [37, 256, 98]),
        layer(F16, T::Q8_0, [133, 320, 97]),
    ]
};

/// In bf16, quantised weights are made by other instructions.
const MORE: [(TensorType, usize); 2] = [(TensorType::Q4_1, 97), (TensorType::Q8_0, 10)];

pub(super) fn cases() -> Vec<Case> {
    let more =
        MORE.map(|(kind, rows)| Layer { precision: Precision::Bf16, kind, outputs: 37, inputs: 160, rows });
    let check = |layer: Layer| {
        let Layer { precision, kind, outputs, inputs, rows } = layer;
        let name = format!("linear {} {kind} [{outputs}, {inputs}] of {rows} rows", precision.name());
        case(name, precision.bound(), move |device| {
            let options =
                ModelOptions { precision: Some(precision), ..ModelOptions::new(ComputePool::serial()) };
            let (elements, _) = kind.block();
            let bytes = kind.random_blocks(outputs * inputs / elements, 11);
            let linear =
                CudaLinear::new(device, &options, kind, [outputs, inputs], &bytes).map_err(failed)?;
            let x = random(rows * inputs, 12);
            let found = linear.multiply(&x).map_err(failed)?;
            Ok(distance(&found, &layer.expected(&bytes, &x)) + layer.rows_differ(&linear, &x, &found)?)
        })
    };
    LAYERS.into_iter().chain(more).map(check).collect()
}

impl Layer {
    fn expected(&self, bytes: &[u8], x: &[f32]) -> Vec<f64> {
        let Self { kind, outputs, inputs, .. } = *self;
        let matrix = StoredMatrix { kind, rows: outputs, cols: inputs, bytes: bytes.into() };
        let mut weights = vec![0.0; outputs * inputs];
        assert!(matrix.dequantize(0..outputs, &mut weights), "random weights are finite");
        let dot = |w: &[f32], x: &[f32]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
        x.chunks_exact(inputs)
            .flat_map(|x| weights.chunks_exact(inputs).map(|w| dot(w, x)).collect::<Vec<_>>())
            .collect()
    }

    /// Whether bits of a row depend on what other rows there are: 0, or infinity.
    fn rows_differ(&self, linear: &CudaLinear, x: &[f32], all: &[f32]) -> Result<f64, Error> {
        let mut differ = 0.0;
        for rows in FEWER_ROWS.into_iter().filter(|rows| *rows < self.rows) {
            let last = self.rows - rows;
            let found = linear.multiply(&x[last * self.inputs..]).map_err(failed)?;
            differ += same_bits(&found, &all[last * self.outputs..]);
        }
        Ok(differ)
    }
}
