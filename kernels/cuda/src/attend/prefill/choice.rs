//! How a kernel is cut: rows and keys of a thread block, stages, shared memory.

use crate::architecture::shared_bytes_limit;
use crate::{Device, Error, Kernel, PageElement, PageShape, Source};

const MATRIX: Source = Source {
    name: "attend_prefill.cu",
    text: concat!(
        include_str!("../../../source/attend_lists.cuh"),
        include_str!("../../../source/attend_rows.cuh"),
        include_str!("../../../source/attend_prefill.cu"),
    ),
};
const WGMMA: Source = Source {
    name: "attend_prefill_wgmma.cu",
    text: concat!(
        include_str!("../../../source/attend_lists.cuh"),
        include_str!("../../../source/attend_rows.cuh"),
        include_str!("../../../source/attend_prefill_wgmma.cu"),
    ),
};
const SCALAR: Source = Source {
    name: "attend_scalar.cu",
    text: concat!(
        include_str!("../../../source/attend_lists.cuh"),
        include_str!("../../../source/attend_scalar.cu"),
    ),
};
/// Stages of the copies of keys and values.
const STAGES: usize = 2;
/// The same of the kernel of warp groups, which has most of a multiprocessor's shared memory for itself.
const WGMMA_STAGES: usize = 6;
/// Its bands begin at multiples of this.
const BAND_ALIGNMENT: usize = 1024;
/// Warps of it that copy.
const COPY_WARPS: usize = 4;
/// What the system takes of a multiprocessor's shared memory for each thread block, and keeps from the limit of one.
const SYSTEM_BYTES: usize = 1024;
/// What a thread block notes of its task, beside the positions of its rows.
const TASK_BYTES: usize = 40;
/// Two barriers of a stage.
const BARRIER_BYTES: usize = 16;
/// Warps of a thread block of the scalar kernel, and rows that it takes.
const SCALAR_WARPS: usize = 4;
const SCALAR_ROWS: usize = 32;

/// What a device has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    capability: u32,
    /// Shared memory of a thread block.
    shared: usize,
}

impl Limits {
    pub(super) fn of(device: &dyn Device) -> Self {
        Self { capability: device.capability(), shared: device.shared_bytes_limit() }
    }

    /// Keys that are visited at once: scores of 64 have room in registers beside the outputs of small heads, and, as the assembler
    /// deals them out for Hopper, of 128 elements.
    fn keys(self, head_dim: usize) -> usize {
        match head_dim {
            0..=96 => 64,
            97..=128 if (90..100).contains(&self.capability) => 64,
            _ => 32,
        }
    }
}

/// Thread blocks that registers leave room for on a multiprocessor.
fn resident(head_dim: usize) -> usize {
    match head_dim {
        0..=64 => 3,
        65..=128 => 2,
        _ => 1,
    }
}

/// Compile-time choices of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) warps: usize,
    /// Tiles of 16 rows of a warp; 0: the scalar kernel.
    pub(super) row_tiles: usize,
    /// Keys that are visited at once.
    pub(super) keys: usize,
    /// Thread blocks that are on a multiprocessor at once.
    pub(super) blocks: usize,
    /// Warps that only copy: those of the kernel of warp groups.
    pub(super) copy_warps: usize,
    pub(super) shared: usize,
}

impl Choice {
    /// For up to `packed_rows` rows of a list. Warps of 32 rows read keys from shared memory once for both tiles; the outputs of larger
    /// heads have no room in registers beside a second.
    pub(super) fn new(shape: &PageShape, packed_rows: usize, limits: Limits) -> Result<Self, Error> {
        let (row_tiles, most_warps) = if shape.head_dim <= 128 { (2, 4) } else { (1, 8) };
        let warps = packed_rows.div_ceil(16 * row_tiles).clamp(1, most_warps);
        let sized = |keys: usize, blocks: usize| {
            let shared = shared_bytes(shape, 16 * row_tiles * warps, keys);
            Self { warps, row_tiles, keys, blocks, copy_warps: 0, shared }
        };
        // Thread blocks hide each other's waits: rather that than more keys at once.
        let wide = limits.keys(shape.head_dim);
        let most =
            (1..=resident(shape.head_dim)).rev().flat_map(|blocks| [sized(wide, blocks), sized(32, blocks)]);
        let least = sized(16, 1);
        let fits =
            |choice: &Self| (choice.shared + SYSTEM_BYTES) * choice.blocks <= limits.shared + SYSTEM_BYTES;
        most.chain([least]).find(fits).ok_or_else(|| {
            let (needed, limit) = (least.shared, limits.shared);
            let problem = format!(
                "of {} needs {needed} bytes of shared memory, the device has {limit}",
                shape.head_dim
            );
            Error::Invalid { field: "head_dim", problem }
        })
    }

