//! How a call is cut: query tiles in runs whose energies and visits have room, and what each tile may visit at most.

use std::ops::Range;

use longshore_attention::{BlockSelection, PlanInput, RuleCall};

use crate::executor::plan::ENERGY_BYTES;
use crate::{CountedTile, KeyVisit, StripeMeans, most_visits};

/// Bytes of the visits of a run, if each list had the most that it may have.
const VISIT_BYTES: usize = 64 << 20;

/// Query tiles that are done together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) tiles: Range<usize>,
    /// Their blocks are chosen; else all up to themselves are visited.
    pub(super) chosen: bool,
}

/// The tiles of a call.
#[derive(Debug)]
pub(super) struct Cut {
    /// Blocks up to the last row.
    pub(super) blocks: usize,
    /// Stripes of the blocks that are chosen from.
    pub(super) stripes: usize,
    /// Words of a list's bits.
    pub(super) words: usize,
    /// Keys of a visit.
    pub(super) keys: usize,
    /// Where means stand for what is not visited.
    pub(super) means: Option<StripeMeans>,
    pub(super) tiles: Vec<CountedTile>,
    /// `[tiles][2]`: blocks that are chosen from, and blocks up to the last row.
    pub(super) ends: Vec<u32>,
    /// Position behind the last row of each tile.
    pub(super) row_ends: Vec<u32>,
    pub(super) runs: Vec<Run>,
    kv_heads: usize,
}

impl Cut {
    /// `None`: a key has a position that visits cannot name, or a tile another shape than its source says.
    pub(super) fn new(call: &RuleCall<'_>, input: &PlanInput<'_>, keys: usize) -> Option<Self> {
        let (choice, queries, shape) = (&call.choice, &input.queries, input.kv.shape());
        let tokens = choice.block_tokens as u64;
        let end = |rows: &Range<usize>| queries.first_position + rows.end as u64;
        let blocks = usize::try_from(end(call.tiles.last()?).div_ceil(tokens)).ok()?;
        let words = blocks.div_ceil(32);
        if words.checked_mul(32 * choice.block_tokens).is_none_or(|all| all > u32::MAX as usize)
            || (0..blocks).any(|block| input.kv.tile(block).shape() != shape)
        {
            return None;
        }
        let page_keys = input.summaries.shape().block_tokens;
        let means = call.correction.then_some(StripeMeans { stripe_blocks: choice.stripe_blocks, page_keys });
        let mut cut = Self {
            blocks,
            stripes: choice.blocks.div_ceil(choice.stripe_blocks),
            words,
            keys,
            means,
            tiles: Vec::new(),
            ends: Vec::new(),
            row_ends: Vec::new(),
            runs: Vec::new(),
            kv_heads: queries.shape.kv_heads,
        };
        for (number, rows) in call.tiles.iter().enumerate() {
            let first = queries.first_position + rows.start as u64;
            let scored = if call.chosen.contains(&number) { (first / tokens) as usize } else { 0 };
            let seen = end(rows).div_ceil(tokens) as usize;
            cut.ends.extend([scored as u32, seen as u32]);
            cut.row_ends.push(end(rows) as u32);
            let blocks = most_kept(call, scored) + seen - scored;
            let most_visits = most_visits((blocks, scored), choice.block_tokens, keys, means);
            cut.tiles.push(CountedTile { first_row: rows.start, rows: rows.len(), most_visits });
        }
        let (first, after) = (0..call.chosen.start, call.chosen.end..call.tiles.len());
        cut.add_runs(first, false, choice.blocks);
        cut.add_runs(call.chosen.clone(), true, choice.blocks);
        cut.add_runs(after, false, choice.blocks);
        Some(cut)
    }

    fn add_runs(&mut self, tiles: Range<usize>, chosen: bool, blocks: usize) {
        let energies = (ENERGY_BYTES / (self.kv_heads * blocks.max(1) * size_of::<f32>())).max(1);
        let room = VISIT_BYTES / size_of::<KeyVisit>() / self.kv_heads;
        let (mut begun, mut visits) = (tiles.start, 0);
        for tile in tiles.clone() {
            let own = self.tiles[tile].most_visits;
            if tile > begun && (tile - begun == energies || visits + own > room) {
                self.runs.push(Run { tiles: begun..tile, chosen });
                (begun, visits) = (tile, 0);
            }
            visits += own;
        }
        if begun < tiles.end {
            self.runs.push(Run { tiles: begun..tiles.end, chosen });
        }
    }

    /// Tiles of the longest run.
    pub(super) fn most_tiles(&self) -> usize {
        self.runs.iter().map(|run| run.tiles.len()).max().unwrap_or(0)
    }

    /// Visits of all lists of a run, at most.
    pub(super) fn most_visits(&self) -> usize {
        let of = |run: &Run| self.tiles[run.tiles.clone()].iter().map(|tile| tile.most_visits).sum::<usize>();
        self.kv_heads * self.runs.iter().map(of).max().unwrap_or(0)
    }
}

/// Blocks that a list keeps of so many that it chooses from, at most.
fn most_kept(call: &RuleCall<'_>, scored: usize) -> usize {
    let choice = &call.choice;
    if choice.peak.is_some() || !choice.always.is_empty() {
        return scored;
    }
    let selected = match choice.selection {
        BlockSelection::TopK(count) => count.min(choice.most),
        BlockSelection::Alpha(_) | BlockSelection::Mass(_) => choice.most,
    };
    let guards = usize::try_from(choice.sink.saturating_add(choice.local)).unwrap_or(usize::MAX);
    scored.min(selected.saturating_add(guards))
}
