//! Bytes in the pieces in which they came.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};

/// Consecutive bytes in pieces, none of them empty. Cheap to clone and to split.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rope {
    pieces: VecDeque<Bytes>,
    bytes: usize,
}

impl Rope {
    /// Adds a piece at the end.
    pub(crate) fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.bytes += piece.len();
            self.pieces.push_back(piece);
        }
    }

    /// Takes the first `count` bytes; `None` when there are fewer.
    pub(crate) fn take_front(&mut self, count: usize) -> Option<Self> {
        if count > self.bytes {
            return None;
        }
        let mut front = Self::default();
        while front.bytes < count {
            let missing = count - front.bytes;
            let piece = self.pieces.front_mut()?;
            if piece.len() <= missing {
                front.push(self.pieces.pop_front()?);
            } else {
                front.push(piece.split_to(missing));
            }
        }
        self.bytes -= count;
        Some(front)
    }

    /// The first byte, taken.
    pub(crate) fn next_byte(&mut self) -> Option<u8> {
        self.has_remaining().then(|| self.get_u8())
    }

    pub(crate) fn into_pieces(self) -> Vec<Bytes> {
        self.pieces.into()
    }
}

impl Buf for Rope {
    fn remaining(&self) -> usize {
        self.bytes
    }

    fn chunk(&self) -> &[u8] {
        self.pieces.front().map_or(&[], |piece| piece)
    }

    fn advance(&mut self, mut count: usize) {
        assert!(count <= self.bytes, "advanced beyond the end");
        self.bytes -= count;
        while count > 0 {
            let piece = self.pieces.front_mut().expect("the count of bytes is that of the pieces");
            let step = count.min(piece.len());
            piece.advance(step);
            if piece.is_empty() {
                self.pieces.pop_front();
            }
            count -= step;
        }
    }

    fn copy_to_bytes(&mut self, count: usize) -> Bytes {
        let front = self.take_front(count).expect("asked for more bytes than there are");
        if front.pieces.len() <= 1 {
            return front.pieces.into_iter().next().unwrap_or_default();
        }
        let mut all = BytesMut::with_capacity(count);
        front.pieces.iter().for_each(|piece| all.extend_from_slice(piece));
        all.freeze()
    }
}
