//! Streaming heads: the first keys of a sequence and the newest ones, in whole blocks. What a row visits follows from its position
//! alone, so prompts and answers share one rule.

use std::ops::Range;

use crate::{Error, HeadShape, QUERY_TILE};

use super::heads::patterns;
use super::{HeadPattern, Method, PrefillPolicy};

/// First and newest keys that a streaming KV head visits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Streaming {
    /// Keys from the beginning of the sequence.
    pub sink: u64,
    /// Newest keys, the row's own among them.
    pub recent: u64,
}

impl Streaming {
    /// Blocks of `block` positions that rows at the positions `first` to `last` visit, which lie in one query tile: those of the
    /// first `sink` keys, and from the block of the oldest of the `recent` newest keys of the *tile's* first row (whether that row is
    /// among them or not) to the block of `last`. Two runs, ascending, with a gap between them; the first is empty where they meet.
    pub fn blocks(&self, first: u64, last: u64, block: u64) -> [Range<u64>; 2] {
        let end = last / block + 1;
        let sink = self.sink.div_ceil(block).min(end);
        let tile = first - first % QUERY_TILE as u64;
        let oldest = (tile + 1).saturating_sub(self.recent) / block;
        if oldest <= sink { [0..0, 0..end] } else { [0..sink, oldest..end] }
    }

    /// What two heads visit together.
    fn and(self, other: Self) -> Self {
        Self { sink: self.sink.max(other.sink), recent: self.recent.max(other.recent) }
    }
}

impl PrefillPolicy {
    /// What each KV head of a layer visits in rows of an answer: `None` is a head that visits everything, and so is a layer without
    /// streaming heads. A KV head streams when all of its query heads do. Refuses a plan for other layers or heads.
    pub fn answer_heads(
        &self,
        layer: usize,
        shape: HeadShape,
    ) -> Result<Option<Vec<Option<Streaming>>>, Error> {
        let Method::Heads(heads) = &self.method else { return Ok(None) };
        let patterns = patterns(heads, layer, shape)?;
        if layer < self.guards.dense_layers {
            return Ok(None);
        }
        let stream = |pattern: &HeadPattern| match *pattern {
            HeadPattern::Streaming { sink, recent } => Some(Streaming { sink, recent }),
            _ => None,
        };
        let of_head = |group: &[HeadPattern]| {
            let streams: Option<Vec<Streaming>> = group.iter().map(stream).collect();
            streams?.into_iter().reduce(Streaming::and)
        };
        let heads: Vec<Option<Streaming>> = patterns.chunks(shape.group.max(1)).map(of_head).collect();
        Ok(heads.iter().any(Option::is_some).then_some(heads))
    }

    /// Whether any head may visit less than everything in rows of an answer.
    pub fn streams_answers(&self) -> bool {
        match &self.method {
            Method::Heads(heads) => heads.any(|pattern| matches!(pattern, HeadPattern::Streaming { .. })),
            Method::Exact | Method::Blocks(_) | Method::Budgets(_) | Method::Flex(_) => false,
        }
    }

    /// Position from which on streaming heads stream in the answer to a prompt of so many tokens.
    pub fn answer_from(&self, prompt_tokens: u64) -> u64 {
        prompt_tokens.max(self.guards.min_positions.next_multiple_of(QUERY_TILE as u64))
    }
}
