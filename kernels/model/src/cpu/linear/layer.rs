//! A linear layer on its own, for measurements and tools.

use std::sync::Mutex;

use longshore_compute::{ComputePool, InstructionSet};

use super::Linear;
use super::input::{Input, Plain};
use super::matrix::PackedMatrix;
use super::multiply::{Then, multiply};
use crate::Error;
use crate::files::TensorType;

/// Weights `[outputs, inputs]` packed as the CPU backend packs them, with the kernels that it uses.
#[derive(Debug)]
pub struct LinearLayer {
    matrix: PackedMatrix,
    set: InstructionSet,
    scratch: Mutex<Input>,
}

impl LinearLayer {
    /// Packs weights as files store them: `bytes` holds `outputs` rows of `inputs` elements of type `kind`, row by row.
    pub fn new(
        pool: &ComputePool,
        linear: Linear,
        kind: TensorType,
        [outputs, inputs]: [usize; 2],
        bytes: &[u8],
    ) -> Result<Self, Error> {
        let invalid = |field: &str, problem| Error::Invalid { field: field.to_owned(), problem };
        if let Some((field, problem)) = kind.fault_of_matrix([outputs, inputs], bytes.len()) {
            return Err(invalid(field, problem));
        }
        let matrix = PackedMatrix::pack(pool, linear, kind, [outputs, inputs], bytes)
            .ok_or_else(|| invalid("bytes", "holds a value that is not finite".to_owned()))?;
        Ok(Self { matrix, set: InstructionSet::detect(), scratch: Mutex::default() })
    }

    /// Pseudo-random weights of a type, the same for the same seed, for measurements.
    pub fn synthetic(
        pool: &ComputePool,
        linear: Linear,
        kind: TensorType,
        shape: [usize; 2],
        seed: u64,
    ) -> Result<Self, Error> {
        let (elements, _) = kind.block();
        let blocks = shape[0].checked_mul(shape[1]).map(|weights| weights.div_ceil(elements));
        let blocks = blocks.ok_or_else(|| Error::Invalid {
            field: "shape".to_owned(),
            problem: format!("is [{}, {}], more than memory can hold", shape[0], shape[1]),
        })?;
        Self::new(pool, linear, kind, shape, &kind.random_blocks(blocks, seed))
    }

    /// `out = x · weightsᵀ`: `x` f32 `[rows, inputs]`, `out` f32 `[rows, outputs]`; panics on other lengths. Includes what
    /// the backend does to prepare activations.
    pub fn multiply(&self, pool: &ComputePool, x: &[f32], rows: usize, out: &mut [f32]) {
        let inputs = self.matrix.inputs();
        assert_eq!(x.len(), rows * inputs, "`x` is [rows, inputs]");
        // A caller that finds the scratch taken, or left by a panic, uses its own.
        let (mut own, mut shared) = (None, self.scratch.try_lock().ok());
        let input = match shared.as_deref_mut() {
            Some(input) => input,
            None => own.insert(Input::default()),
        };
        input.fill(pool, self.set, [rows, inputs], self.matrix.forms(), &Plain { x, width: inputs });
        multiply(pool, self.set, input, vec![(&self.matrix, Then::Store(out))]);
    }

    /// Outputs and inputs.
    pub fn shape(&self) -> [usize; 2] {
        [self.matrix.outputs(), self.matrix.inputs()]
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> u64 {
        self.matrix.bytes()
    }

    /// Type of the weights, what products are computed in, and the instruction set, for example
    /// `Q4_1: int8 activations (avx512)`.
    pub fn describe(&self) -> String {
        let (kind, computed) = self.matrix.kinds();
        format!("{kind}: {computed} ({})", self.set)
    }
}
