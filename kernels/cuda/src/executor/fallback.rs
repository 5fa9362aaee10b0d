//! Calls that a device has no room for are computed on the CPU, which has the tiles.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use longshore_attention::{Error as AttentionError, Partials, PlanInput, Promise};

use super::{CudaExecutor, failed};
use crate::Error;

/// What a device lacked for a call, which the CPU did in its stead; a closed set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shortage {
    /// Memory for queries, tables or results, or for any page.
    Memory,
    /// Pages: the budget has room for none, or others use them all.
    Pages,
}

impl Shortage {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Memory, Self::Pages];

    /// Its name in metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Pages => "pages",
        }
    }

    /// What an error tells of; `None`: of something else.
    pub(super) fn of(error: &Error) -> Option<Self> {
        match error {
            Error::OutOfMemory { .. } => Some(Self::Memory),
            Error::OutOfPages { .. } => Some(Self::Pages),
            _ => None,
        }
    }
}

/// Calls that the CPU did in the device's stead, by what was lacking.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FallbackStats([u64; Shortage::ALL.len()]);

impl FallbackStats {
    /// How many lacked this.
    pub fn of(&self, shortage: Shortage) -> u64 {
        self.0[shortage as usize]
    }
}

/// Calls that are remembered until their rows come by way of the host, at most: more than there are at once.
const REFUSED_MAX: usize = 16;

/// Which call by a policy: by its layer, its rows, and the version of the first tile that they see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RuleCallOf {
    layer: usize,
    first_position: u64,
    rows: usize,
    tile: u64,
}

impl RuleCallOf {
    /// `promised`: the versions that the last tiles get before the same rows come by way of the host.
    pub(super) fn of(input: &PlanInput<'_>, rows: usize, promised: &[Promise]) -> Self {
        let tile = match promised.first().filter(|_| promised.len() == input.kv.len()) {
            Some(promise) => promise.version(),
            None if input.kv.is_empty() => 0,
            None => input.kv.tile(0).version(),
        };
        Self { layer: input.layer, first_position: input.queries.first_position, rows, tile }
    }
}

/// Told of a call that the CPU does: what was lacking, and what the device said.
type Listener = Box<dyn Fn(Shortage, &Error) + Send + Sync>;

/// Counts calls that the CPU does, and tells of them.
#[derive(Default)]
pub(super) struct Fallbacks {
    counts: [AtomicU64; Shortage::ALL.len()],
    /// Calls that went by lists of the host for want of room.
    pub(super) to_lists: AtomicU64,
    /// Rows that became no pages for want of room.
    pub(super) appends: AtomicU64,
    /// The same of means.
    pub(super) means: AtomicU64,
    refused: Mutex<VecDeque<RuleCallOf>>,
    listener: Option<Listener>,
}

impl Fallbacks {
    pub(super) fn stats(&self) -> FallbackStats {
        FallbackStats(Shortage::ALL.map(|shortage| self.counts[shortage as usize].load(Ordering::Relaxed)))
    }

    /// Takes note of a call that goes by lists of the host, for want of memory or pages.
    pub(super) fn note_lists(&self) {
        self.to_lists.fetch_add(1, Ordering::Relaxed);
    }

    /// Remembers a call whose rows could not stay.
    pub(super) fn remember(&self, call: RuleCallOf) {
        let mut refused = self.refused();
        if refused.len() == REFUSED_MAX {
            refused.pop_front();
        }
        refused.push_back(call);
    }

    /// Whether that was the same call; then it is forgotten.
    pub(super) fn take_refused(&self, call: &RuleCallOf) -> bool {
        let mut refused = self.refused();
        let place = refused.iter().position(|other| other == call);
        place.and_then(|place| refused.remove(place)).is_some()
    }

    fn refused(&self) -> MutexGuard<'_, VecDeque<RuleCallOf>> {
        // Entries are added and removed whole.
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of an error that the CPU makes good; false: it cannot.
    pub(super) fn note(&self, error: &Error) -> bool {
        let Some(shortage) = Shortage::of(error) else { return false };
        self.counts[shortage as usize].fetch_add(1, Ordering::Relaxed);
        if let Some(listener) = &self.listener {
            listener(shortage, error);
        }
        true
    }
}

impl fmt::Debug for Fallbacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Fallbacks").field(&self.stats()).finish()
    }
}

impl CudaExecutor {
    /// Tells `listener` of every call that the CPU does because the device has no room for it, before it is done.
    #[must_use]
    pub fn on_shortage(mut self, listener: impl Fn(Shortage, &Error) + Send + Sync + 'static) -> Self {
        self.fallbacks.listener = Some(Box::new(listener));
        self
    }

    /// What the device says to a call, or, where it has no room for it, what `on_cpu` says: all of it, so that the bits of one answer are
    /// those of one device.
    pub(super) fn or_on_cpu(
        &self,
        call: impl Fn() -> Result<Vec<Partials>, Error>,
        on_cpu: impl FnOnce() -> Result<Vec<Partials>, AttentionError>,
    ) -> Result<Vec<Partials>, AttentionError> {
        match self.with_room(call) {
            Ok(partials) => Ok(partials),
            Err(error) if self.fallbacks.note(&error) => on_cpu(),
            Err(error) => Err(failed(error)),
        }
    }

    /// Queues work on what is on the device; `None` or false where the device lacks room even after it was made, which `short` counts.
    pub(super) fn unless_short<T: Default>(
        &self,
        short: &AtomicU64,
        call: impl Fn() -> Result<T, Error>,
    ) -> Result<T, AttentionError> {
        match self.with_room(call) {
            Err(error) if Shortage::of(&error).is_some() => {
                short.fetch_add(1, Ordering::Relaxed);
                Ok(T::default())
            }
            outcome => outcome.map_err(failed),
        }
    }

    /// Does `call`, and once more where the device had no memory for it and gets some of what tiles arrive in, and of that of idle pages:
    /// they are only copies.
    pub(super) fn with_room<T>(&self, call: impl Fn() -> Result<T, Error>) -> Result<T, Error> {
        let mut outcome = call();
        if matches!(outcome, Err(Error::OutOfMemory { .. })) && self.arrivals.clear() > 0 {
            outcome = call();
        }
        match outcome {
            Err(Error::OutOfMemory { bytes, .. }) if self.give_back(bytes) => call(),
            outcome => outcome,
        }
    }

    /// Gives back memory of pages, of all shapes, until there are `bytes`. False: there are fewer; then, unless somebody took some
    /// meanwhile, all of it stays, since the pages would be lost for nothing.
    fn give_back(&self, bytes: usize) -> bool {
        let shapes: Vec<_> =
            self.shapes.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        if shapes.iter().map(|pages| pages.idle_bytes()).sum::<usize>() < bytes {
            return false;
        }
        let mut given = 0;
        for pages in shapes {
            given += pages.give_back(bytes.saturating_sub(given));
        }
        given > 0 && given >= bytes
    }
}
