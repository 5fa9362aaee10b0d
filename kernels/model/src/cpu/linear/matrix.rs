//! A packed matrix of any type.

use half::{bf16, f16};
use longshore_compute::{ComputePool, InstructionSet};

use super::Linear;
use super::floats::{FloatPanels, Stored};
use super::format::is_quantised;
use super::group;
use super::input::{Block, Forms, Input};
use super::kernel::{self, Sums};
use super::panels::{GROUP, PANEL, QuantPanels};
use crate::files::{TensorType, dequantize};

/// Weights `[outputs, inputs]`, ready to be multiplied.
pub(in crate::cpu) struct PackedMatrix {
    stored: TensorType,
    panels: Panels,
}

enum Panels {
    Quantised(QuantPanels),
    F32(FloatPanels<f32>),
    F16(FloatPanels<f16>),
    Bf16(FloatPanels<bf16>),
}

/// Runs `$body` with `$panels` standing for the panels of any type.
macro_rules! any_panels {
    ($matrix:expr, $panels:ident => $body:expr) => {
        match &$matrix.panels {
            Panels::Quantised($panels) => $body,
            Panels::F32($panels) => $body,
            Panels::F16($panels) => $body,
            Panels::Bf16($panels) => $body,
        }
    };
}

/// Runs `$body` with `$panels` standing for the panels of a floating-point type.
macro_rules! float_panels {
    ($matrix:expr, $quantised:ident => $other:expr, $panels:ident => $body:expr) => {
        match &$matrix.panels {
            Panels::Quantised($quantised) => $other,
            Panels::F32($panels) => $body,
            Panels::F16($panels) => $body,
            Panels::Bf16($panels) => $body,
        }
    };
}

impl PackedMatrix {
    /// Packs stored weights, whole rows of whole blocks, in parallel. `None` when a number is not finite.
    pub(in crate::cpu) fn pack(
        pool: &ComputePool,
        linear: Linear,
        stored: TensorType,
        [outputs, inputs]: [usize; 2],
        bytes: &[u8],
    ) -> Option<Self> {
        let (block_elements, block_bytes) = stored.block();
        assert!(inputs.is_multiple_of(block_elements), "rows are whole blocks");
        let row_bytes = inputs / block_elements * block_bytes;
        assert_eq!(bytes.len(), outputs * row_bytes, "the weights must be [{outputs}, {inputs}]");
        let row = |output: usize| &bytes[output * row_bytes..][..row_bytes];
        let size = [outputs, inputs];
        let panels = match (linear, stored) {
            (Linear::F32, _) => pack_f32(pool, stored, size, row)?,
            (_, kind) if is_quantised(kind) => {
                let group = |output, index| group::stored(kind, row(output), index);
                Panels::Quantised(QuantPanels::pack(pool, kind, outputs, inputs, group)?)
            }
            (Linear::Int8, _) if inputs.is_multiple_of(GROUP) => quantise(pool, stored, size, row)?,
            (_, TensorType::F16) => {
                Panels::F16(FloatPanels::pack(pool, outputs, inputs, |output, values| {
                    halves(row(output), values, f16::from_le_bytes);
                })?)
            }
            (_, TensorType::Bf16) => {
                Panels::Bf16(FloatPanels::pack(pool, outputs, inputs, |output, values| {
                    halves(row(output), values, bf16::from_le_bytes);
                })?)
            }
            _ => pack_f32(pool, stored, size, row)?,
        };
        Some(Self { stored, panels })
    }

    /// Bytes in memory that [`Self::pack`] is going to need.
    pub(in crate::cpu) fn expected_bytes(
        linear: Linear,
        stored: TensorType,
        [outputs, inputs]: [usize; 2],
    ) -> u64 {
        let padded = outputs.next_multiple_of(PANEL) as u64 * inputs as u64;
        match (linear, stored) {
            (Linear::F32, _) => padded * 4,
            (_, kind) if is_quantised(kind) => QuantPanels::expected_bytes(kind, outputs, inputs),
            (Linear::Int8, _) if inputs.is_multiple_of(GROUP) => {
                QuantPanels::expected_bytes(TensorType::Q8_0, outputs, inputs)
            }
            (_, TensorType::F16 | TensorType::Bf16) => padded * 2,
            _ => padded * 4,
        }
    }

