//! Turns of concurrent callers, first come, first served.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A lock that goes to the caller who has waited longest. (A plain mutex may starve one: the caller that just gave it back
/// mostly gets it again, and a prefill would keep decode steps out.)
#[derive(Debug, Default)]
pub(super) struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The next number to hand out.
    next: u64,
    /// The number whose turn it is.
    serving: u64,
}

impl Turns {
    /// Waits for a turn. Whoever has it gives it back.
    pub(super) fn take(&self) {
        let mut state = self.lock();
        let own = state.next;
        state.next += 1;
        while state.serving != own {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends a turn.
    pub(super) fn give_back(&self) {
        let mut state = self.lock();
        state.serving += 1;
        let waiting = state.serving != state.next;
        drop(state);
        if waiting {
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