    /// The kernel without matrix units.
    pub(super) fn scalar(shape: &PageShape) -> Self {
        let shared = SCALAR_WARPS * (shape.head_dim + 32) * size_of::<f32>();
        Self { warps: SCALAR_WARPS, row_tiles: 0, keys: 64, blocks: 1, copy_warps: 0, shared }
    }

    /// By warp groups; `None` where there are none, or no layout of the heads for them. Code for `sm_90a` runs on 9.0 alone.
    pub(super) fn wgmma(shape: &PageShape, limits: Limits) -> Option<Self> {
        let suits = limits.capability == 90
            && matches!(shape.head_dim, 64 | 128)
            && matches!(shape.element, PageElement::F16 | PageElement::Bf16);
        let (warps, row_tiles, keys) = (8, 1, 64);
        let stage = 2 * keys * shape.head_dim * shape.element.bytes() + marks_bytes(keys) + BARRIER_BYTES;
        let shared = BAND_ALIGNMENT + WGMMA_STAGES * stage + TASK_BYTES + 4 * 16 * row_tiles * warps;
        let choice = Self { warps, row_tiles, keys, blocks: 1, copy_warps: COPY_WARPS, shared };
        (suits && shared <= limits.shared).then_some(choice)
    }

    /// Rows of a thread block.
    pub(super) fn rows(&self) -> usize {
        if self.row_tiles == 0 { SCALAR_ROWS } else { 16 * self.row_tiles * self.warps }
    }

    /// Threads of a thread block.
    pub(super) fn threads(&self) -> u32 {
        32 * (self.copy_warps + self.warps) as u32
    }

    pub(super) fn kernel(&self, shape: &PageShape) -> Kernel {
        let dtype = ("DTYPE", shape.element.constant());
        let (head_dim, keys) = (("HEAD_DIM", shape.head_dim as i64), ("KEYS", self.keys as i64));
        if self.row_tiles == 0 {
            return Kernel { source: SCALAR, entry: "attend_scalar", constants: vec![dtype, head_dim, keys] };
        }
        if self.copy_warps > 0 {
            let constants = vec![
                dtype,
                ("FIRST_WARP", self.copy_warps as i64),
                head_dim,
                keys,
                ("ROW_TILES", self.row_tiles as i64),
                ("STAGES", WGMMA_STAGES as i64),
                ("WARPS", self.warps as i64),
            ];
            return Kernel { source: WGMMA, entry: "attend_prefill_wgmma", constants };
        }
        let constants = vec![
            ("BLOCKS", self.blocks as i64),
            dtype,
            head_dim,
            keys,
            ("ROW_TILES", self.row_tiles as i64),
            ("STAGES", STAGES as i64),
            ("WARPS", self.warps as i64),
        ];
        Kernel { source: MATRIX, entry: "attend_prefill", constants }
    }
}

/// Kernels for the head sizes of models on devices of some compute capability. f16 differs from bf16 in instructions of the same
/// number and registers, and fewer warps in constants: of these one head size stands for all, since each takes a second to compile.
pub(crate) fn kernels(capability: u32) -> Vec<Kernel> {
    let limits = Limits { capability, shared: shared_bytes_limit(capability) };
    let mut kernels = Vec::new();
    for element in [PageElement::F32, PageElement::F16, PageElement::Bf16] {
        for head_dim in [64, 80, 96, 128, 256] {
            let shape = PageShape { tokens: 64, kv_heads: 1, head_dim, element };
            let rows: &[usize] = match (element, head_dim) {
                (PageElement::Bf16, 128) => &[32, 128],
                (PageElement::Bf16, _) | (PageElement::F16, 128) => &[128],
                _ => &[],
            };
            let choices = rows.iter().filter_map(|rows| Choice::new(&shape, *rows, limits).ok());
            kernels.extend(choices.map(|choice| choice.kernel(&shape)));
            if !rows.is_empty() {
                kernels.extend(Choice::wgmma(&shape, limits).map(|choice| choice.kernel(&shape)));
            }
            if element == PageElement::F32 || head_dim == 256 {
                kernels.push(Choice::scalar(&shape).kernel(&shape));
            }
        }
    }
    kernels
}

