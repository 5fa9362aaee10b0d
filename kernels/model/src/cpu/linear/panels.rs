//! Quantised weights as the kernels read them: panels of 16 outputs, cut into groups of 32 inputs.
//!
//! A lane of 64 bytes holds four inputs of each output, so that one 512-bit load feeds 16 dot products. Four-bit types take
//! four lanes a group (low nibbles: inputs 0 to 15, high nibbles: 16 to 31), the others eight. Scales and minimums lie apart,
//! in the precision of the file, so that a packed matrix is as large as the stored one.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use half::f16;
use longshore_compute::{ComputePool, DisjointSlice, SlabArray};

use super::format::{Format, ScaleElement as _, Second, with_format};
use super::group::Group;
use crate::files::TensorType;

/// Outputs of a panel.
pub(super) const PANEL: usize = 16;
/// Inputs of a group.
pub(super) const GROUP: usize = 32;
/// Panels that one task packs.
const PACK_PANELS: usize = 8;

/// Four inputs of 16 outputs; aligned as the widest load likes it.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Lane(pub(super) [u8; 64]);

/// Numbers of 16 outputs each, `[panel][group][1 or 2]`.
pub(super) enum Scales {
    Half(SlabArray<[f16; PANEL]>),
    Single(SlabArray<[f32; PANEL]>),
}

/// A quantised matrix `[outputs, inputs]`; outputs past the end are zero.
pub(super) struct QuantPanels {
    pub(super) kind: TensorType,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    /// `[panel][group][4 or 8]`.
    quants: SlabArray<Lane>,
    scales: Scales,
}

/// One panel of a matrix of format `F`.
pub(super) struct Panel<'a, F: Format> {
    /// `[group][F::LANES]`.
    pub(super) quants: &'a [Lane],
    /// `[group][F::NUMBERS]`.
    pub(super) scales: &'a [[F::Element; PANEL]],
}

impl QuantPanels {
    /// Packs a matrix whose groups `group(output, index)` hands out, in parallel. `None` when a number is not finite.
    pub(super) fn pack(
        pool: &ComputePool,
        kind: TensorType,
        outputs: usize,
        inputs: usize,
        group: impl Fn(usize, usize) -> Group + Sync,
    ) -> Option<Self> {
        with_format!(kind, F => Self::pack_as::<F>(pool, kind, [outputs, inputs], group))
    }

    fn pack_as<F: Format>(
        pool: &ComputePool,
        kind: TensorType,
        [outputs, inputs]: [usize; 2],
        group: impl Fn(usize, usize) -> Group + Sync,
    ) -> Option<Self> {
        assert!(inputs.is_multiple_of(GROUP), "rows of quantised weights are whole groups");
        let (panels, groups) = (outputs.div_ceil(PANEL), inputs / GROUP);
        let mut quants = SlabArray::<Lane>::zeroed(panels * groups * F::LANES);
        let mut scales = SlabArray::<[F::Element; PANEL]>::zeroed(panels * groups * F::NUMBERS);
        let (lanes, numbers) = (groups * F::LANES, groups * F::NUMBERS);
        let (all_quants, all_scales) = (DisjointSlice::new(&mut quants), DisjointSlice::new(&mut scales));
        let finite = pool.map(panels.div_ceil(PACK_PANELS), |task| {
            (task * PACK_PANELS..panels.min((task + 1) * PACK_PANELS)).all(|panel| {
                #[expect(unsafe_code, reason = "each task has its own panels")]
                // SAFETY: ranges of different panels do not overlap, and each panel is packed by one task.
                let (quants, scales) = unsafe {
                    (
                        all_quants.range(panel * lanes..(panel + 1) * lanes),
                        all_scales.range(panel * numbers..(panel + 1) * numbers),
                    )
                };
                let outputs = panel * PANEL..outputs.min((panel + 1) * PANEL);
                pack_panel::<F>(outputs, groups, &group, quants, scales)
            })
        });
        let scales = F::Element::wrap(scales);
        finite.into_iter().all(|finite| finite).then_some(Self { kind, outputs, inputs, quants, scales })
    }

