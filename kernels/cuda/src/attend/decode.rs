//! Attention of few rows over pages, split along keys.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::architecture::shared_bytes_limit;
use crate::{Device, Error, Kernel, Launch, PageElement, PageShape, Source, Span};

const SOURCE: Source = Source {
    name: "attend_decode.cu",
    text: concat!(
        include_str!("../../source/attend_decode.cuh"),
        include_str!("../../source/attend_decode_f32.cuh"),
        include_str!("../../source/attend_decode_mma.cuh"),
        include_str!("../../source/attend_decode.cu"),
    ),
};
/// Keys that a warp takes at a time.
const KEYS: usize = 16;
/// Rows of a tile of matrix instructions.
const TILE_ROWS: usize = 8;

/// Keys of one sequence and the rows that ask for them; an entry of the table that a launch reads.
///
/// All heads visit the same pages, or each KV head its own (`page_stride`). Positions hide keys that come after a row; where pages were
/// chosen, `first_key` is such that all keys lie at or before the row: `first_position + 1 - keys`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct DecodeItem {
    /// Position of the first row.
    pub first_position: u64,
    /// Position of the first key; the others follow it.
    pub first_key: u64,
    /// Device address of the partials, in the form in which they travel: f32 `[rows][query_heads][2 + head_dim]`.
    pub output: u64,
    /// First row among the queries.
    pub query: u32,
    /// Rows.
    pub rows: u32,
    /// First entry in the page table; pages are full but for the last.
    pub page: u32,
    /// Entries from one KV head's pages to the next's, or 0.
    pub page_stride: u32,
    /// Keys.
    pub keys: u32,
    /// Always 0.
    pub unused: u32,
}

/// Places and sizes of a launch.
#[derive(Debug, Clone, Copy)]
pub struct DecodeCall<'a> {
    /// f32 `[rows][query_heads][head_dim]`, rotated.
    pub queries: Span<'a>,
    /// Table of u64 page addresses.
    pub pages: Span<'a>,
    /// Table of [`DecodeItem`]s.
    pub items: Span<'a>,
    /// Items in it.
    pub count: usize,
    /// Most rows of any item.
    pub most_rows: usize,
    /// Softmax scale, normally `1 / sqrt(head_dim)`.
    pub scale: f32,
}

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    queries: u64,
    pages: u64,
    items: u64,
    kv_heads: u32,
    group: u32,
    token_bits: u32,
    scale: f32,
}

/// Keys of one split of a sequence of `keys` keys: fixed by the length alone, so that what else is in a batch changes no bit, and a
/// multiple of any page. About 8 to 256 splits up to a million keys, which keeps a GPU busy from 4K keys (of 8 KV heads) on.
pub fn split_keys(keys: u64) -> u64 {
    match keys {
        0..=4_096 => 256,
        4_097..=16_384 => 512,
        16_385..=131_072 => 1_024,
        131_073..=524_288 => 2_048,
        _ => 4_096,
    }
}

/// Compile-time choices of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    warps: usize,
    stages: usize,
    row_tiles: usize,
    resident: usize,
    shared: usize,
}

impl Plan {
    /// The most copies under way with two thread blocks on a multiprocessor; where not even few fit, one.
    fn new(shape: &PageShape, row_tiles: usize, limit: usize) -> Result<Self, Error> {
        let plans = [(4, 4), (4, 3), (2, 4), (2, 3), (4, 2)].map(|(warps, stages)| (warps, stages, 2));
        let rest = [(4, 4), (4, 3), (4, 2), (2, 4), (2, 3), (2, 2), (1, 2)];
        let plans = plans.into_iter().chain(rest.map(|(warps, stages)| (warps, stages, 1)));
        let mut plans = plans.map(|(warps, stages, resident)| {
            let shared = shared_bytes(shape, warps, stages, row_tiles);
            Self { warps, stages, row_tiles, resident, shared }
        });
        // With four warps E4M3 at large heads takes more registers than there are (sm_100).
        let most_warps = if shape.element == PageElement::E4m3 && shape.head_dim > 128 { 2 } else { 4 };
        // A kilobyte of each thread block is the system's.
        plans
            .find(|plan| plan.warps <= most_warps && (plan.shared + 1024) * plan.resident <= limit + 1024)
            .ok_or_else(|| {
                let least = shared_bytes(shape, 1, 2, row_tiles);
                let problem = format!(
                    "of {} needs {least} bytes of shared memory, the device has {limit}",
                    shape.head_dim
                );
                Error::Invalid { field: "head_dim", problem }
            })
    }