/// Shared memory of a thread block: queries, the stages of K and V with the marks of their keys, the task and the positions of its rows.
fn shared_bytes(shape: &PageShape, rows: usize, keys: usize) -> usize {
    debug_assert_ne!(shape.element, PageElement::F32, "has no matrix units");
    let row = shape.head_dim * shape.element.bytes();
    rows * row + STAGES * (2 * keys * row + marks_bytes(keys)) + TASK_BYTES + 4 * rows
}

/// What is noted of the keys of a stage.
fn marks_bytes(keys: usize) -> usize {
    keys * 8 + 16
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOPPER: Limits = Limits { capability: 90, shared: 227 << 10 };
    const AMPERE: Limits = Limits { capability: 80, shared: 163 << 10 };
    const ADA: Limits = Limits { capability: 89, shared: 99 << 10 };

    fn choice(head_dim: usize, rows: usize, limits: Limits) -> Choice {
        let shape = PageShape { tokens: 64, kv_heads: 2, head_dim, element: PageElement::Bf16 };
        Choice::new(&shape, rows, limits).unwrap()
    }

    #[test]
    fn as_many_thread_blocks_fit_as_should() {
        let (few, many) = ((32, 2), (64, 2));
        for (head_dim, hopper, ampere, ada) in [
            (64, (64, 3), (64, 3), few),
            (80, many, many, few),
            (96, many, many, (64, 1)),
            (128, many, few, (32, 1)),
            (256, (32, 1), (32, 1), (16, 1)),
        ] {
            for (limits, wanted) in [(HOPPER, hopper), (AMPERE, ampere), (ADA, ada)] {
                let choice = choice(head_dim, 128, limits);
                assert_eq!((choice.keys, choice.blocks), wanted, "{head_dim}, {limits:?}");
                assert_eq!(choice.rows(), 128);
                assert!(choice.shared <= limits.shared);
            }
        }
        assert_eq!(choice(256, 128, HOPPER).threads(), 256);
    }

    #[test]
    fn few_rows_take_few_warps() {
        let warps = |rows| choice(128, rows, HOPPER).warps;
        assert_eq!([1, 32, 33, 96, 128, 224].map(warps), [1, 1, 2, 3, 4, 4]);
    }

    #[test]
    fn warp_groups_are_for_hopper_and_heads_of_whole_bands() {
        let shape = |head_dim, element| PageShape { tokens: 64, kv_heads: 2, head_dim, element };
        for (head_dim, element, there) in [
            (64, PageElement::F16, true),
            (128, PageElement::F16, true),
            (128, PageElement::Bf16, true),
            (96, PageElement::Bf16, false),
            (256, PageElement::F16, false),
            (128, PageElement::F32, false),
            (128, PageElement::Int8, false),
        ] {
            let choice = Choice::wgmma(&shape(head_dim, element), HOPPER);
            assert_eq!(choice.is_some(), there, "{head_dim}, {element:?}");
            assert!(choice.is_none_or(|choice| choice.threads() == 384 && choice.rows() == 128));
        }
        let bf16 = shape(128, PageElement::Bf16);
        assert_eq!(Choice::wgmma(&bf16, HOPPER).unwrap().shared, 201_448);
        for limits in [AMPERE, ADA, Limits { capability: 100, ..HOPPER }, Limits { capability: 91, ..HOPPER }]
        {
            assert_eq!(Choice::wgmma(&bf16, limits), None);
        }
        assert_eq!(Choice::wgmma(&bf16, Limits { shared: 201_447, ..HOPPER }), None);
    }

    #[test]
    fn a_device_without_room_is_told() {
        let shape = PageShape { tokens: 64, kv_heads: 2, head_dim: 256, element: PageElement::F16 };
        let error = Choice::new(&shape, 128, Limits { capability: 80, shared: 48 << 10 }).unwrap_err();
        assert!(error.to_string().contains("head_dim"), "{error}");
    }
}
