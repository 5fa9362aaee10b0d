//! Attention of many rows: dense and causal, or over lists.

mod choice;
mod counted;
mod lists;
mod plan;

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use longshore_attention::HeadShape;

use crate::{Buffer, Device, Error, Launch, MergeItem, PageElement, PageShape, PartialMerger, Span};
use choice::{Choice, Limits};
use plan::{Cut, Item, List, Plan};

pub(crate) use choice::kernels;
pub use counted::{CountedLists, CountedTile};
pub use lists::{KeyColumn, KeyLists, KeyVisit};

/// Merges of one launch, at most.
const MERGES_MAX: usize = u16::MAX as usize;
/// Visits of a part of a list, at least: fewer are not worth a merge.
const PART_VISITS_MIN: u64 = 8;
/// And at most: matrix units are said not to round to nearest where they add, and errors of one sign grow with the visits that are added up
/// one after the other. Merges of parts do round to nearest. Of 64 keys these are 131,072 keys, and 8,192 additions to an output.
const PART_VISITS_MAX: u64 = 2048;
/// Rows that a warp group takes.
const GROUP_ROWS: usize = 64;

/// Means that lists may visit.
#[derive(Debug, Clone, Copy)]
pub struct MeanPages<'a> {
    /// Table of u64 addresses of pages of means, in the layout and the type of the pages of keys.
    pub pages: Span<'a>,
    /// Means of such a page; a power of two from 16 to 256.
    pub tokens: usize,
    /// Keys that a mean stands for.
    pub weight: usize,
}

/// Places and sizes of a call.
#[derive(Debug, Clone, Copy)]
pub struct PrefillCall<'a> {
    /// f32 `[rows][query_heads][head_dim]`, rotated; rounded to the type of the keys as they are read.
    pub queries: Span<'a>,
    /// Query rows (positions).
    pub rows: usize,
    /// Position of row 0.
    pub first_position: u64,
    /// Softmax scale, normally `1 / sqrt(head_dim)`; above 0.
    pub scale: f32,
    /// Table of u64 page addresses. Keys and values that are visited must be finite, but for rows after all query rows.
    pub pages: Span<'a>,
    /// Means, where lists visit any.
    pub means: Option<MeanPages<'a>>,
    /// Partial of earlier keys, f32 records `[rows][query_heads][2 + head_dim]`, where there are any.
    pub earlier: Option<Span<'a>>,
    /// Such records, or, divided, f32 `[rows][query_heads][head_dim]`.
    pub output: Span<'a>,
    /// Whether the output is divided by the sums: attention, 0 where there was no key.
    pub divide: bool,
    /// See [`longshore_attention::SparseItem::skip_below`]; here 32 rows leave out a block together, or none does.
    pub skip_below: Option<f32>,
}

/// Keys of the first pages of the table, in order, that rows see up to their own position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DenseKeys {
    /// Position of the first key.
    pub first_position: u64,
    /// How many there are.
    pub count: u64,
}

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    queries: u64,
    pages: u64,
    means: u64,
    items: u64,
    visits: u64,
    columns: u64,
    column_bias: u64,
    earlier: u64,
    output: u64,
    parts: u64,
    first_position: u64,
    dense_position: u64,
    dense_keys: u64,
    scale: f32,
    mean_bias: f32,
    skip_below: f32,
    kv_heads: u32,
    group: u32,
    page_shift: u32,
    mean_page_shift: u32,
    divided: u32,
}

/// Attention of many rows over pages of one shape.
#[derive(Debug)]
pub struct PrefillAttention {
    device: Arc<dyn Device>,
    shape: PageShape,
    heads: HeadShape,
    scalar: bool,
    /// Packed rows of a list from which on warp groups take it; `None`: they take none.
    wgmma_rows: Option<usize>,
    part_visits: Option<u64>,
    merger: PartialMerger,
}

