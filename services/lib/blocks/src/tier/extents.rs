//! Places for blocks on a tier: all of one size, so that any one serves any block and nothing has to be moved to make room.

use std::{
    collections::BTreeSet,
    sync::{Arc, OnceLock},
};

/// A place for one block. Whoever reads it holds it: a place is given to another block only once nobody holds it any more, so
/// a late reader never reads another block's bytes.
#[derive(Debug, PartialEq, Eq)]
pub struct Extent {
    index: u64,
    content: OnceLock<u64>,
}

impl Extent {
    /// Number of the place, from 0 to below the tier's capacity.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// A number for what lies here, which `name` makes when it is first asked for: the same until another block has the place.
    pub fn content(&self, name: impl FnOnce() -> u64) -> u64 {
        *self.content.get_or_init(name)
    }

    fn new(index: u64) -> Arc<Self> {
        Arc::new(Self { index, content: OnceLock::new() })
    }
}

/// The places of a tier.
#[derive(Debug)]
pub struct Extents {
    capacity: u64,
    /// Places from here on were never given out.
    next: u64,
    /// Places below `next` that nobody has.
    free: BTreeSet<u64>,
    /// Places whose block is gone, some still held by readers.
    retired: Vec<Arc<Extent>>,
}

impl Extents {
    /// `capacity` empty places.
    pub fn new(capacity: u64) -> Self {
        Self { capacity, next: 0, free: BTreeSet::new(), retired: Vec::new() }
    }

    /// Most blocks.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Places that a block or a reader has.
    pub fn used(&self) -> u64 {
        self.next - self.free.len() as u64
    }

    /// An empty place, the lowest one, or none.
    pub fn take(&mut self) -> Option<Arc<Extent>> {
        self.reclaim();
        let index = match self.free.pop_first() {
            Some(index) => index,
            None if self.next < self.capacity => {
                self.next += 1;
                self.next - 1
            }
            None => return None,
        };
        Some(Extent::new(index))
    }

    /// A certain place, found full at a start; none when it is taken or beyond the capacity.
    pub fn claim(&mut self, index: u64) -> Option<Arc<Extent>> {
        if index >= self.capacity {
            return None;
        }
        if index >= self.next {
            self.free.extend(self.next..index);
            self.next = index + 1;
        } else if !self.free.remove(&index) {
            return None;
        }
        Some(Extent::new(index))
    }

    /// Takes a place back; it is empty once its last reader let go.
    pub fn retire(&mut self, extent: Arc<Extent>) {
        self.retired.push(extent);
        self.reclaim();
    }

    /// Empties the retired places that nobody reads.
    pub fn reclaim(&mut self) {
        let free = &mut self.free;
        self.retired.retain(|extent| {
            let read = Arc::strong_count(extent) > 1;
            if !read {
                free.insert(extent.index);
            }
            read
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_given_again_only_when_its_last_reader_let_go() {
        let mut extents = Extents::new(1);
        let first = extents.take().unwrap();
        assert!(extents.take().is_none());
        let reader = first.clone();
        assert_eq!([first.content(|| 7), reader.content(|| 8)], [7, 7]);
        extents.retire(first);
        assert!(extents.take().is_none(), "a reader holds it");
        assert_eq!(extents.used(), 1);
        drop(reader);
        let second = extents.take().unwrap();
        assert_eq!((second.index(), second.content(|| 8)), (0, 8), "another block's");
    }

    #[test]
    fn places_found_at_a_start_are_taken_and_the_others_empty() {
        let mut extents = Extents::new(5);
        let held = [3, 1].map(|index| extents.claim(index).unwrap());
        assert!(extents.claim(3).is_none() && extents.claim(5).is_none());
        let taken: Vec<_> = std::iter::from_fn(|| extents.take()).map(|extent| extent.index()).collect();
        assert_eq!(taken, [0, 2, 4]);
        assert_eq!((extents.used(), held.len()), (5, 2));
    }
}