    /// [`Self::bytes`] of a matrix of this size.
    pub(super) fn expected_bytes(kind: TensorType, outputs: usize, inputs: usize) -> u64 {
        let groups = (outputs.div_ceil(PANEL) * (inputs / GROUP)) as u64;
        let group = with_format!(kind, F => {
            F::LANES * size_of::<Lane>() + F::NUMBERS * size_of::<[<F as Format>::Element; PANEL]>()
        });
        groups * group as u64
    }

    /// The panel with this index, which has format `F`.
    pub(super) fn panel<F: Format>(&self, panel: usize) -> Panel<'_, F> {
        let groups = self.inputs / GROUP;
        let (lanes, numbers) = (groups * F::LANES, groups * F::NUMBERS);
        Panel {
            quants: &self.quants[panel * lanes..][..lanes],
            scales: &F::Element::view(&self.scales)[panel * numbers..][..numbers],
        }
    }

    /// Weights of one output, f32 `[inputs]`, as the file's type defines them.
    pub(super) fn row(&self, output: usize, row: &mut [f32]) {
        with_format!(self.kind, F => self.row_as::<F>(output, row));
    }

    fn row_as<F: Format>(&self, output: usize, row: &mut [f32]) {
        let (panel, output) = (self.panel::<F>(output / PANEL), output % PANEL);
        let zero = F::ZERO_SHIFT.map_or(0, |shift| 1 << shift);
        let groups = panel.quants.chunks_exact(F::LANES).zip(panel.scales.chunks_exact(F::NUMBERS));
        for ((lanes, numbers), row) in groups.zip(row.chunks_exact_mut(GROUP)) {
            for (k, weight) in row.iter_mut().enumerate() {
                let quant = (quant::<F>(lanes, output, k) - zero) as f32;
                let number = |index: usize| numbers[index][output].to_f32();
                *weight = match F::SECOND {
                    Second::Absent => quant * number(0),
                    Second::Minimum => quant * number(0) + number(1),
                    Second::UpperScale => quant * number(k / 16),
                };
            }
        }
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> u64 {
        let scales = match &self.scales {
            Scales::Half(scales) => size_of_val(&**scales),
            Scales::Single(scales) => size_of_val(&**scales),
        };
        (size_of_val(&*self.quants) + scales) as u64
    }
}

/// The unsigned quant of input `k` of a group.
pub(super) fn quant<F: Format>(lanes: &[Lane], output: usize, k: usize) -> i32 {
    let byte = |k: usize| lanes[k / 4].0[output * 4 + k % 4];
    i32::from(match (F::NIBBLES, k < 16) {
        (true, true) => byte(k) & 0xf,
        (true, false) => byte(k - 16) >> 4,
        (false, _) => byte(k),
    })
}

/// Packs one panel; returns whether its numbers are finite.
fn pack_panel<F: Format>(
    outputs: Range<usize>,
    groups: usize,
    group: &impl Fn(usize, usize) -> Group,
    quants: &mut [Lane],
    scales: &mut [[F::Element; PANEL]],
) -> bool {
    let mut finite = true;
    for (slot, output) in outputs.enumerate() {
        for index in 0..groups {
            let Group { first, second, quants: values } = group(output, index);
            finite &= first.is_finite() && second.is_finite();
            let numbers = &mut scales[index * F::NUMBERS..][..F::NUMBERS];
            for (number, value) in numbers.iter_mut().zip([first, second]) {
                number[slot] = F::Element::from_f32(value);
            }
            let lanes = &mut quants[index * F::LANES..][..F::LANES];
            for (quad, lane) in lanes.iter_mut().enumerate() {
                for (i, byte) in lane.0[slot * 4..slot * 4 + 4].iter_mut().enumerate() {
                    let k = quad * 4 + i;
                    *byte = if F::NIBBLES { values[k] | values[k + 16] << 4 } else { values[k] };
                }
            }
        }
    }
    finite
}
