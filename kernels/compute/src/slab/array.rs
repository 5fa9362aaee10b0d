//! Numbers of one type in a buffer.

use std::{
    marker::PhantomData,
    ops::{Deref, DerefMut},
};

use bytemuck::Pod;

use super::SlabBuffer;

/// Plain values in a [`SlabBuffer`]; a boxed slice in huge pages.
#[derive(Debug, Clone)]
pub struct SlabArray<T> {
    buffer: SlabBuffer,
    element: PhantomData<T>,
}

impl<T: Pod> SlabArray<T> {
    /// `len` zeros. `T` needs no more than the alignment of a buffer, 64.
    pub fn zeroed(len: usize) -> Self {
        const { assert!(align_of::<T>() <= super::ALIGNMENT && size_of::<T>() > 0) };
        let bytes = len.checked_mul(size_of::<T>()).expect("the bytes of an array can be counted");
        Self { buffer: SlabBuffer::zeroed(bytes), element: PhantomData }
    }
}

impl<T: Pod> Deref for SlabArray<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(&self.buffer)
    }
}

impl<T: Pod> DerefMut for SlabArray<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_those_of_a_slice() {
        let mut array = SlabArray::<[f32; 3]>::zeroed(5);
        assert_eq!(*array, [[0.0; 3]; 5]);
        array[4] = [1.0, 2.0, 3.0];
        assert_eq!((array.clone()[4], array.len()), ([1.0, 2.0, 3.0], 5));
        assert!(SlabArray::<u64>::zeroed(0).is_empty());
    }
}
