//! What lists visit, in the form that the kernels read.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use longshore_attention::{ExactBlock, SparseWork, Visit, WorkList};

use super::plan::List;
use super::{PrefillCall, invalid};
use crate::{Error, PageShape};

const BLOCK: u32 = 0;
const COLUMNS: u32 = 1;
const MEANS: u32 = 2;

/// Some keys that are visited at once; as in `visits.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct KeyVisit {
    what: u32,
    first: u32,
    keys: u64,
}

impl KeyVisit {
    fn new(kind: u32, count: u64, first: u64, keys: u64) -> Self {
        Self { what: kind << 16 | count as u32, first: first as u32, keys }
    }
}

/// A gathered key; as in `attend_lists.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct KeyColumn {
    /// Address of its K of KV head 0.
    pub row: u64,
    /// Absolute position.
    pub position: u64,
}

/// Something that a list visits, of any length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Run {
    /// Keys that follow each other in the page table and in position.
    Keys { first: u64, count: u64, position: u64 },
    /// Columns.
    Columns { first: u64, count: u64 },
    /// Means: up to 64, counted through the table of their pages, by the bits of `keys`.
    Means { first: u64, keys: u64 },
}

/// What the rows of query tiles visit.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KeyLists {
    kv_heads: usize,
    /// Rows (positions) of each tile.
    tiles: Vec<Range<usize>>,
    /// `[kv_heads][tiles]`: runs of each list.
    lists: Vec<Range<usize>>,
    runs: Vec<Run>,
    columns: Vec<KeyColumn>,
    column_bias: Vec<f32>,
    /// Pages and pages of means that are named, at most.
    pages_end: usize,
    means_end: u64,
}

impl KeyLists {
    /// The lists of a [`SparseWork`], over pages at these addresses. Of a list, blocks are folded first, then columns, then means, each in
    /// their order: what lies side by side is visited together, whatever stripes it is of. Refuses columns of pages that are not there.
    pub fn of_sparse(
        work: &SparseWork,
        shape: &PageShape,
        pages: &[u64],
        mean_tokens: usize,
    ) -> Result<Self, Error> {
        let mut lists = Self {
            kv_heads: work.kv_heads(),
            tiles: (0..work.tiles()).map(|tile| work.rows(tile)).collect(),
            ..Self::default()
        };
        for column in work.columns() {
            lists.columns.push(column_of(shape, pages, (column.tile, column.offset), column.position)?);
        }
        for kv_head in 0..work.kv_heads() {
            for tile in 0..work.tiles() {
                lists.add(work.list(kv_head, tile), shape, mean_tokens);
            }
        }
        Ok(lists)
    }

    /// One list for all `rows` and KV heads: the blocks and columns of a [`WorkList`], whose summaries are left out.
    pub fn of_work(work: &WorkList, shape: &PageShape, pages: &[u64], rows: usize) -> Result<Self, Error> {
        let tiles = (rows > 0).then_some(0..rows).into_iter().collect();
        let mut lists = Self { kv_heads: shape.kv_heads, tiles, ..Self::default() };
        for block in &work.exact {
            lists.block(block, shape);
        }
        for column in &work.columns {
            lists.columns.push(column_of(shape, pages, (column.tile, column.offset), column.position)?);
        }
        lists.column_bias.clone_from(&work.column_bias);
        if !work.columns.is_empty() {
            lists.runs.push(Run::Columns { first: 0, count: work.columns.len() as u64 });
        }
        let all = 0..lists.runs.len();
        lists.lists = vec![all; lists.tiles.len() * shape.kv_heads];
        Ok(lists)
    }

    fn add(&mut self, visits: &[Visit], shape: &PageShape, mean_tokens: usize) {
        let start = self.runs.len();
        let (mut columns, mut means) = (Vec::new(), Vec::new());
        for visit in visits {
            match *visit {
                Visit::Block(block) => self.block(&block, shape),
                Visit::Columns { first, count } => add_columns(&mut columns, first.into(), count.into()),
                Visit::Means { tile, first, keys } => {
                    self.means_end = self.means_end.max(u64::from(tile) + 1);
                    add_means(&mut means, u64::from(tile) * mean_tokens as u64 + u64::from(first), keys);
                }
                Visit::EndOfStripe => {}
            }
        }
        self.runs.extend(columns);
        self.runs.extend(means);
        self.lists.push(start..self.runs.len());
    }

    /// Keys that go on where the last ended are one run with them.
    fn block(&mut self, block: &ExactBlock, shape: &PageShape) {
        self.pages_end = self.pages_end.max(block.tile as usize + 1);
        let first = u64::from(block.tile) * shape.tokens as u64;
        let (count, position) = (u64::from(block.len), block.first_position);
        let begun = self.lists.last().map_or(0, |list| list.end);
        if let Some(Run::Keys { first: before, count: so_far, position: from }) =
            self.runs[begun..].last_mut()
            && *before + *so_far == first
            && *from + *so_far == position
        {
            *so_far += count;
            return;
        }
        self.runs.push(Run::Keys { first, count, position });
    }

    /// Rows (positions) of each tile.
    pub(super) fn rows(&self) -> impl Iterator<Item = &Range<usize>> {
        self.tiles.iter()
    }

    pub(super) fn columns(&self) -> &[KeyColumn] {
        &self.columns
    }

    pub(super) fn column_bias(&self) -> &[f32] {
        &self.column_bias
    }

