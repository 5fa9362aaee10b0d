//! An output that the tasks of a region share.
#![allow(
    unsafe_code,
    reason = "tasks write disjoint parts of one slice, which the borrow checker cannot see"
)]

use std::{marker::PhantomData, ops::Range};

/// A slice whose disjoint parts several tasks write at once.
#[derive(Debug)]
pub struct DisjointSlice<'a, T> {
    start: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut [T]` whose parts go to other threads, each part to one at a time (the promise of `range`).
unsafe impl<T: Send> Send for DisjointSlice<'_, T> {}
// SAFETY: as above; a shared reference gives nothing but parts.
unsafe impl<T: Send> Sync for DisjointSlice<'_, T> {}

impl<'a, T> DisjointSlice<'a, T> {
    /// Borrows `slice` for as long as its parts may be written.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), lifetime: PhantomData }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements in `range`; panics when it is out of bounds.
    ///
    /// # Safety
    ///
    /// No two parts that overlap may exist at the same time.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that parts do not overlap")]
    pub unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} must lie within 0..{}",
            self.len
        );
        // SAFETY: the range is within the borrowed slice, and the caller keeps parts disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::DisjointSlice;

    #[test]
    fn parts_are_the_slice() {
        let mut data = [0; 10];
        let shared = DisjointSlice::new(&mut data);
        std::thread::scope(|scope| {
            for part in 0..5 {
                let shared = &shared;
                // SAFETY: the parts are 0..2, 2..4, and so on.
                scope.spawn(move || unsafe { shared.range(part * 2..part * 2 + 2) }.fill(part));
            }
        });
        assert_eq!(data, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]);
    }

    #[test]
    #[should_panic(expected = "must lie within 0..3")]
    fn a_part_beyond_the_end_is_refused() {
        let mut data = [0; 3];
        let shared = DisjointSlice::new(&mut data);
        // SAFETY: the only part.
        unsafe { shared.range(2..4) }.fill(1);
    }
}