    fn kernel(&self, shape: &PageShape) -> Kernel {
        let constants = vec![
            ("DTYPE", shape.element.constant()),
            ("HEAD_DIM", shape.head_dim as i64),
            ("RESIDENT", self.resident as i64),
            ("ROW_TILES", self.row_tiles as i64),
            ("STAGES", self.stages as i64),
            ("WARPS", self.warps as i64),
        ];
        Kernel { source: SOURCE, entry: "attend_decode", constants }
    }
}

/// Shared memory of a thread block: the stages of its warps, and, instead of them at the end, their results.
fn shared_bytes(shape: &PageShape, warps: usize, stages: usize, row_tiles: usize) -> usize {
    let vectors = shape.head_dim * shape.element.bytes() / 16;
    let scales = if shape.element.is_scaled() { 2 * KEYS * size_of::<f32>() } else { 0 };
    let stage = 2 * KEYS * (vectors | 1) * 16 + scales;
    let rows = row_tiles * TILE_ROWS;
    let own = match shape.element {
        PageElement::F32 => rows * shape.head_dim + warps * (KEYS * rows + rows),
        _ => 0,
    };
    let results = warps * rows * (2 + shape.head_dim + 4);
    (warps * stages * stage + own * size_of::<f32>()).max(results * size_of::<f32>())
}

/// Row tiles for more than 8 packed rows: where registers do not hold two, rows take more passes.
fn most_row_tiles(shape: &PageShape) -> usize {
    if shape.element == PageElement::F32 || shape.head_dim > 128 { 1 } else { 2 }
}

/// Kernels for the head sizes of models as they are planned on devices of some compute capability. f16, which differs from bf16 in
/// instructions of the same number and registers, and E4M3, which differs from int8 by a conversion, at the largest.
pub(super) fn kernels(capability: u32) -> Vec<Kernel> {
    let limit = shared_bytes_limit(capability);
    let mut kernels = Vec::new();
    for element in PageElement::ALL {
        for head_dim in PageShape::HEAD_DIMS {
            if matches!(element, PageElement::F16 | PageElement::E4m3) && head_dim < 128 {
                continue;
            }
            let shape = PageShape { tokens: 64, kv_heads: 8, head_dim, element };
            for row_tiles in 1..=most_row_tiles(&shape) {
                let plan = Plan::new(&shape, row_tiles, limit);
                kernels.extend(plan.map(|plan| plan.kernel(&shape)));
            }
        }
    }
    kernels
}

/// Attention of few rows over pages of one shape, which gives partials.
#[derive(Debug)]
pub struct DecodeAttention {
    device: Arc<dyn Device>,
    shape: PageShape,
    group: usize,
    /// For up to 8 packed rows, and for more.
    few: (Plan, Kernel),
    many: (Plan, Kernel),
}

impl DecodeAttention {
    /// For `group` query heads per KV head, 1 to 1,024. Refuses what the device has no shared memory for.
    pub fn new(device: &Arc<dyn Device>, shape: PageShape, group: usize) -> Result<Self, Error> {
        shape.validate()?;
        if !(1..=1024).contains(&group) {
            return Err(Error::Invalid {
                field: "group",
                problem: format!("is {group}, must be from 1 to 1024"),
            });
        }
        let plan = |row_tiles| {
            let plan = Plan::new(&shape, row_tiles, device.shared_bytes_limit())?;
            Ok::<_, Error>((plan, plan.kernel(&shape)))
        };
        let many = plan(most_row_tiles(&shape))?;
        Ok(Self { device: Arc::clone(device), shape, group, few: plan(1)?, many })
    }

