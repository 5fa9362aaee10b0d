//! What becomes of the full blocks of one sequence that are still here: which are under way to their shard, which are
//! stored and can be handed over. Pure bookkeeping: decides, sends nothing.

use std::collections::VecDeque;

use longshore_proto::types::PutOutcome;

/// Blocks of one sequence under way at the same time.
const UNDER_WAY_MAX: usize = 4;

/// Where one full block stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// To be sent; `retry` says that it arrived damaged before.
    Waiting { retry: bool },
    /// Sent.
    UnderWay { retry: bool },
    /// To be sent again when the next block is full.
    Failed,
    /// Acknowledged.
    Stored,
}

/// The full local blocks of one sequence, in order.
#[derive(Debug, Default)]
pub(crate) struct Sealing {
    first: u64,
    blocks: VecDeque<Standing>,
    last_failure: Option<String>,
}

impl Sealing {
    /// Nothing is local yet; the first block that may become so is `first`.
    pub(crate) fn new(first: u64) -> Self {
        Self { first, ..Self::default() }
    }

    /// Takes note that blocks before `end` are full. A new one gives failed ones another chance.
    pub(crate) fn seal(&mut self, end: u64) {
        if self.first + (self.blocks.len() as u64) >= end {
            return;
        }
        for standing in self.blocks.iter_mut().filter(|standing| **standing == Standing::Failed) {
            *standing = Standing::Waiting { retry: false };
        }
        while self.first + (self.blocks.len() as u64) < end {
            self.blocks.push_back(Standing::Waiting { retry: false });
        }
    }

    /// The next block to send, if another one may be under way.
    pub(crate) fn next_to_send(&mut self) -> Option<u64> {
        let under_way =
            self.blocks.iter().filter(|standing| matches!(standing, Standing::UnderWay { .. })).count();
        if under_way >= UNDER_WAY_MAX {
            return None;
        }
        for (index, standing) in self.blocks.iter_mut().enumerate() {
            if let Standing::Waiting { retry } = *standing {
                *standing = Standing::UnderWay { retry };
                return Some(self.first + index as u64);
            }
        }
        None
    }

    /// Takes note of an answer. What arrived damaged is sent again at once, but only once.
    pub(crate) fn answered(&mut self, block: u64, outcome: Result<PutOutcome, String>) {
        let index = block.checked_sub(self.first).and_then(|index| usize::try_from(index).ok());
        let Some(standing) = index.and_then(|index| self.blocks.get_mut(index)) else { return };
        let Standing::UnderWay { retry } = *standing else { return };
        let again = matches!(outcome, Ok(PutOutcome::Corrupt)) && !retry;
        let failure = match outcome {
            Ok(PutOutcome::Stored | PutOutcome::Duplicate) => {
                *standing = Standing::Stored;
                self.last_failure = None;
                return;
            }
            Ok(PutOutcome::Corrupt) => "it arrived damaged".to_owned(),
            Ok(PutOutcome::NoSpace) => "its shard has no room".to_owned(),
            Err(failure) => failure,
        };
        *standing = if again { Standing::Waiting { retry: true } } else { Standing::Failed };
        self.last_failure = Some(failure);
    }

    /// Leading blocks that can be handed over.
    pub(crate) fn stored(&self) -> u64 {
        self.blocks.iter().take_while(|standing| **standing == Standing::Stored).count() as u64
    }

    /// The first `done` blocks were handed over; when `failure` says why not more, the other stored ones are sent again.
    pub(crate) fn handed_over(&mut self, done: u64, failure: Option<String>) {
        self.blocks.drain(..done as usize);
        self.first += done;
        if let Some(failure) = failure {
            for standing in self.blocks.iter_mut().take_while(|standing| **standing == Standing::Stored) {
                *standing = Standing::Failed;
            }
            self.last_failure = Some(failure);
        }
    }

    /// Full blocks that are still here.
    pub(crate) fn waiting(&self) -> usize {
        self.blocks.len()
    }

    /// Why the last block was not stored.
    pub(crate) fn last_failure(&self) -> &str {
        self.last_failure.as_deref().unwrap_or("none, the shards are slow")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(first: u64, end: u64) -> Sealing {
        let mut sealing = Sealing::new(first);
        sealing.seal(end);
        sealing
    }

    #[test]
    fn blocks_are_handed_over_in_order_whatever_the_order_of_answers() {
        let mut sealing = sealed(7, 9);
        assert_eq!(sealing.next_to_send(), Some(7));
        assert_eq!(sealing.next_to_send(), Some(8));
        assert_eq!(sealing.next_to_send(), None);
        sealing.answered(8, Ok(PutOutcome::Stored));
        assert_eq!(sealing.stored(), 0);
        sealing.answered(7, Ok(PutOutcome::Duplicate));
        assert_eq!(sealing.stored(), 2);
        sealing.handed_over(2, None);
        assert_eq!((sealing.stored(), sealing.waiting()), (0, 0));
        sealing.seal(10);
        assert_eq!(sealing.next_to_send(), Some(9));
    }

    #[test]
    fn a_failed_block_waits_for_the_next_full_one() {
        let mut sealing = sealed(0, 1);
        assert_eq!(sealing.next_to_send(), Some(0));
        sealing.answered(0, Ok(PutOutcome::NoSpace));
        assert_eq!(sealing.next_to_send(), None);
        assert_eq!(sealing.last_failure(), "its shard has no room");
        sealing.seal(2);
        assert_eq!(sealing.next_to_send(), Some(0));
        assert_eq!(sealing.next_to_send(), Some(1));
    }

    #[test]
    fn a_damaged_block_is_sent_again_once() {
        let mut sealing = sealed(0, 1);
        assert_eq!(sealing.next_to_send(), Some(0));
        sealing.answered(0, Ok(PutOutcome::Corrupt));
        assert_eq!(sealing.next_to_send(), Some(0));
        sealing.answered(0, Ok(PutOutcome::Corrupt));
        assert_eq!(sealing.next_to_send(), None);
    }

    #[test]
    fn few_blocks_are_under_way_at_a_time() {
        let mut sealing = sealed(0, 10);
        let sent = std::iter::from_fn(|| sealing.next_to_send()).count();
        assert_eq!(sent, UNDER_WAY_MAX);
    }

    #[test]
    fn blocks_that_could_not_be_handed_over_are_sent_again() {
        let mut sealing = sealed(0, 3);
        for block in 0..3 {
            assert_eq!(sealing.next_to_send(), Some(block));
            sealing.answered(block, Ok(PutOutcome::Stored));
        }
        sealing.handed_over(1, Some("gone".to_owned()));
        assert_eq!((sealing.stored(), sealing.waiting()), (0, 2));
        sealing.seal(4);
        assert_eq!(sealing.next_to_send(), Some(1));
    }

    #[test]
    fn answers_for_unknown_blocks_change_nothing() {
        let mut sealing = sealed(5, 6);
        for block in [4, 5, 9] {
            sealing.answered(block, Ok(PutOutcome::Stored));
        }
        assert_eq!(sealing.stored(), 0);
    }
}