impl PrefillAttention {
    /// Over pages of `shape`, with `group` query heads for each KV head: on matrix units, f32 pages without. Refuses 8-bit pages.
    pub fn new(device: &Arc<dyn Device>, shape: &PageShape, group: usize) -> Result<Self, Error> {
        shape.validate()?;
        if shape.element.is_scaled() {
            let problem = format!("is {:?}, prefill needs f32, f16 or bf16", shape.element);
            return Err(invalid("element", problem));
        }
        if !(1..=1024).contains(&group) {
            return Err(invalid("group", format!("is {group}, must be from 1 to 1024")));
        }
        let heads = HeadShape { kv_heads: shape.kv_heads, group, head_dim: shape.head_dim };
        let scalar = shape.element == PageElement::F32;
        let merger = PartialMerger::new(device, shape.head_dim, PageElement::F32)?;
        Ok(Self {
            device: Arc::clone(device),
            shape: *shape,
            heads,
            scalar,
            wgmma_rows: None,
            part_visits: None,
            merger,
        })
    }

    /// The same without matrix units and without rounding anything: the reference of the device, slow.
    #[must_use]
    pub fn scalar(self) -> Self {
        Self { scalar: true, ..self }
    }

    /// By warp groups (`wgmma`) where the device has them (compute capability 9.0) and the heads have 64 or 128 elements of 16 bits; else as
    /// without. Lists of up to 64 packed rows too stay as without: one of the two groups that compute would have none. Never run on a GPU, so
    /// nothing asks for it that was not told to.
    #[must_use]
    pub fn with_wgmma(self, wgmma: bool) -> Self {
        Self { wgmma_rows: wgmma.then_some(GROUP_ROWS + 1), ..self }
    }

    /// The same whatever the rows: for comparisons.
    #[must_use]
    pub(crate) fn with_wgmma_always(self) -> Self {
        Self { wgmma_rows: Some(0), ..self }
    }

    /// Cuts lists of more than `visits` visits, whatever the device.
    #[must_use]
    pub fn with_part_visits(self, visits: u64) -> Self {
        Self { part_visits: Some(visits.max(1)), ..self }
    }

    /// Queues the attention of all rows over `keys`.
    pub fn dense(&self, call: &PrefillCall<'_>, keys: DenseKeys) -> Result<(), Error> {
        self.check(call)?;
        if keys.count > u64::from(u32::MAX) {
            return Err(invalid("keys", format!("are {}, at most {}", keys.count, u32::MAX)));
        }
        let packed = (call.rows * self.heads.group) as u32;
        let choice = self.choice(packed as usize)?;
        let lists = (0..self.heads.kv_heads as u32).flat_map(|kv_head| {
            let tiles = (0..packed).step_by(choice.rows());
            tiles.map(move |first_row| {
                let rows = (packed - first_row).min(choice.rows() as u32);
                let last = call.first_position + u64::from((first_row + rows - 1) / self.heads.group as u32);
                let seen = (last + 1).saturating_sub(keys.first_position).min(keys.count);
                List {
                    kv_head,
                    first_row,
                    rows,
                    first_visit: 0,
                    visits: seen.div_ceil(choice.keys as u64) as u32,
                }
            })
        });
        let params =
            Params { dense_position: keys.first_position, dense_keys: keys.count, ..self.params(call)? };
        let pages = keys.count.div_ceil(self.shape.tokens as u64) as usize;
        call.pages.for_kernel("pages", &[pages], size_of::<u64>())?;
        self.run(call, &choice, &lists.collect::<Vec<_>>(), params, plan::DENSE)
    }

