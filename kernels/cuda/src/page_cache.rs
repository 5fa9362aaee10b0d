//! Pages of the device: a bounded cache of tiles in device memory, by what they hold.

mod claim;
mod slabs;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};

use crate::{Buffer, Device, Error, Span};
use claim::Claim;
use slabs::{Place, Slabs};

/// Pages of one size on a device. A tile is found again by its [`longshore_attention::Tile::version`], so that its bytes cross
/// the bus once as long as there is room; the page that was not used for longest makes way. What is pinned stays.
///
/// Nothing is locked while pages are filled: others find what is there already meanwhile, and wait only for pages that they want too.
#[derive(Debug)]
pub struct PageCache {
    device: Arc<dyn Device>,
    page_bytes: usize,
    limit: usize,
    state: Mutex<State>,
    /// Told when pages were filled, given up or unpinned.
    changed: Condvar,
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
    /// Tiles that were brought, or begun with rows of the device.
    pub misses: u64,
    /// Tiles that made way.
    pub evictions: u64,
    /// Times that fewer pages than asked for could be pinned.
    pub shortages: u64,
    /// Times that memory of pages was given back to the device for something else.
    pub returned: u64,
}

#[derive(Debug, Default)]
struct State {
    slabs: Slabs,
    pages: HashMap<u64, Page>,
    /// Versions of unpinned pages by their last use.
    idle: BTreeMap<u64, u64>,
    uses: u64,
    /// Number of the next bringing.
    brought: u64,
    stats: PageStats,
}

#[derive(Debug)]
struct Page {
    place: Place,
    address: u64,
    pins: u32,
    used: u64,
    /// Which bringing this is: the same version may be given up and brought again.
    bringing: u64,
    /// Whether everything that fills it is queued.
    filled: bool,
}

/// A page that is to be filled.
#[derive(Debug)]
pub struct FreshPage {
    index: usize,
    version: u64,
    slab: Arc<Buffer>,
    offset: usize,
    bytes: usize,
}

