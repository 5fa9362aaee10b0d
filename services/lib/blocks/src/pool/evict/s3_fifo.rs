//! S3-FIFO: new blocks on probation, used ones in a queue of their own.

use std::collections::HashMap;

use super::{Candidate, EvictionPolicy, Generation, queue::RankQueue};

/// Uses that a block is remembered for at most.
const USES_MAX: u32 = 3;

/// Two queues (Yang et al., SOSP 2023): new blocks enter the small one, a tenth of all; used ones among them move on to the
/// main one, where each use buys another round. Blocks that were needed before, though evicted since, enter the main one.
#[derive(Debug, Default)]
pub struct S3Fifo {
    small: RankQueue<u64, ()>,
    main: RankQueue<u64, ()>,
    /// Blocks that were inserted and not popped since, those that are in use now too.
    places: HashMap<Generation, Place>,
    last_turn: u64,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    is_main: bool,
    /// Its place in the queue.
    turn: u64,
    /// Uses that did not yet buy a round.
    credit: u32,
    /// All uses, as they were told last.
    uses: u32,
}

impl S3Fifo {
    fn next_turn(&mut self) -> u64 {
        self.last_turn += 1;
        self.last_turn
    }

    fn enqueue(&mut self, block: Generation, place: Place) {
        let queue = if place.is_main { &mut self.main } else { &mut self.small };
        queue.insert(block, place.turn, ());
        self.places.insert(block, place);
    }
}

impl EvictionPolicy for S3Fifo {
    fn insert(&mut self, candidate: Candidate) {
        let uses = candidate.uses;
        let place = match self.places.get(&candidate.block) {
            Some(old) => {
                Place { credit: (old.credit + uses.saturating_sub(old.uses)).min(USES_MAX), uses, ..*old }
            }
            None => Place { is_main: uses > 1, turn: self.next_turn(), credit: 0, uses },
        };
        self.enqueue(candidate.block, place);
    }

    fn remove(&mut self, block: Generation) {
        self.small.remove(block);
        self.main.remove(block);
    }

    fn pop(&mut self) -> Option<Generation> {
        loop {
            let on_probation = self.small.len() * 10 >= self.small.len() + self.main.len();
            let queue = if on_probation { &mut self.small } else { &mut self.main };
            let (_, block, ()) = queue.pop()?;
            let place = self.places.get(&block).copied().expect("queued blocks have a place");
            if place.credit == 0 {
                self.places.remove(&block);
                return Some(block);
            }
            let credit = if place.is_main { place.credit - 1 } else { 0 };
            let turn = self.next_turn();
            self.enqueue(block, Place { is_main: true, turn, credit, ..place });
        }
    }

    fn forget(&mut self, block: Generation) {
        self.places.remove(&block);
    }
}
