//! Who chooses blocks in the CPU's stead: a device on which queries and means may lie.

use std::ops::Range;

use crate::{Error, PagedKv, Queries};

use super::blocks::BlockPlanner;
use super::grid::{Grid, TileRows};
use super::list::{Chosen, List};
use super::{Blocks, Scorer, Selector};

/// Which blocks are kept, by their energies (log2 of what they weigh).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum BlockSelection {
    /// Those of the largest energy + log2 of this or more.
    Alpha(f32),
    /// The fewest, heaviest first, that reach this share of all weight; of equals the later.
    Mass(f32),
    /// The largest so many; of equals the later.
    TopK(usize),
}

/// What is to be chosen: for every KV head and query tile those of the blocks before the tile that it visits.
#[derive(Clone, Copy)]
pub struct BlockChoice<'a> {
    /// Query rows of the call.
    pub queries: Queries<'a>,
    /// Row of the first tile; its position is a multiple of 32.
    pub first_row: usize,
    /// Tiles of 32 rows, which follow each other.
    pub tiles: usize,
    /// Positions of a block.
    pub block_tokens: usize,
    /// Blocks that end before the last tile.
    pub blocks: usize,
    /// Means of the blocks from block 0 on, as in [`crate::PlanInput::summaries`].
    pub summaries: &'a dyn PagedKv,
    /// Blocks of a stripe.
    pub stripe_blocks: usize,
    /// Whether each row counts by its share among the blocks before the tile (scorer `row-normalised`) or as it is (`pooled`).
    pub normalise: bool,
    /// What is kept.
    pub selection: BlockSelection,
    /// The heaviest so many of it at most; what is kept besides does not count.
    pub most: usize,
    /// First blocks, kept whatever they weigh.
    pub sink: u64,
    /// Last blocks before the tile, kept likewise.
    pub local: u64,
    /// Blocks of which some row gives this share are kept likewise.
    pub peak: Option<f32>,
    /// `[kv_heads][blocks]`: kept likewise; empty: none.
    pub always: &'a [bool],
}

impl BlockChoice<'_> {
    /// Words of 32 blocks in a list of bits.
    pub fn words(&self) -> usize {
        self.blocks.div_ceil(32)
    }
}

impl std::fmt::Debug for BlockChoice<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockChoice")
            .field("first_row", &self.first_row)
            .field("tiles", &self.tiles)
            .field("blocks", &self.blocks)
            .field("selection", &self.selection)
            .finish_non_exhaustive()
    }
}

/// A call by a rule that [`BlockChooser`]s know: what is to be chosen, and what else its lists have. For a device that makes them itself
/// ([`super::PrefillPolicy::with_rule`]): of each KV head and tile the blocks that were chosen, and all from the end of those that it was
/// chosen from to the tile's last row.
#[derive(Debug)]
pub struct RuleCall<'a> {
    /// What is to be chosen for the tiles that are not exact; block 0 is tile 0 of the call.
    pub choice: BlockChoice<'a>,
    /// Rows of every query tile of the call, ascending.
    pub tiles: Vec<Range<usize>>,
    /// Which of them are not exact: those of the choice. The others visit everything up to themselves.
    pub chosen: Range<usize>,
    /// Whether means stand for the blocks before a tile that it does not visit.
    pub correction: bool,
}

/// Chooses blocks by the rules of the policies `blocks:scorer=pooled` and `scorer=row-normalised`.
pub trait BlockChooser: Sync {
    /// u32 `[kv_heads][tiles][words]`: block 32 w + b is visited when bit b of word w is set; those after the blocks before a tile do not
    /// count. `None`: this is better done on the CPU, or there is no room for it. Energies may differ from the CPU's by rounding, so
    /// that of blocks with energies so near each other another may be kept; of equal ones it is the same.
    fn choose(&self, choice: &BlockChoice<'_>) -> Result<Option<Vec<u32>>, Error>;
}

/// What is to be chosen for some tiles by the rule of all heads; `None`: nothing, or [`BlockChooser`]s do not know it. `own` checked what the
/// rule reads.
pub(super) fn choice<'a>(
    own: &'a BlockPlanner<'_>,
    rule: &Blocks,
    tiles: &[&TileRows],
) -> Option<BlockChoice<'a>> {
    let grid = own.grid();
    let scored = matches!(rule.scorer, Scorer::Pooled | Scorer::RowNormalised);
    let (first, last) = (tiles.first()?, tiles.last()?);
    let blocks = grid.before(last);
    if !scored || rule.two_levels || blocks == 0 {
        return None;
    }
    Some(BlockChoice {
        queries: grid.input.queries,
        first_row: first.rows.start,
        tiles: tiles.len(),
        block_tokens: grid.block as usize,
        blocks,
        summaries: grid.input.summaries,
        stripe_blocks: grid.stripe as usize,
        normalise: rule.scorer == Scorer::RowNormalised,
        selection: match rule.selector {
            Selector::Alpha(alpha) => BlockSelection::Alpha(alpha),
            Selector::Mass(gamma) => BlockSelection::Mass(gamma),
            Selector::TopK(k) => BlockSelection::TopK(k),
        },
        most: rule.most(),
        sink: rule.sink,
        local: rule.local,
        peak: rule.peak,
        always: own.escaped(),
    })
}

/// Lists out of what somebody chose.
pub(super) struct GivenPlanner<'a> {
    grid: &'a Grid<'a>,
    bits: Vec<u32>,
    words: usize,
    tiles: usize,
    /// Position of the first tile.
    first: u64,
    correction: bool,
}

impl<'a> GivenPlanner<'a> {
    /// Asks `chooser` for the blocks of `tiles` in the stead of `own`, which checked what the rule of all heads reads; `None`: it does not
    /// want to, or does not know the rule.
    pub(super) fn ask(
        chooser: &dyn BlockChooser,
        own: &BlockPlanner<'a>,
        rule: &Blocks,
        tiles: &[&TileRows],
    ) -> Result<Option<Self>, Error> {
        let (Some(first), Some(choice)) = (tiles.first(), choice(own, rule, tiles)) else { return Ok(None) };
        let (grid, queries) = (own.grid(), choice.queries);
        let Some(bits) = chooser.choose(&choice)? else { return Ok(None) };
        let wanted = queries.shape.kv_heads * tiles.len() * choice.words();
        if bits.len() != wanted {
            return Err(Error::Device(format!("{} words of bits were chosen, must be {wanted}", bits.len())));
        }
        let (words, tiles) = (choice.words(), tiles.len());
        Ok(Some(Self { grid, bits, words, tiles, first: first.first, correction: rule.correction }))
    }

    /// The list of a tile.
    pub(super) fn plan(&self, tile: &TileRows, kv_head: usize) -> List {
        let (mut chosen, scored) = (Chosen::diagonal(self.grid, tile), self.grid.before(tile));
        let number = (tile.first - self.first) as usize / crate::QUERY_TILE;
        let bits = &self.bits[(kv_head * self.tiles + number) * self.words..][..self.words];
        for (block, chosen) in chosen.blocks[..scored].iter_mut().enumerate() {
            *chosen |= bits[block / 32] >> (block % 32) & 1 == 1;
        }
        if self.correction {
            chosen.means = scored;
        }
        chosen.list(self.grid, tile)
    }
}
