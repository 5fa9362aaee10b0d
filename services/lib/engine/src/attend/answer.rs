//! Rows of answers under a policy with streaming heads: what each KV head visits here and on shards.
//!
//! A layer in which every head visits everything goes the way of exact attention, and so do rows of prompts: the same bits.

use std::ops::Range;

use longshore_attention::{ExactBlock, HeadShape, Partials, QUERY_TILE, SparseWork, Streaming, Visit};

use super::{LayerAttention, Part, StripePartials, StripeWork, Work};
use crate::{Error, Sequence, sequence::View};

/// What a KV head of some rows of a part visits of a view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HeadVisits {
    pub(super) kv_head: usize,
    /// Rows of the part; all in one query tile.
    pub(super) rows: Range<usize>,
    /// Runs of blocks, ascending.
    pub(super) runs: Vec<Range<u64>>,
    /// Their stripes, ascending.
    pub(super) stripes: Vec<u64>,
}

impl HeadVisits {
    fn visit(&mut self, stripe: u64, blocks: Range<u64>) {
        if blocks.is_empty() {
            return;
        }
        if self.stripes.last() != Some(&stripe) {
            self.stripes.push(stripe);
        }
        match self.runs.last_mut().filter(|last| last.end == blocks.start) {
            Some(last) => last.end = blocks.end,
            None => self.runs.push(blocks),
        }
    }

    /// Puts the partial of these rows and heads to those of the part.
    pub(super) fn place(
        &self,
        (rows, shape): (usize, HeadShape),
        stripe: u64,
        partial: &Partials,
        partials: &mut StripePartials,
    ) -> Result<(), Error> {
        let found = partials.iter().position(|(known, _)| *known == stripe);
        let index = found.unwrap_or_else(|| {
            partials.push((stripe, Partials::identity(rows, shape.query_heads(), shape.head_dim)));
            partials.len() - 1
        });
        Ok(partials[index].1.place(self.rows.start, self.kv_head * shape.group, partial)?)
    }
}

impl LayerAttention<'_, '_> {
    /// Cuts parts where answers begin, so that one rule holds for all rows of a part.
    pub(super) fn cut_at_answers(&self, parts: Vec<Part>) -> Vec<Part> {
        let cut = |part: Part| {
            let from = self.batch[part.input].sequence.answer_from().unwrap_or(0);
            let before = from.saturating_sub(part.first_position).min(part.rows.len() as u64);
            let middle = part.rows.start + before as usize;
            let early = Part { rows: part.rows.start..middle, ..part };
            let late =
                Part { rows: middle..part.rows.end, first_position: part.first_position + before, ..part };
            [early, late].into_iter().filter(|part| !part.rows.is_empty())
        };
        parts.into_iter().flat_map(cut).collect()
    }

    /// Whether the rows of a part, which was cut, belong to an answer.
    pub(super) fn is_answer(&self, part: &Part) -> bool {
        let from = self.batch[part.input].sequence.answer_from();
        from.is_some_and(|from| part.first_position >= from)
    }

    /// What the KV heads visit in the rows of a part; `None`: everything.
    pub(super) fn streaming(&self, part: &Part) -> Option<&[Option<Streaming>]> {
        let heads = self.batch[part.input].sequence.answer_heads(self.layer);
        heads.filter(|_| self.is_answer(part))
    }

    /// What each KV head of a part visits of a view, query tile by query tile; nothing of stripes that another shard is asked for.
    pub(super) fn head_visits(
        &self,
        part: &Part,
        heads: &[Option<Streaming>],
        view: &View,
    ) -> Vec<HeadVisits> {
        let sequence = &self.batch[part.input].sequence;
        let stripe_blocks = u64::from(sequence.geometry().stripe_blocks());
        let mut all = Vec::new();
        for rows in tiles(part) {
            for (kv_head, rule) in heads.iter().enumerate() {
                let runs = runs_of(*rule, part, &rows, sequence);
                let mut visits =
                    HeadVisits { kv_head, rows: rows.clone(), runs: Vec::new(), stripes: Vec::new() };
                for stripe in view.parts.iter().filter(|part| part.used).map(|part| part.stripe) {
                    let (first, end) = (stripe * stripe_blocks, (stripe + 1) * stripe_blocks);
                    for run in &runs {
                        let end = end.min(run.end).min(sequence.remote_blocks());
                        visits.visit(stripe, first.max(run.start)..end);
                    }
                }
                if !visits.runs.is_empty() {
                    all.push(visits);
                }
            }
        }
        all
    }

