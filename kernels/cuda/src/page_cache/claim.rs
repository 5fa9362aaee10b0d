//! Pages that one call wants: some were found, some are brought by it, some by others.

use super::{FreshPage, PageCache, Pinned, State};
use crate::Error;

/// Pages that are pinned, not all of which are filled. Dropped, it gives up what it was to bring.
pub(super) struct Claim<'a> {
    cache: &'a PageCache,
    versions: Vec<u64>,
    addresses: Vec<u64>,
    /// Those that the claimer fills.
    fresh: Vec<FreshPage>,
    /// Those that others are filling: places among the versions, and which bringings they are.
    foreign: Vec<(usize, u64)>,
}

impl<'a> Claim<'a> {
    /// Pins what is there of `versions`, in order, and finds room for the rest, until there is none. With `waits` until others unpin
    /// something, where they have pinned everything.
    pub(super) fn new(cache: &'a PageCache, versions: &[u64], waits: bool) -> Result<Self, Error> {
        let none = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut claim = Self { cache, versions: none.0, addresses: none.1, fresh: none.2, foreign: none.3 };
        let mut state = cache.lock();
        while claim.versions.len() < versions.len() {
            let index = claim.versions.len();
            let Err(error) = claim.take(&mut state, versions[index]) else { continue };
            let others_have_some = state.pages.len() > state.idle.len();
            match error {
                Error::OutOfPages { .. } if index == 0 && waits && others_have_some => {
                    state = cache.wait(state);
                }
                error if error.retryable() && (index > 0 || !waits) => {
                    state.stats.shortages += 1;
                    break;
                }
                error => {
                    // The claim is dropped with the lock free.
                    drop(state);
                    return Err(error);
                }
            }
        }
        drop(state);
        Ok(claim)
    }

    /// Takes the next version.
    fn take(&mut self, state: &mut State, version: u64) -> Result<(), Error> {
        let index = self.versions.len();
        let address = if let Some(page) = state.find(version) {
            let own = || self.fresh.iter().any(|fresh| fresh.version == version);
            if !page.filled && !own() {
                self.foreign.push((index, page.bringing));
            }
            page.address
        } else {
            self.fresh.push(state.bring(self.cache, (index, version))?);
            state.pages[&version].address
        };
        self.versions.push(version);
        self.addresses.push(address);
        Ok(())
    }

    /// True when nothing could be pinned.
    pub(super) fn is_empty(&self) -> bool {
        self.versions.is_empty()
    }

    /// Pages that the claimer is to fill.
    pub(super) fn fresh(&self) -> &[FreshPage] {
        &self.fresh
    }

    /// What the claimer was to fill is filled; waits for what others fill. The pages of the first versions, as many as came.
    pub(super) fn settle(mut self) -> Pinned<'a> {
        let cache = self.cache;
        let mut state = cache.lock();
        for fresh in self.fresh.drain(..) {
            state.pages.get_mut(&fresh.version).expect("who fills a page has it pinned").filled = true;
            state.stats.misses += 1;
        }
        cache.changed.notify_all();
        let mut lost = Vec::new();
        for (index, bringing) in std::mem::take(&mut self.foreign) {
            let version = self.versions[index];
            while state.pages.get(&version).is_some_and(|page| page.bringing == bringing && !page.filled) {
                state = cache.wait(state);
            }
            if state.pages.get(&version).is_none_or(|page| page.bringing != bringing) {
                lost.push(index);
            }
        }
        let kept = lost.first().copied().unwrap_or(self.versions.len());
        for index in (kept..self.versions.len()).filter(|index| !lost.contains(index)) {
            state.unpin(self.versions[index]);
        }
        if kept < self.versions.len() {
            cache.changed.notify_all();
        }
        drop(state);
        self.addresses.truncate(kept);
        let mut versions = std::mem::take(&mut self.versions);
        versions.truncate(kept);
        Pinned { cache, versions, addresses: std::mem::take(&mut self.addresses) }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if self.versions.is_empty() {
            return;
        }
        let mut state = self.cache.lock();
        for fresh in &self.fresh {
            let page = state.pages.remove(&fresh.version).expect("who fills a page has it pinned");
            state.slabs.give(page.place);
        }
        for (index, &version) in self.versions.iter().enumerate() {
            let gone = self.fresh.iter().any(|fresh| fresh.version == version);
            let of = self.foreign.iter().find(|(foreign, _)| *foreign == index);
            let other = |&(_, bringing): &(usize, u64)| {
                state.pages.get(&version).is_none_or(|page| page.bringing != bringing)
            };
            if !gone && !of.is_some_and(other) {
                state.unpin(version);
            }
        }
        self.cache.changed.notify_all();
    }
}