    /// Queues the attention of the rows of `lists`; rows without a list keep `earlier`, or see nothing.
    pub fn lists(&self, call: &PrefillCall<'_>, lists: &KeyLists) -> Result<(), Error> {
        self.check(call)?;
        lists.check(call, &self.shape)?;
        let group = self.heads.group as u32;
        let packed = lists.rows().map(|rows| rows.len() * self.heads.group).max().unwrap_or(1);
        let choice = self.choice(packed)?;
        let (visits, mut lists_of) = lists.cut(choice.keys, group, call.first_position, self.shape.tokens);
        lists_of.extend(lists.uncovered(call.rows, group));
        let upload = |bytes: &[u8]| Buffer::from_slice(&self.device, bytes);
        let visits = upload(bytemuck::cast_slice(&visits))?;
        let columns = upload(bytemuck::cast_slice(lists.columns()))?;
        let bias = upload(bytemuck::cast_slice(lists.column_bias()))?;
        let mut params = self.params(call)?;
        (params.visits, params.columns) = (visits.address(), columns.address());
        params.column_bias = if lists.column_bias().is_empty() { 0 } else { bias.address() };
        self.run(call, &choice, &lists_of, params, 0)
    }

    fn choice(&self, packed_rows: usize) -> Result<Choice, Error> {
        if self.scalar {
            return Ok(Choice::scalar(&self.shape));
        }
        let limits = Limits::of(&*self.device);
        let by_groups = self.wgmma_rows.is_some_and(|least| packed_rows >= least);
        match Choice::wgmma(&self.shape, limits).filter(|_| by_groups) {
            Some(choice) => Ok(choice),
            None => Choice::new(&self.shape, packed_rows, limits),
        }
    }

    fn check(&self, call: &PrefillCall<'_>) -> Result<(), Error> {
        // Smaller ones would make the bias of a key infinite in units of scores.
        if !(call.scale.is_finite() && call.scale >= f32::from_bits(0x2b80_0000)) {
            return Err(invalid("scale", format!("is {}, a device needs 2^-40 or more", call.scale)));
        }
        let pairs =
            call.rows.checked_mul(self.heads.query_heads()).filter(|&pairs| u32::try_from(pairs).is_ok());
        if pairs.is_none() {
            return Err(invalid("rows", format!("are {}, too many for one call", call.rows)));
        }
        if call.first_position.checked_add(call.rows as u64).is_none() {
            return Err(invalid("first_position", format!("is {}, too large", call.first_position)));
        }
        match call.skip_below {
            Some(limit) if !(limit > 0.0 && limit.is_finite()) => {
                Err(invalid("skip_below", format!("is {limit}, must be positive and finite")))
            }
            _ => Ok(()),
        }
    }

    fn params(&self, call: &PrefillCall<'_>) -> Result<Params, Error> {
        let (pairs, dim) = (call.rows * self.heads.query_heads(), self.heads.head_dim);
        let records = |records: Span<'_>| records.for_kernel("earlier", &[pairs, 2 + dim], size_of::<f32>());
        let width = if call.divide { dim } else { 2 + dim };
        Ok(Params {
            queries: call.queries.for_kernel("queries", &[pairs, dim], size_of::<f32>())?,
            pages: call.pages.address(),
            means: call.means.map_or(0, |means| means.pages.address()),
            earlier: call.earlier.map(records).transpose()?.unwrap_or(0),
            output: call.output.for_kernel("output", &[pairs, width], size_of::<f32>())?,
            first_position: call.first_position,
            scale: call.scale * std::f32::consts::LOG2_E,
            mean_bias: call.means.map_or(0.0, |means| (means.weight as f32).log2()),
            skip_below: call.skip_below.unwrap_or(f32::INFINITY),
            kv_heads: self.heads.kv_heads as u32,
            group: self.heads.group as u32,
            page_shift: self.shape.tokens.ilog2(),
            mean_page_shift: call.means.map_or(4, |means| means.tokens.ilog2()),
            divided: call.divide.into(),
            ..Params::zeroed()
        })
    }

    fn run(
        &self,
        call: &PrefillCall<'_>,
        choice: &Choice,
        lists: &[List],
        params: Params,
        flags: u32,
    ) -> Result<(), Error> {
        let part_visits = self.part_visits(choice, lists);
        self.queue(call, choice, &plan::plan(lists, choice.rows() as u32, part_visits, flags), params, None)
    }