    /// Refuses lists that do not belong to a call.
    pub(super) fn check(&self, call: &PrefillCall<'_>, shape: &PageShape) -> Result<(), Error> {
        if self.kv_heads != shape.kv_heads {
            let problem = format!("is {} in the lists, {} in the pages", self.kv_heads, shape.kv_heads);
            return Err(invalid("kv_heads", problem));
        }
        if let Some(rows) = self.tiles.last().filter(|rows| rows.end > call.rows) {
            return Err(invalid("lists", format!("end at row {}, there are {}", rows.end, call.rows)));
        }
        if self.means_end > 0 && call.means.is_none() {
            return Err(invalid("means", "are visited, there are none".to_owned()));
        }
        call.pages.for_kernel("pages", &[self.pages_end], size_of::<u64>())?;
        if let Some(means) = call.means {
            means.pages.for_kernel("means", &[self.means_end as usize], size_of::<u64>())?;
        }
        if !self.column_bias.is_empty() && self.column_bias.len() != self.columns.len() {
            let (bias, columns) = (self.column_bias.len(), self.columns.len());
            return Err(invalid("column_bias", format!("has {bias} elements, there are {columns} columns")));
        }
        let keys = (self.pages_end as u64).saturating_mul(shape.tokens as u64);
        let means = call.means.map_or(0, |means| self.means_end.saturating_mul(means.tokens as u64));
        if keys.max(means).max(self.columns.len() as u64) > u64::from(u32::MAX) {
            return Err(invalid("lists", "name more than 2^32 keys".to_owned()));
        }
        Ok(())
    }

    /// The lists in visits of up to `keys` keys, without those that no row sees.
    pub(super) fn cut(
        &self,
        keys: usize,
        group: u32,
        first_position: u64,
        page_tokens: usize,
    ) -> (Vec<KeyVisit>, Vec<List>) {
        let (mut visits, mut lists) = (Vec::new(), Vec::new());
        for (index, runs) in self.lists.iter().enumerate() {
            let rows = &self.tiles[index % self.tiles.len()];
            let end = first_position + rows.end as u64;
            let first_visit = visits.len();
            for run in &self.runs[runs.clone()] {
                cut(run, keys as u64, end, page_tokens as u64, &mut visits);
            }
            lists.push(List {
                kv_head: (index / self.tiles.len()) as u32,
                first_row: rows.start as u32 * group,
                rows: rows.len() as u32 * group,
                first_visit: first_visit as u64,
                visits: (visits.len() - first_visit) as u32,
            });
        }
        (visits, lists)
    }
}

impl KeyLists {
    /// Lists without visits for the rows after all tiles, so that their result is written too.
    pub(super) fn uncovered(&self, rows: usize, group: u32) -> impl Iterator<Item = List> {
        let end = self.tiles.last().map_or(0, |tile| tile.end);
        let heads = if end < rows { self.kv_heads as u32 } else { 0 };
        let (first_row, rows) = (end as u32 * group, rows.saturating_sub(end) as u32 * group);
        (0..heads).map(move |kv_head| List { kv_head, first_row, rows, first_visit: 0, visits: 0 })
    }
}

fn column_of(
    shape: &PageShape,
    pages: &[u64],
    (tile, offset): (u32, u32),
    position: u64,
) -> Result<KeyColumn, Error> {
    let page = pages.get(tile as usize).filter(|_| (offset as usize) < shape.tokens);
    let Some(page) = page else {
        let problem =
            format!("visits key {offset} of page {tile}, there are {} of {}", pages.len(), shape.tokens);
        return Err(invalid("columns", problem));
    };
    let row = shape.head_dim * shape.element.bytes();
    Ok(KeyColumn { row: page + u64::from(offset) * row as u64, position })
}

/// Columns that follow the last are one run with them.
fn add_columns(runs: &mut Vec<Run>, first: u64, count: u64) {
    if let Some(Run::Columns { first: before, count: so_far }) = runs.last_mut()
        && *before + *so_far == first
    {
        *so_far += count;
        return;
    }
    runs.push(Run::Columns { first, count });
}

/// Means that lie within 64 from the first of the last are one run with them.
fn add_means(runs: &mut Vec<Run>, first: u64, keys: u64) {
    let end = first + u64::from(u64::BITS - keys.leading_zeros());
    if let Some(Run::Means { first: before, keys: so_far }) = runs.last_mut()
        && *before <= first
        && end - *before <= u64::from(u64::BITS)
        && *so_far & keys << (first - *before) == 0
    {
        *so_far |= keys << (first - *before);
        return;
    }
    runs.push(Run::Means { first, keys });
}

/// Pieces of a run, as far as rows before the position `end` see it.
fn cut(run: &Run, keys: u64, end: u64, page_tokens: u64, visits: &mut Vec<KeyVisit>) {
    match *run {
        Run::Keys { first, count, position } => {
            let count = count.min(end.saturating_sub(position));
            let mut at = 0;
            while at < count {
                // Where pages are long enough, a piece lies in one.
                let whole = if page_tokens < keys { keys } else { keys - (first + at) % keys };
                let piece = whole.min(count - at);
                visits.push(KeyVisit::new(BLOCK, piece, first + at, position + at));
                at += piece;
            }
        }
        Run::Columns { first, count } => {
            for at in (0..count).step_by(keys as usize) {
                visits.push(KeyVisit::new(COLUMNS, keys.min(count - at), first + at, 0));
            }
        }
        Run::Means { first, keys: bits } => {
            for at in (0..u64::from(u64::BITS)).step_by(keys as usize) {
                let own = bits >> at & (u64::MAX >> (u64::from(u64::BITS) - keys));
                if own != 0 {
                    let count = u64::from(u64::BITS - own.leading_zeros());
                    visits.push(KeyVisit::new(MEANS, count, first + at, own));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
