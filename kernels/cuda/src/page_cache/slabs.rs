//! The memory that pages are cut from: taken when it is needed, given back when the device needs it for something else.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::{PageCache, State};
use crate::{Buffer, Error};

/// Most bytes of one allocation that pages are cut from.
const SLAB_BYTES: usize = 64 << 20;
/// Evictions after which memory that the device refused, or got back, is asked for again.
const REFUSED_EVICTIONS: u64 = 1024;

/// A page of a slab, by their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) slab: usize,
    pub(super) page: usize,
}

/// Slabs by number, and their pages that hold nothing.
#[derive(Debug, Default)]
pub(super) struct Slabs {
    /// `None`: given back.
    slabs: Vec<Option<Arc<Buffer>>>,
    free: Vec<Place>,
    /// The device refused a slab, or got one back: the next is asked for after so many evictions.
    full_until: u64,
}

impl Slabs {
    pub(super) fn bytes(&self) -> usize {
        self.slabs.iter().flatten().map(|slab| slab.bytes()).sum()
    }

    /// The slab of a page.
    pub(super) fn slab(&self, place: Place) -> &Arc<Buffer> {
        self.slabs[place.slab].as_ref().expect("a slab with a page in use stays")
    }

    pub(super) fn take(&mut self) -> Option<Place> {
        self.free.pop()
    }

    pub(super) fn give(&mut self, place: Place) {
        self.free.push(place);
    }

    /// Takes another slab where no page is free, if the budget and the device allow it: a smaller one where the device has no room for a
    /// large one. `used` pages hold tiles, and there were so many `evictions`.
    pub(super) fn grow(&mut self, cache: &PageCache, used: usize, evictions: u64) -> Result<(), Error> {
        if !self.free.is_empty() || (used > 0 && evictions < self.full_until) {
            return Ok(());
        }
        let mut count = (cache.limit - used).min((SLAB_BYTES / cache.page_bytes).max(1));
        while count > 0 {
            match Buffer::new(&cache.device, count * cache.page_bytes) {
                Ok(slab) => {
                    self.add(slab, count);
                    return Ok(());
                }
                Err(Error::OutOfMemory { .. }) if count > 1 => count /= 2,
                // Less than the budget is there: go on with that, unless it is nothing.
                Err(Error::OutOfMemory { .. }) if used > 0 => {
                    self.full_until = evictions + REFUSED_EVICTIONS;
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn add(&mut self, slab: Buffer, pages: usize) {
        let number = self.slabs.iter().position(Option::is_none).unwrap_or(self.slabs.len());
        if number == self.slabs.len() {
            self.slabs.push(None);
        }
        self.slabs[number] = Some(Arc::new(slab));
        self.free.extend((0..pages).rev().map(|page| Place { slab: number, page }));
    }

    /// Bytes of the slab, which nobody uses any more.
    fn remove(&mut self, number: usize, evictions: u64) -> usize {
        self.free.retain(|place| place.slab != number);
        self.full_until = evictions + REFUSED_EVICTIONS;
        self.slabs[number].take().map_or(0, |slab| slab.bytes())
    }
}

impl State {
    /// Slabs of which no page is pinned, first those whose pages were not used for longest.
    fn idle_slabs(&self) -> Vec<usize> {
        let mut last_use: HashMap<usize, u64> = HashMap::new();
        let mut pinned: HashSet<usize> = HashSet::new();
        for page in self.pages.values() {
            let last = last_use.entry(page.place.slab).or_default();
            *last = page.used.max(*last);
            if page.pins > 0 {
                pinned.insert(page.place.slab);
            }
        }
        let slabs = self.slabs.slabs.iter().enumerate().filter(|(_, slab)| slab.is_some());
        let mut idle: Vec<usize> =
            slabs.map(|(number, _)| number).filter(|number| !pinned.contains(number)).collect();
        idle.sort_by_key(|number| last_use.get(number).copied().unwrap_or_default());
        idle
    }

    /// Bytes that [`Self::give_back`] could give.
    pub(super) fn idle_bytes(&self) -> usize {
        let slabs = self.idle_slabs();
        slabs.iter().filter_map(|&number| self.slabs.slabs[number].as_ref()).map(|slab| slab.bytes()).sum()
    }

    /// Gives back slabs of which no page is pinned, first those whose pages were not used for longest, until there are `bytes` of them.
    pub(super) fn give_back(&mut self, bytes: usize) -> usize {
        let mut given = 0;
        for number in self.idle_slabs() {
            if given >= bytes {
                break;
            }
            let idle = &mut self.idle;
            self.pages.retain(|_, page| {
                let stays = page.place.slab != number;
                if !stays {
                    idle.remove(&page.used);
                }
                stays
            });
            given += self.slabs.remove(number, self.stats.evictions);
            self.stats.returned += 1;
        }
        given
    }
}