    /// Visits of a part: about two waves of thread blocks where there is work for them and sums do not become too long.
    fn part_visits(&self, choice: &Choice, lists: &[List]) -> u64 {
        let slots = (self.device.multiprocessors() * choice.blocks) as u64;
        let all: u64 = lists.iter().map(|list| u64::from(list.visits)).sum();
        self.part_visits.unwrap_or_else(|| usual_part_visits(all, slots))
    }

    /// Queues the items of a plan and the merges of what it cut; `offsets`: items name lists that begin there ([`plan::counted`]).
    fn queue(
        &self,
        call: &PrefillCall<'_>,
        choice: &Choice,
        Plan { items, cuts, part_rows }: &Plan,
        mut params: Params,
        offsets: Option<Span<'_>>,
    ) -> Result<(), Error> {
        if items.is_empty() {
            return Ok(());
        }
        let record = (2 + self.heads.head_dim) * size_of::<f32>();
        let parts = Buffer::new(&self.device, *part_rows as usize * record)?;
        let table = Buffer::from_slice::<Item>(&self.device, items)?;
        if let Some(offsets) = offsets {
            counted::place(&self.device, table.whole(), items.len(), offsets)?;
        }
        (params.items, params.parts) = (table.address(), parts.address());
        let kernel = choice.kernel(&self.shape);
        let launch = Launch::new(&kernel, [items.len() as u32, 1, 1], choice.threads(), &params);
        self.device.launch(&launch.shared(choice.shared as u32))?;
        self.merge(call, cuts, parts.address())
    }

    /// Queues the merges of lists that were cut. The rows of a position lie side by side, those of the next do not follow.
    fn merge(&self, call: &PrefillCall<'_>, cuts: &[Cut], parts: u64) -> Result<(), Error> {
        if cuts.is_empty() {
            return Ok(());
        }
        let (group, record) = (self.heads.group, (2 + self.heads.head_dim) * size_of::<f32>());
        let width = if call.divide { record - 2 * size_of::<f32>() } else { record };
        let (mut items, mut sources) = (Vec::new(), Vec::new());
        for cut in cuts {
            let end = (cut.first_row + cut.rows) as usize;
            let mut row = cut.first_row as usize;
            while row < end {
                let next = ((row / group + 1) * group).min(end);
                let pair =
                    row / group * self.heads.query_heads() + cut.kv_head as usize * group + row % group;
                items.push(MergeItem {
                    output: call.output.address() + (pair * width) as u64,
                    first_source: sources.len() as u32,
                    sources: cut.parts,
                    records: (next - row) as u32,
                    unused: 0,
                });
                let within = row - cut.first_row as usize;
                sources.extend((0..cut.parts as usize).map(|part| {
                    let at = cut.part as usize + part * cut.rows as usize + within;
                    parts + (at * record) as u64
                }));
                row = next;
            }
        }
        let sources = Buffer::from_slice(&self.device, &sources)?;
        for items in items.chunks(MERGES_MAX) {
            let table = Buffer::from_slice(&self.device, items)?;
            let (table, sources) = (table.whole(), sources.whole());
            if call.divide {
                self.merger.merge_and_finish(table, sources, items.len(), group)?;
            } else {
                self.merger.merge(table, sources, items.len(), group)?;
            }
        }
        Ok(())
    }
}

/// Visits of a part of lists of `all` visits together, where so many thread blocks are on the device at once.
fn usual_part_visits(all: u64, slots: u64) -> u64 {
    (all / (2 * slots)).clamp(PART_VISITS_MIN, PART_VISITS_MAX)
}

fn invalid(field: &'static str, problem: String) -> Error {
    Error::Invalid { field, problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_worth_a_merge_and_no_longer_than_sums_are_exact() {
        let slots = 2 * 132;
        assert_eq!(usual_part_visits(0, slots), 8);
        assert_eq!(usual_part_visits(1000 * 2 * slots, slots), 1000);
        // A million keys before each of 8 heads' 8,192 packed rows.
        assert_eq!(usual_part_visits(8 * 64 * (1 << 20) / 64, slots), 2048);
    }
}
