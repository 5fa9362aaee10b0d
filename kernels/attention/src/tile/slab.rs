//! Memory for many tiles of one shape: slabs of 2 MiB pages, cut into slots of one tile. A tile owns its slot and gives it back
//! when it is dropped, so that a slot never has two tiles; a slab without tiles goes back to the operating system.

#![allow(unsafe_code, reason = "slots of a slab are lent out as memory of their own; see the SAFETY notes")]

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::{Deref, DerefMut},
    ptr::NonNull,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use memmap2::{Advice, MmapMut};

use super::{Line, Memory, Tile};
use crate::{Error, TileShape};

/// Size and alignment of a huge page.
const HUGE_PAGE: usize = 2 << 20;
/// Largest slab, unless a tile needs more: what may stay behind when everything is dropped.
const SLAB_MAX: usize = 16 << 20;
/// Share of the budget that one slab has.
const SLABS_MIN: u64 = 32;

/// Where tiles of one shape get their memory. Clones share it.
#[derive(Debug, Clone)]
pub struct TileSlabs {
    shared: Arc<Shared>,
}

/// What slabs occupy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SlabStats {
    /// Bytes of all slabs.
    pub mapped_bytes: u64,
    /// Bytes of the slots that tiles have.
    pub used_bytes: u64,
}

#[derive(Debug)]
struct Shared {
    slot_lines: usize,
    slots: u32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    slabs: BTreeMap<u64, Slab>,
    /// Slabs that have a free slot.
    open: BTreeSet<u64>,
    /// Slabs without tiles; one is kept, so that a tile more or less does not map and unmap.
    empty: BTreeSet<u64>,
    last: u64,
    used: u64,
}

#[derive(Debug)]
struct Slab {
    map: MmapMut,
    /// Start of the first slot in `map`, on a huge page's boundary.
    start: usize,
    /// Slots that were given back.
    free: Vec<u32>,
    /// Slots from here on were never used, and take no memory yet.
    fresh: u32,
    used: u32,
}

impl TileSlabs {
    /// For about `budget_bytes` of tiles of `shape`, which must be valid. Takes no memory yet.
    pub fn new(shape: TileShape, budget_bytes: u64) -> Self {
        let slot_lines = shape.bytes().div_ceil(size_of::<Line>()).max(1);
        let slot_bytes = slot_lines * size_of::<Line>();
        let share = usize::try_from(budget_bytes / SLABS_MIN).unwrap_or(SLAB_MAX).clamp(HUGE_PAGE, SLAB_MAX);
        let slab_bytes = share.max(slot_bytes).next_multiple_of(HUGE_PAGE);
        let slots = u32::try_from(slab_bytes / slot_bytes).unwrap_or(u32::MAX);
        Self { shared: Arc::new(Shared { slot_lines, slots, state: Mutex::default() }) }
    }

    /// Copies a body that came from elsewhere, as [`Tile::from_bytes`].
    pub fn tile(&self, shape: TileShape, body: &[u8]) -> Result<Tile, Error> {
        shape.validate()?;
        Tile::check_length(shape, body.len())?;
        self.fill(shape, |bytes| {
            bytes.copy_from_slice(body);
            Ok(())
        })
    }

