//! Which slabs there are, and which places in them are free.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ptr::NonNull,
};

use memmap2::MmapMut;

/// Bytes of a huge page.
const PAGE: usize = 2 << 20;

/// Pages of a slab, at most, but for buffers that are larger than so many.
const PAGES_MAX: usize = 16;

/// A slab has as many pages as it takes to leave no more than one part in so many unused.
const WASTE: usize = 16;

/// Where a buffer lies: slab and place in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    slab: u64,
    index: u32,
}

/// The slabs of the process, by the bytes of their buffers.
#[derive(Debug)]
pub(super) struct Sizes {
    sizes: BTreeMap<usize, Size>,
    /// The one empty slab that is kept: bytes of its buffers, and its name.
    spare: Option<(usize, u64)>,
}

/// Slabs for buffers of one size.
#[derive(Debug, Default)]
struct Size {
    slabs: BTreeMap<u64, Slab>,
    /// Those with free places. The oldest are filled first, so that the youngest become empty.
    open: BTreeSet<u64>,
    next: u64,
}

/// Some huge pages.
#[derive(Debug)]
pub(super) struct Slab {
    /// Owns the memory, which is reached through `start` alone.
    _memory: MmapMut,
    /// The first place.
    start: NonNull<u8>,
    places: u32,
    /// Places that were never used; these and later ones are zero.
    fresh: u32,
    /// Places given back.
    free: Vec<u32>,
}

// SAFETY: the pointer leads into the memory that the slab owns.
unsafe impl Send for Slab {}

impl Sizes {
    pub(super) const fn new() -> Self {
        Self { sizes: BTreeMap::new(), spare: None }
    }

    /// A place for `bytes`, and whether it was used before; it is zero if not.
    pub(super) fn claim(&mut self, bytes: usize) -> io::Result<(NonNull<u8>, Place, bool)> {
        let size = self.sizes.entry(bytes).or_default();
        let name = match size.open.first() {
            Some(name) => *name,
            None => size.add(bytes)?,
        };
        if self.spare == Some((bytes, name)) {
            self.spare = None;
        }
        let slab = size.slabs.get_mut(&name).expect("an open slab is there");
        let (index, used_before) = slab.claim().expect("an open slab has a free place");
        if slab.is_full() {
            size.open.remove(&name);
        }
        // SAFETY: places lie within the memory of the slab.
        let start = unsafe { slab.start.add(index as usize * bytes) };
        Ok((start, Place { slab: name, index }, used_before))
    }

    /// Frees a place; gives the slab that nobody needs any more.
    pub(super) fn give_back(&mut self, bytes: usize, place: Place) -> Option<Slab> {
        let size = self.sizes.get_mut(&bytes).expect("the place has this size");
        let slab = size.slabs.get_mut(&place.slab).expect("a slab with a used place is there");
        slab.free.push(place.index);
        size.open.insert(place.slab);
        if !slab.is_empty() {
            return None;
        }
        let (bytes, name) = self.spare.replace((bytes, place.slab))?;
        let size = self.sizes.get_mut(&bytes)?;
        let unneeded = size.remove(name);
        if size.slabs.is_empty() {
            self.sizes.remove(&bytes);
        }
        unneeded
    }

    /// Slabs, and used places, of buffers of `bytes`.
    #[cfg(test)]
    pub(super) fn count(&self, bytes: usize) -> (usize, usize) {
        let slabs = self.sizes.get(&bytes).map(|size| &size.slabs);
        let used = slabs.into_iter().flatten().map(|(_, slab)| slab.used());
        (slabs.map_or(0, BTreeMap::len), used.sum())
    }
}

impl Size {
    /// Maps another slab and gives its name.
    fn add(&mut self, bytes: usize) -> io::Result<u64> {
        let slab = Slab::map(bytes)?;
        let name = self.next;
        self.next += 1;
        self.slabs.insert(name, slab);
        self.open.insert(name);
        Ok(name)
    }

    fn remove(&mut self, name: u64) -> Option<Slab> {
        self.open.remove(&name);
        self.slabs.remove(&name)
    }
}

impl Slab {
    fn map(bytes: usize) -> io::Result<Self> {
        let len = slab_bytes(bytes).ok_or(io::ErrorKind::OutOfMemory)?;
        // One page more, so that whole pages lie within wherever it begins.
        let mapped = len.checked_add(PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut memory = MmapMut::map_anon(mapped)?;
        let before = memory.as_ptr().addr().next_multiple_of(PAGE) - memory.as_ptr().addr();
        #[cfg(target_os = "linux")]
        // Small pages serve where the system refuses.
        drop(memory.advise_range(memmap2::Advice::HugePage, before, len));
        let start = NonNull::from(&mut memory[before..before + len]).cast();
        let places = u32::try_from(len / bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(Self { _memory: memory, start, places, fresh: 0, free: Vec::new() })
    }

    fn claim(&mut self) -> Option<(u32, bool)> {
        if let Some(index) = self.free.pop() {
            return Some((index, true));
        }
        let index = self.fresh;
        (index < self.places).then(|| {
            self.fresh += 1;
            (index, false)
        })
    }

    fn used(&self) -> usize {
        self.fresh as usize - self.free.len()
    }

    fn is_full(&self) -> bool {
        self.used() == self.places as usize
    }

    fn is_empty(&self) -> bool {
        self.used() == 0
    }
}

/// Bytes of a slab for buffers of `bytes`: whole huge pages. `None` when there cannot be so many.
fn slab_bytes(bytes: usize) -> Option<usize> {
    let least = bytes.checked_next_multiple_of(PAGE)?;
    let few = (least / PAGE..=PAGES_MAX).map(|pages| pages * PAGE);
    let mut frugal = few.filter(|len| (len % bytes) * WASTE <= *len);
    Some(frugal.next().unwrap_or(least))
}
