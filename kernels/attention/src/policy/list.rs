//! Writes down what a query tile visits, stripe by stripe.

use std::ops::Range;

use crate::{Column, ExactBlock, Visit};

use super::grid::{Grid, TileRows};

/// Blocks of which a [`Visit::Means`] tells, at most.
const WINDOW: usize = 64;

/// What one KV head of a query tile visits.
#[derive(Debug, Clone, Default)]
pub(super) struct Chosen {
    /// Which blocks, from block 0 to the tile's last.
    pub(super) blocks: Vec<bool>,
    /// The first so many blocks enter as means when they are not visited.
    pub(super) means: usize,
    /// Positions of gathered keys, ascending; those of visited blocks do not count.
    pub(super) columns: Vec<u64>,
}

/// The visits and columns of a list.
pub(super) type List = (Vec<Visit>, Vec<Column>);

impl Chosen {
    /// No blocks but those that the tile lies in.
    pub(super) fn diagonal(grid: &Grid<'_>, tile: &TileRows) -> Self {
        let mut blocks = vec![false; grid.seen(tile)];
        blocks[grid.before(tile)..].fill(true);
        Self { blocks, means: 0, columns: Vec::new() }
    }

    /// All blocks up to the tile's last.
    pub(super) fn all(grid: &Grid<'_>, tile: &TileRows) -> Self {
        Self { blocks: vec![true; grid.seen(tile)], means: 0, columns: Vec::new() }
    }

    /// The list of a tile; blocks before the call's first are left out.
    pub(super) fn list(&self, grid: &Grid<'_>, tile: &TileRows) -> List {
        let mut list = List::default();
        let first = grid.input.first_block as usize;
        let (stripe, seen) = (grid.stripe as usize, self.blocks.len());
        let mut columns = &self.columns[..];
        for index in first / stripe..seen.div_ceil(stripe) {
            let blocks = first.max(index * stripe)..seen.min((index + 1) * stripe);
            let before = list.0.len();
            self.exact(grid, tile, blocks.clone(), &mut list);
            let here = columns.partition_point(|&column| column < blocks.end as u64 * grid.block);
            self.columns(grid, &columns[..here], blocks.clone(), &mut list);
            columns = &columns[here..];
            self.means(index * stripe, blocks, (index - first / stripe) as u32, &mut list);
            if list.0.len() > before {
                list.0.push(Visit::EndOfStripe);
            }
        }
        list
    }

    fn exact(&self, grid: &Grid<'_>, tile: &TileRows, blocks: Range<usize>, list: &mut List) {
        for block in blocks.filter(|&block| self.blocks[block]) {
            let first_position = block as u64 * grid.block;
            list.0.push(Visit::Block(ExactBlock {
                tile: (block as u64 - grid.input.first_block) as u32,
                first_position,
                len: grid.block.min(tile.last + 1 - first_position) as u32,
            }));
        }
    }

    fn columns(&self, grid: &Grid<'_>, columns: &[u64], blocks: Range<usize>, list: &mut List) {
        let start = list.1.len();
        list.1.extend(columns.iter().filter_map(|&position| {
            let block = (position / grid.block) as usize;
            let visit = blocks.contains(&block) && !self.blocks[block];
            visit.then(|| Column {
                tile: (block as u64 - grid.input.first_block) as u32,
                offset: (position % grid.block) as u32,
                position,
            })
        }));
        for first in (start..list.1.len()).step_by(grid.block as usize) {
            let count = (list.1.len() - first).min(grid.block as usize);
            list.0.push(Visit::Columns { first: first as u32, count: count as u32 });
        }
    }

    /// `stripe`: first block of the stripe, which is key 0 of its summaries.
    fn means(&self, stripe: usize, blocks: Range<usize>, tile: u32, list: &mut List) {
        let blocks = blocks.start..blocks.end.min(self.means);
        for window in (stripe..blocks.end).step_by(WINDOW) {
            let here = blocks.start.max(window)..blocks.end.min(window + WINDOW);
            let unvisited = here.filter(|&block| !self.blocks[block]);
            let keys = unvisited.fold(0_u64, |keys, block| keys | 1 << (block - window));
            if keys != 0 {
                list.0.push(Visit::Means { tile, first: (window - stripe) as u32, keys });
            }
        }
    }
}