    /// Queues a launch: partials of every item.
    pub fn launch(&self, call: &DecodeCall<'_>) -> Result<(), Error> {
        if call.count == 0 || call.most_rows == 0 {
            return Ok(());
        }
        if !call.scale.is_finite() {
            let problem = format!("is {}, must be finite", call.scale);
            return Err(Error::Invalid { field: "scale", problem });
        }
        let packed = call.most_rows * self.group;
        let (plan, kernel) = if packed <= TILE_ROWS { &self.few } else { &self.many };
        let passes = packed.div_ceil(plan.row_tiles * TILE_ROWS);
        if passes > u16::MAX as usize {
            let problem = format!("are up to {} of an item, must be fewer", call.most_rows);
            return Err(Error::Invalid { field: "rows", problem });
        }
        let row = [call.most_rows, self.shape.kv_heads * self.group, self.shape.head_dim];
        let params = Params {
            queries: call.queries.for_kernel("queries", &row, size_of::<f32>())?,
            pages: call.pages.address(),
            items: call.items.for_kernel("items", &[call.count], size_of::<DecodeItem>())?,
            kv_heads: self.shape.kv_heads as u32,
            group: self.group as u32,
            token_bits: self.shape.tokens.ilog2(),
            scale: call.scale * std::f32::consts::LOG2_E,
        };
        let grid = [call.count as u32, self.shape.kv_heads as u32, passes as u32];
        let launch = Launch::new(kernel, grid, (plan.warps * 32) as u32, &params);
        self.device.launch(&launch.shared(plan.shared as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::{Plan, kernels, most_row_tiles, split_keys};
    use crate::architecture::shared_bytes_limit;
    use crate::{PageElement, PageShape};

    #[test]
    fn splits_are_whole_pages_and_few() {
        let mut keys = 1;
        while keys <= 1 << 21 {
            let split = split_keys(keys);
            assert!(
                split.is_multiple_of(256) && keys.div_ceil(split) <= 512,
                "{keys} keys in splits of {split}"
            );
            keys += 1 + keys / 7;
        }
    }

    #[test]
    fn kernels_are_listed_as_they_are_launched() {
        let listed = [80, 86, 90].map(kernels);
        for (listed, capability) in listed.iter().zip([80, 86, 90]) {
            let limit = shared_bytes_limit(capability);
            for head_dim in [64, 80, 96, 128, 256] {
                for element in [PageElement::F32, PageElement::Bf16, PageElement::Int8] {
                    let shape = PageShape { tokens: 64, kv_heads: 8, head_dim, element };
                    for row_tiles in 1..=most_row_tiles(&shape) {
                        let kernel = Plan::new(&shape, row_tiles, limit).unwrap().kernel(&shape);
                        assert!(listed.contains(&kernel), "{capability}: {kernel:?}");
                    }
                }
            }
        }
        // Fewer warps or stages where there is less memory.
        assert!(listed[0] != listed[1] && listed[1] != listed[2] && listed[0] != listed[2]);
    }

    #[test]
    fn every_shape_has_a_plan() {
        for limit in [99 << 10, 163 << 10, 227 << 10] {
            for element in PageElement::ALL {
                for head_dim in [16, 64, 80, 96, 128, 256] {
                    let shape = PageShape { tokens: 64, kv_heads: 8, head_dim, element };
                    let plan = Plan::new(&shape, 1, limit).unwrap();
                    assert!(plan.shared <= limit && plan.stages >= 2, "{shape:?}: {plan:?}");
                }
            }
        }
        let shape = PageShape { tokens: 64, kv_heads: 8, head_dim: 128, element: PageElement::Bf16 };
        let plan = Plan::new(&shape, 1, 227 << 10).unwrap();
        assert_eq!((plan.warps, plan.stages, plan.resident), (4, 3, 2), "two thread blocks, three stages");
        assert!(Plan::new(&shape, 1, 10 << 10).unwrap_err().to_string().contains("head_dim"));
    }
}