    /// A tile whose body `fill` writes whole; what it leaves is whatever was there before. `shape` must be valid.
    pub fn fill<E>(
        &self,
        shape: TileShape,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Tile, E> {
        assert!(shape.validate().is_ok(), "tile of an invalid shape: {shape:?}");
        let lines = shape.bytes().div_ceil(size_of::<Line>());
        // Without memory for a slab there may be some for a tile; other shapes are nobody's business here.
        let slot = (lines == self.shared.slot_lines).then(|| self.slot()).flatten();
        let mut tile = match slot {
            Some(slot) => Tile { shape, lines: Memory::Slot(slot) },
            None => Tile::zeroed(shape),
        };
        fill(tile.bytes_mut())?;
        Ok(tile)
    }

    /// What slabs occupy now.
    pub fn stats(&self) -> SlabStats {
        let state = self.shared.lock();
        let slab_bytes = u64::from(self.shared.slots) * self.shared.slot_bytes() as u64;
        SlabStats {
            mapped_bytes: state.slabs.len() as u64 * slab_bytes,
            used_bytes: state.used * self.shared.slot_bytes() as u64,
        }
    }

    /// A free slot, of the slab that was mapped first, so that later ones empty. None when no memory can be had.
    fn slot(&self) -> Option<Slot> {
        let mut state = self.shared.lock();
        let number = match state.open.first() {
            Some(number) => *number,
            None => state.map(&self.shared)?,
        };
        let slab = state.slabs.get_mut(&number).expect("open slabs are mapped");
        let index = slab.free.pop().unwrap_or_else(|| {
            slab.fresh += 1;
            slab.fresh - 1
        });
        slab.used += 1;
        let offset = slab.start + index as usize * self.shared.slot_bytes();
        // SAFETY: `index` is below `slots`, so the slot ends within the map: see `State::map`.
        let memory = unsafe { slab.map.as_mut_ptr().add(offset) };
        let full = slab.used == self.shared.slots;
        state.used += 1;
        state.empty.remove(&number);
        if full {
            state.open.remove(&number);
        }
        let memory = NonNull::new(memory.cast::<Line>()).expect("a map is not at address 0");
        Some(Slot { shared: self.shared.clone(), slab: number, index, memory })
    }
}

impl Shared {
    fn slot_bytes(&self) -> usize {
        self.slot_lines * size_of::<Line>()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock can panic half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Maps one more slab.
    fn map(&mut self, shared: &Shared) -> Option<u64> {
        let bytes = shared.slots as usize * shared.slot_bytes();
        let map = MmapMut::map_anon(bytes + HUGE_PAGE).ok()?;
        let start = map.as_ptr().align_offset(HUGE_PAGE);
        assert!(start <= HUGE_PAGE, "bytes can be aligned to anything");
        // Where the kernel gives no huge pages, small ones do.
        let _refused_or_done = map.advise(Advice::HugePage);
        self.last += 1;
        self.slabs.insert(self.last, Slab { map, start, free: Vec::new(), fresh: 0, used: 0 });
        self.open.insert(self.last);
        self.empty.insert(self.last);
        Some(self.last)
    }

    /// Takes a slot back; returns a slab that nobody needs any more.
    fn give_back(&mut self, number: u64, index: u32) -> Option<Slab> {
        let slab = self.slabs.get_mut(&number).expect("slabs with tiles are mapped");
        slab.free.push(index);
        slab.used -= 1;
        self.used -= 1;
        self.open.insert(number);
        if slab.used > 0 {
            return None;
        }
        self.empty.insert(number);
        // One stays.
        if self.empty.len() < 2 {
            return None;
        }
        let surplus = self.empty.pop_last().expect("there are two");
        self.open.remove(&surplus);
        self.slabs.remove(&surplus)
    }
}

/// Memory of one tile in a slab.
#[derive(Debug)]
pub(super) struct Slot {
    shared: Arc<Shared>,
    slab: u64,
    index: u32,
    memory: NonNull<Line>,
}

// SAFETY: a slot is memory that nobody else has, as a Vec is; what is shared behind it is locked.
unsafe impl Send for Slot {}
// SAFETY: as above; through a shared slot its lines can only be read.
unsafe impl Sync for Slot {}

impl Deref for Slot {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        // SAFETY: the slot's lines lie in a map that stays while a slot of it is out, are aligned (slots begin on multiples of
        // a line from a page's boundary) and initialised (maps begin as zeros), and no other slot overlaps them.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.shared.slot_lines) }
    }
}

impl DerefMut for Slot {
    fn deref_mut(&mut self) -> &mut [Line] {
        // SAFETY: as for `deref`; `self` is borrowed exclusively, and with it the lines.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.shared.slot_lines) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let surplus = self.shared.lock().give_back(self.slab, self.index);
        // Unmapped outside of the lock.
        drop(surplus);
    }
}

#[cfg(test)]
mod tests;