    pub(in crate::cpu) fn outputs(&self) -> usize {
        any_panels!(self, panels => panels.outputs)
    }

    pub(in crate::cpu) fn inputs(&self) -> usize {
        any_panels!(self, panels => panels.inputs)
    }

    /// Panels of 16 outputs.
    pub(super) fn panels(&self) -> usize {
        self.outputs().div_ceil(PANEL)
    }

    /// What it reads of its input.
    pub(in crate::cpu) fn forms(&self) -> Forms {
        let int8 = matches!(self.panels, Panels::Quantised(_));
        Forms { int8, float: !int8 }
    }

    /// Weights of one output, f32 `[inputs]`: the stored ones, but where [`Linear::Int8`] has quantised them.
    pub(in crate::cpu) fn row(&self, output: usize, row: &mut [f32]) {
        assert!(
            output < self.outputs() && row.len() == self.inputs(),
            "row {output} must exist and have {} elements",
            self.inputs()
        );
        any_panels!(self, panels => panels.row(output, row));
    }

    /// Bytes in memory.
    pub(in crate::cpu) fn bytes(&self) -> u64 {
        any_panels!(self, panels => panels.bytes())
    }

    /// Type in the file, and what its products are computed in.
    pub(in crate::cpu) fn kinds(&self) -> (TensorType, &'static str) {
        let computed = match (&self.panels, is_quantised(self.stored)) {
            (Panels::Quantised(_), true) => "int8 activations",
            (Panels::Quantised(_), false) => "8-bit weights, int8 activations",
            (Panels::F32(_), true) => "f32, dequantised",
            (_, _) => "f32",
        };
        (self.stored, computed)
    }

    /// Multiplies one or two panels (as many as `sums` has) with a block of rows.
    pub(super) fn multiply(
        &self,
        set: InstructionSet,
        first: usize,
        input: &Input,
        block: Block,
        sums: &mut [Sums],
    ) {
        float_panels!(
            self,
            quantised => {
                for (i, sums) in sums.iter_mut().enumerate() {
                    kernel::quantised(set, quantised, first + i, input.int8(block), block.size, sums);
                }
            },
            floats => kernel::floats(set, floats, first, input.float(block), block.size, sums)
        );
    }
}

fn pack_f32<'a>(
    pool: &ComputePool,
    stored: TensorType,
    [outputs, inputs]: [usize; 2],
    row: impl Fn(usize) -> &'a [u8] + Sync,
) -> Option<Panels> {
    let read = |output: usize, values: &mut [f32]| {
        // Packing looks at every number itself.
        dequantize(stored, row(output), values);
    };
    Some(Panels::F32(FloatPanels::pack(pool, outputs, inputs, read)?))
}

/// Quantises floating-point weights to eight bits.
fn quantise<'a>(
    pool: &ComputePool,
    stored: TensorType,
    [outputs, inputs]: [usize; 2],
    row: impl Fn(usize) -> &'a [u8] + Sync,
) -> Option<Panels> {
    let bytes = stored.block().1 * GROUP;
    let group = |output: usize, index: usize| {
        let mut weights = [0.0; GROUP];
        dequantize(stored, &row(output)[index * bytes..][..bytes], &mut weights);
        group::quantised(&weights)
    };
    Some(Panels::Quantised(QuantPanels::pack(pool, TensorType::Q8_0, outputs, inputs, group)?))
}

fn halves<E: Stored>(bytes: &[u8], values: &mut [E], read: fn([u8; 2]) -> E) {
    for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *value = read(*bytes);
    }
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix[{} x {}, {}]", self.outputs(), self.inputs(), self.stored)
    }
}
