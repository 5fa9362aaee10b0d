//! Pages of the device: a bounded cache of tiles in device memory, by what they hold.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Buffer, Device, Error, Span};

/// Most bytes of one allocation that pages are cut from.
const SLAB_BYTES: usize = 64 << 20;
/// Evictions after which memory that the device refused is asked for again.
const REFUSED_EVICTIONS: u64 = 1024;

/// Pages of one size on a device. A tile is found again by its [`longshore_attention::Tile::version`], so that its bytes cross
/// the bus once as long as there is room; the page that was not used for longest makes way. What is pinned stays.
#[derive(Debug)]
pub struct PageCache {
    device: Arc<dyn Device>,
    page_bytes: usize,
    limit: usize,
    state: Mutex<State>,
}

/// What a cache did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageStats {
    /// Pages that hold a tile.
    pub pages: usize,
    /// Bytes of device memory taken for pages.
    pub reserved_bytes: usize,
    /// Tiles that were found.
    pub hits: u64,
    /// Tiles that were brought.
    pub misses: u64,
    /// Tiles that made way.
    pub evictions: u64,
    /// Times that fewer pages than asked for could be pinned.
    pub shortages: u64,
}

#[derive(Debug, Default)]
struct State {
    slabs: Vec<Buffer>,
    free: Vec<Place>,
    pages: HashMap<u64, Page>,
    /// Versions of unpinned pages by their last use.
    idle: BTreeMap<u64, u64>,
    uses: u64,
    /// The device refused a slab: the next is asked for after so many evictions.
    full_until: u64,
    stats: PageStats,
}

/// A page of a slab, by their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    slab: usize,
    page: usize,
}

#[derive(Debug)]
struct Page {
    place: Place,
    address: u64,
    pins: u32,
    used: u64,
}

/// Pages that stay where they are until this is dropped.
#[derive(Debug)]
pub struct Pinned<'a> {
    cache: &'a PageCache,
    versions: Vec<u64>,
    addresses: Vec<u64>,
}