impl FreshPage {
    /// Which of the versions it is for.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Where it is.
    pub fn span(&self) -> Result<Span<'_>, Error> {
        self.slab.span(self.offset, self.bytes)
    }
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
        Ok(Self { device, page_bytes, limit, state: Mutex::default(), changed: Condvar::new() })
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
        self.lock().stats()
    }

    /// The same, where nobody looks for pages at the moment: a device may be waited for meanwhile.
    pub fn try_stats(&self) -> Option<PageStats> {
        match self.state.try_lock() {
            Ok(state) => Some(state.stats()),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner().stats()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Pins pages for the tiles of `versions`, in order, as many of them as there is room for beside what others have pinned
    /// (`Pinned::len` tells; at least one if `versions` has one). `fill` brings the tiles of pages that hold none yet, by calls of the
    /// device that take effect in order. Where others have pinned all pages it waits for one: whoever has pinned some
    /// already must ask by [`Self::pin_beside`], or two may wait for each other.
    ///
    /// Refuses when there is room for none: with [`Error::OutOfPages`] where nothing makes way, with [`Error::OutOfMemory`] where the
    /// device has no memory for any; passes faults of `fill` on.
    pub fn pin(
        &self,
        versions: &[u64],
        fill: impl FnMut(&[FreshPage]) -> Result<(), Error>,
    ) -> Result<Pinned<'_>, Error> {
        self.pin_some(versions, true, fill)
    }

    /// The same beside pages that the caller has pinned: pins none rather than wait for one.
    pub fn pin_beside(
        &self,
        versions: &[u64],
        fill: impl FnMut(&[FreshPage]) -> Result<(), Error>,
    ) -> Result<Pinned<'_>, Error> {
        self.pin_some(versions, false, fill)
    }

    fn pin_some(
        &self,
        versions: &[u64],
        waits: bool,
        mut fill: impl FnMut(&[FreshPage]) -> Result<(), Error>,
    ) -> Result<Pinned<'_>, Error> {
        loop {
            let claim = Claim::new(self, versions, waits)?;
            if !claim.fresh().is_empty() {
                fill(claim.fresh())?;
            }
            let none = claim.is_empty();
            let pinned = claim.settle();
            // What another one was bringing to the first page did not come: it is brought by this one.
            if none || !pinned.is_empty() {
                return Ok(pinned);
            }
        }
    }

    /// How many of the tiles of `versions` have no page, nor one on its way.
    pub fn missing(&self, versions: &[u64]) -> usize {
        let state = self.lock();
        versions.iter().filter(|version| !state.pages.contains_key(version)).count()
    }

    /// Makes the page of one version that of another, for what is going to be written to it by launches; false where it has none that is filled,
    /// or somebody has it pinned, or the other version has a page already.
    pub fn take_over(&self, from: u64, to: u64) -> bool {
        self.lock().take_over(from, to)
    }

    /// Frees the pages of versions that name nothing, where nobody has them pinned.
    pub fn discard(&self, versions: &[u64]) {
        self.lock().discard(versions);
        self.changed.notify_all();
    }

    /// Gives memory back to the device, which needs it for something else: as much as holds no pinned page, what was not used for longest
    /// first, until there are `bytes`. Tells how many bytes; their tiles are brought again when they are wanted.
    pub fn give_back(&self, bytes: usize) -> usize {
        self.lock().give_back(bytes)
    }

    /// Bytes that hold no pinned page now: what [`Self::give_back`] could give.
    pub fn idle_bytes(&self) -> usize {
        self.lock().idle_bytes()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn stats(&self) -> PageStats {
        PageStats { pages: self.pages.len(), reserved_bytes: self.slabs.bytes(), ..self.stats }
    }

    /// A version that is here or on its way; pins it.
    fn find(&mut self, version: u64) -> Option<&Page> {
        let page = self.pages.get_mut(&version)?;
        if page.pins == 0 {
            self.idle.remove(&page.used);
        }
        page.pins += 1;
        self.stats.hits += 1;
        Some(page)
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

    fn take_over(&mut self, from: u64, to: u64) -> bool {
        let free = self.pages.get(&from).is_some_and(|page| page.pins == 0 && page.filled);
        if !free || self.pages.contains_key(&to) {
            return false;
        }
        let page = self.pages.remove(&from).expect("it was found");
        self.idle.insert(page.used, to);
        self.pages.insert(to, page);
        true
    }

    fn discard(&mut self, versions: &[u64]) {
        for version in versions {
            if self.pages.get(version).is_none_or(|page| page.pins > 0) {
                continue;
            }
            let page = self.pages.remove(version).expect("it was found");
            self.idle.remove(&page.used);
            self.slabs.give(page.place);
        }
    }

    /// A page for a version, pinned, which is to be filled.
    fn bring(&mut self, cache: &PageCache, (index, version): (usize, u64)) -> Result<FreshPage, Error> {
        let place = self.room(cache)?;
        let slab = Arc::clone(self.slabs.slab(place));
        let offset = place.page * cache.page_bytes;
        let (address, bringing) = (slab.address() + offset as u64, self.brought);
        self.brought += 1;
        self.pages.insert(version, Page { place, address, pins: 1, used: 0, bringing, filled: false });
        Ok(FreshPage { index, version, slab, offset, bytes: cache.page_bytes })
    }

    /// A page that holds nothing: a free one, one of a new slab, or that of the tile not used for longest.
    fn room(&mut self, cache: &PageCache) -> Result<Place, Error> {
        self.slabs.grow(cache, self.pages.len(), self.stats.evictions)?;
        if let Some(place) = self.slabs.take() {
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
}

impl Pinned<'_> {
    /// Pages that are pinned: those of the first so many versions.
    pub fn len(&self) -> usize {
        self.addresses.len()
    }

    /// True when none is.
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
        if self.versions.is_empty() {
            return;
        }
        let mut state = self.cache.lock();
        for &version in &self.versions {
            state.unpin(version);
        }
        self.cache.changed.notify_all();
    }
}

#[cfg(test)]
mod tests;
