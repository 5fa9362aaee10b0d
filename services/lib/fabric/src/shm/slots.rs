//! Which slots of an arena are lent to the peer. Pure bookkeeping: time is an argument.

use std::time::{Duration, Instant};

/// How long a slot whose call ended stays as it is: its reader may still copy it, or never have heard of it.
const GRACE: Duration = Duration::from_secs(10);

/// One use of a slot. A word about an earlier use is stale and changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ticket {
    pub(super) slot: u32,
    pub(super) generation: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    /// Lent by a call that goes on.
    Lent {
        call: u64,
    },
    /// Lent by a call that is over.
    Orphan {
        since: Instant,
    },
}

/// Slots of one arena.
#[derive(Debug)]
pub(super) struct Slots {
    states: Vec<(u32, State)>,
    /// Last in, first out: a slot that was used just now is in the caches.
    free: Vec<u32>,
}

impl Slots {
    pub(super) fn new(count: u32) -> Self {
        Self { states: vec![(0, State::Free); count as usize], free: (0..count).rev().collect() }
    }

    /// Lends a free slot to `call`, or one whose call ended long ago.
    pub(super) fn lend(&mut self, call: u64, now: Instant) -> Option<Ticket> {
        let slot = self.free.pop().or_else(|| self.abandoned(now))?;
        let (generation, state) = &mut self.states[slot as usize];
        *generation = generation.wrapping_add(1);
        *state = State::Lent { call };
        Some(Ticket { slot, generation: *generation })
    }

    fn abandoned(&self, now: Instant) -> Option<u32> {
        let is_old =
            |state: &State| matches!(state, State::Orphan { since } if now.duration_since(*since) >= GRACE);
        self.states.iter().position(|(_, state)| is_old(state)).map(|slot| slot as u32)
    }

    /// Takes a slot back. False when the ticket means no use that is going on.
    pub(super) fn release(&mut self, ticket: Ticket) -> bool {
        match self.states.get_mut(ticket.slot as usize) {
            Some((generation, state)) if *generation == ticket.generation && *state != State::Free => {
                *state = State::Free;
                self.free.push(ticket.slot);
                true
            }
            _ => false,
        }
    }

    /// `call` is over: what it lent comes back when it is released or after a while.
    pub(super) fn end(&mut self, call: u64, now: Instant) {
        for (_, state) in &mut self.states {
            if *state == (State::Lent { call }) {
                *state = State::Orphan { since: now };
            }
        }
    }

    /// Slots that are lent.
    #[cfg(test)]
    pub(super) fn lent(&self) -> usize {
        self.states.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_is_lent_once_and_comes_back_once() {
        let now = Instant::now();
        let mut slots = Slots::new(2);
        let (a, b) = (slots.lend(1, now).unwrap(), slots.lend(1, now).unwrap());
        assert_ne!(a.slot, b.slot);
        assert_eq!(slots.lend(1, now), None);
        assert!(slots.release(a) && !slots.release(a), "the second word is stale");
        let again = slots.lend(2, now).unwrap();
        assert_eq!(again.slot, a.slot);
        assert!(!slots.release(a), "a word about an earlier use changes nothing");
        for wrong in [Ticket { slot: 2, generation: 0 }, Ticket { slot: u32::MAX, generation: 1 }] {
            assert!(!slots.release(wrong));
        }
        assert!(slots.release(again) && slots.release(b));
        assert_eq!(slots.lent(), 0);
    }

    #[test]
    fn slots_of_calls_that_ended_come_back_after_a_while() {
        let now = Instant::now();
        let mut slots = Slots::new(1);
        let lost = slots.lend(1, now).unwrap();
        assert_eq!(slots.lend(2, now + GRACE * 2), None, "its call goes on");
        slots.end(1, now);
        assert_eq!(slots.lend(2, now + GRACE / 2), None);
        let next = slots.lend(2, now + GRACE).unwrap();
        assert!(!slots.release(lost), "its reader comes too late");
        assert!(slots.release(next));
    }
}