    /// What the KV heads of a part visit of the blocks that are here, a list per stripe, ascending.
    pub(super) fn head_stripes(
        &self,
        part: &Part,
        heads: &[Option<Streaming>],
    ) -> Result<Vec<StripeWork>, Error> {
        let sequence = &self.batch[part.input].sequence;
        let tiles = tiles(part);
        let row_ends: Vec<u32> = tiles.iter().map(|rows| rows.end as u32).collect();
        let end = part.first_position + part.rows.len() as u64;
        let mut stripes = Vec::new();
        let geometry = sequence.geometry();
        let local = sequence.remote_blocks()..sequence.blocks_before(end);
        let (first, last) = (geometry.stripe_of(local.start), geometry.stripe_of(local.end.max(1) - 1));
        for stripe in first..=last {
            let stripe_blocks = u64::from(geometry.stripe_blocks());
            let own = local.start.max(stripe * stripe_blocks)..local.end.min((stripe + 1) * stripe_blocks);
            let mut lists = Vec::with_capacity(heads.len() * tiles.len());
            for rule in heads {
                for rows in &tiles {
                    lists.push((local_visits(*rule, part, rows, sequence, &own), Vec::new()));
                }
            }
            if lists.iter().any(|(visits, _)| !visits.is_empty()) {
                let work = SparseWork::new(heads.len(), row_ends.clone(), lists)?;
                stripes.push(StripeWork { stripe, work: Work::Heads(work) });
            }
        }
        Ok(stripes)
    }
}

/// Rows of a part by query tile.
fn tiles(part: &Part) -> Vec<Range<usize>> {
    let (mut tiles, mut row) = (Vec::new(), 0);
    while row < part.rows.len() {
        let offset = (part.first_position + row as u64) % QUERY_TILE as u64;
        let end = part.rows.len().min(row + QUERY_TILE - offset as usize);
        tiles.push(row..end);
        row = end;
    }
    tiles
}

/// Runs of blocks that a KV head visits in some rows of a part, of one query tile.
fn runs_of(
    rule: Option<Streaming>,
    part: &Part,
    rows: &Range<usize>,
    sequence: &Sequence,
) -> [Range<u64>; 2] {
    let block = u64::from(sequence.geometry().block_tokens());
    let (first, last) = (part.first_position + rows.start as u64, part.first_position + rows.end as u64 - 1);
    match rule {
        Some(rule) => rule.blocks(first, last, block),
        None => [0..0, 0..last / block + 1],
    }
}

/// Blocks of `own`, which are here, that a KV head visits in some rows of a part.
fn local_visits(
    rule: Option<Streaming>,
    part: &Part,
    rows: &Range<usize>,
    sequence: &Sequence,
    own: &Range<u64>,
) -> Vec<Visit> {
    let block_tokens = u64::from(sequence.geometry().block_tokens());
    let end = part.first_position + rows.end as u64;
    let runs = runs_of(rule, part, rows, sequence).into_iter();
    let here = runs.flat_map(|run| run.start.max(own.start)..run.end.min(own.end));
    let visit = |block: u64| {
        let first_position = block * block_tokens;
        Visit::Block(ExactBlock {
            tile: (block - sequence.remote_blocks()) as u32,
            first_position,
            len: (end - first_position).min(block_tokens) as u32,
        })
    };
    here.map(visit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_at_the_grid_of_query_tiles() {
        let of =
            |first_position: u64, rows: usize| tiles(&Part { input: 0, first_position, rows: 7..7 + rows });
        assert_eq!(of(100, 1), std::slice::from_ref(&(0..1)));
        assert_eq!(of(95, 3), [0..1, 1..3]);
        assert_eq!(of(64, 64), [0..32, 32..64]);
    }

    #[test]
    fn runs_that_touch_are_one() {
        let mut visits = HeadVisits { kv_head: 0, rows: 0..1, runs: Vec::new(), stripes: Vec::new() };
        for (stripe, blocks) in [(0, 0..3), (1, 3..3), (1, 3..6), (3, 9..10), (3, 11..12)] {
            visits.visit(stripe, blocks);
        }
        assert_eq!(visits.runs, [0..6, 9..10, 11..12]);
        assert_eq!(visits.stripes, [0, 1, 3]);
    }
}