impl PageCache {
    /// Takes at most `budget_bytes` of `device` for pages of `page_bytes`, when they are needed. Refuses a budget without room
    /// for one page.
    pub fn new(device: Arc<dyn Device>, page_bytes: usize, budget_bytes: usize) -> Result<Self, Error> {
        let limit = budget_bytes.checked_div(page_bytes).unwrap_or(0);
        if limit == 0 {
            let problem = format!("is {budget_bytes} bytes, one page has {page_bytes}; hint: raise it");
            return Err(Error::Invalid { field: "budget_bytes", problem });
        }
        Ok(Self { device, page_bytes, limit, state: Mutex::default() })
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// Pages that fit the budget.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Figures so far.
    pub fn stats(&self) -> PageStats {
        let state = self.lock();
        let reserved_bytes = state.slabs.iter().map(Buffer::bytes).sum();
        PageStats { pages: state.pages.len(), reserved_bytes, ..state.stats }
    }

    /// Pins pages for the tiles of `versions`, in order, as many of them as there is room for beside what others have pinned
    /// (`Pinned::len` tells; at least one if `versions` has one). `fill(index, page)` brings the tile of `versions[index]` to
    /// a page, by calls of the device that take effect in order.
    ///
    /// Refuses when there is room for none, which may pass: with [`Error::OutOfPages`] where all pages are in use, with
    /// [`Error::OutOfMemory`] where the device has no memory for any; passes faults of `fill` on.
    pub fn pin(
        &self,
        versions: &[u64],
        mut fill: impl FnMut(usize, Span<'_>) -> Result<(), Error>,
    ) -> Result<Pinned<'_>, Error> {
        let mut pinned = Pinned { cache: self, versions: Vec::new(), addresses: Vec::new() };
        // An error drops `pinned`, which takes the lock: so it is held page by page.
        for (index, &version) in versions.iter().enumerate() {
            let found = self.lock().find(version);
            let address = match found {
                Some(address) => address,
                None => match self.bring(version, |page| fill(index, page)) {
                    Ok(address) => address,
                    Err(error) if index > 0 && error.retryable() => {
                        self.lock().stats.shortages += 1;
                        break;
                    }
                    Err(error) => return Err(error),
                },
            };
            pinned.versions.push(version);
            pinned.addresses.push(address);
        }
        Ok(pinned)
    }

    /// Finds room and fills it. The lock is held meanwhile, so that nobody else finds a page that is not filled yet.
    fn bring(&self, version: u64, fill: impl FnOnce(Span<'_>) -> Result<(), Error>) -> Result<u64, Error> {
        let mut state = self.lock();
        // Another caller may have brought it since it was missed.
        if let Some(address) = state.find(version) {
            return Ok(address);
        }
        let place = state.room(self)?;
        let filled = state.slabs[place.slab]
            .span(place.page * self.page_bytes, self.page_bytes)
            .and_then(|page| fill(page).map(|()| page.address()));
        let address = match filled {
            Ok(address) => address,
            Err(error) => {
                state.free.push(place);
                return Err(error);
            }
        };
        state.stats.misses += 1;
        state.pages.insert(version, Page { place, address, pins: 1, used: 0 });
        Ok(address)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Address of a version that is here; pins it.
    fn find(&mut self, version: u64) -> Option<u64> {
        let page = self.pages.get_mut(&version)?;
        if page.pins == 0 {
            self.idle.remove(&page.used);
        }
        page.pins += 1;
        self.stats.hits += 1;
        Some(page.address)
    }

    fn unpin(&mut self, version: u64) {
        let page = self.pages.get_mut(&version).expect("what is pinned is here");
        page.pins -= 1;
        if page.pins == 0 {
            self.uses += 1;
            page.used = self.uses;
            self.idle.insert(page.used, version);
        }
    }

    /// A page that holds nothing: a free one, one of a new slab, or that of the tile not used for longest.
    fn room(&mut self, cache: &PageCache) -> Result<Place, Error> {
        if self.free.is_empty() {
            self.grow(cache)?;
        }
        if let Some(place) = self.free.pop() {
            return Ok(place);
        }
        let Some((_, version)) = self.idle.pop_first() else {
            let problem = format!("all {} pages are in use", self.pages.len());
            return Err(Error::OutOfPages { problem });
        };
        let page = self.pages.remove(&version).expect("what is idle is here");
        self.stats.evictions += 1;
        Ok(page.place)
    }

    /// Takes another slab, if the budget and the device allow it: a smaller one where the device has no room for a large one.
    fn grow(&mut self, cache: &PageCache) -> Result<(), Error> {
        let mut count = (cache.limit - self.pages.len()).min((SLAB_BYTES / cache.page_bytes).max(1));
        if self.stats.evictions < self.full_until {
            return Ok(());
        }
        while count > 0 {
            match Buffer::new(&cache.device, count * cache.page_bytes) {
                Ok(slab) => {
                    let slab_number = self.slabs.len();
                    self.free.extend((0..count).rev().map(|page| Place { slab: slab_number, page }));
                    self.slabs.push(slab);
                    return Ok(());
                }
                Err(Error::OutOfMemory { .. }) if count > 1 => count /= 2,
                // Less than the budget is there: go on with that, unless it is nothing.
                Err(Error::OutOfMemory { .. }) if !self.pages.is_empty() => {
                    self.full_until = self.stats.evictions + REFUSED_EVICTIONS;
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Pinned<'_> {
    /// Pages that are pinned: those of the first so many versions.
    pub fn len(&self) -> usize {
        self.addresses.len()
    }

    /// True when no version was given.
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }

    /// Where they lie.
    pub fn addresses(&self) -> &[u64] {
        &self.addresses
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        let mut state = self.cache.lock();
        for &version in &self.versions {
            state.unpin(version);
        }
    }
}

#[cfg(test)]
mod tests;
