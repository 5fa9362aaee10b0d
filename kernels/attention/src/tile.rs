//! K and V of one block in one layer: owns the bytes and where each element lies; never computes with them.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use half::f16;

use crate::shape::LANES;
use crate::{Error, KvDtype, TileShape};

#[cfg(target_endian = "big")]
compile_error!("tiles travel as little-endian bytes and are read in place");

/// 64 bytes on a cache-line boundary: what gives a tile its alignment.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// 16 keys of one element of K, or 16 columns of one row of V.
pub(crate) type Lane = [f32; LANES];

/// K and V of one block in one layer, in the CPU layout ([`crate::LAYOUT_CPU_PANELS`]), 64-byte aligned. Elements never
/// written are zero.
#[derive(Debug, Clone)]
pub struct Tile {
    shape: TileShape,
    lines: Vec<Line>,
}

/// Room for the f32 copy of one head of a 2-byte tile.
#[derive(Debug, Default)]
pub(crate) struct Widened {
    lanes: Vec<Lane>,
}

impl Tile {
    /// An all-zero tile. `shape` must be valid.
    pub fn zeroed(shape: TileShape) -> Self {
        assert!(shape.validate().is_ok(), "tile of an invalid shape: {shape:?}");
        Self { shape, lines: vec![Line::zeroed(); shape.bytes().div_ceil(size_of::<Line>())] }
    }

    /// Copies a body that came from elsewhere; refuses an invalid shape and a wrong length. The elements are not
    /// looked at: whoever takes bodies from others checks their checksum first.
    pub fn from_bytes(shape: TileShape, body: &[u8]) -> Result<Self, Error> {
        shape.validate()?;
        if body.len() != shape.bytes() {
            return Err(invalid(
                "body",
                format!("has {} bytes, its shape needs {}", body.len(), shape.bytes()),
            ));
        }
        let mut tile = Self::zeroed(shape);
        bytemuck::cast_slice_mut::<Line, u8>(&mut tile.lines)[..body.len()].copy_from_slice(body);
        Ok(tile)
    }

    /// The body as it travels.
    pub fn as_bytes(&self) -> &[u8] {
        &bytemuck::cast_slice::<Line, u8>(&self.lines)[..self.shape.bytes()]
    }

    /// Shape.
    pub fn shape(&self) -> TileShape {
        self.shape
    }

    /// Writes keys and values of consecutive tokens, f32 `[n, kv_heads, head_dim]` each, from token `offset` of the block
    /// on. An f16 tile rounds to nearest even; values beyond its range become infinite.
    pub fn write(&mut self, offset: usize, keys: &[f32], values: &[f32]) -> Result<(), Error> {
        let row = self.shape.kv_heads * self.shape.head_dim;
        if keys.is_empty() || !keys.len().is_multiple_of(row) {
            return Err(invalid("keys", format!("has {} elements, must be a multiple of {row}", keys.len())));
        }
        if values.len() != keys.len() {
            return Err(invalid(
                "values",
                format!("has {} elements, keys have {}", values.len(), keys.len()),
            ));
        }
        let tokens = keys.len() / row;
        if offset.checked_add(tokens).is_none_or(|end| end > self.shape.block_tokens) {
            let block = self.shape.block_tokens;
            return Err(invalid(
                "offset",
                format!("is {offset}, {tokens} tokens end beyond the block of {block}"),
            ));
        }
        for (token, (keys, values)) in keys.chunks_exact(row).zip(values.chunks_exact(row)).enumerate() {
            for (index, (&key, &value)) in keys.iter().zip(values).enumerate() {
                let (k, v) = self.shape.element(offset + token, index);
                self.set(k, key);
                self.set(v, value);
            }
        }
        Ok(())
    }

    /// Reads one token back as (key, value), f32 `[kv_heads, head_dim]` each.
    pub fn read(&self, offset: usize) -> Result<(Vec<f32>, Vec<f32>), Error> {
        if offset >= self.shape.block_tokens {
            return Err(invalid(
                "offset",
                format!("is {offset}, the block has {} tokens", self.shape.block_tokens),
            ));
        }
        let places = (0..self.shape.kv_heads * self.shape.head_dim).map(|i| self.shape.element(offset, i));
        Ok(places.map(|(k, v)| (self.get(k), self.get(v))).unzip())
    }

    /// Key and value of one token and head: calls `each(element, key, value)` for every element of the head.
    pub(crate) fn read_head(&self, offset: usize, kv_head: usize, mut each: impl FnMut(usize, f32, f32)) {
        let dim = self.shape.head_dim;
        for element in 0..dim {
            let (k, v) = self.shape.element(offset, kv_head * dim + element);
            each(element, self.get(k), self.get(v));
        }
    }

    /// K panels and V panels of one head as f32: in place, or widened into `room`.
    #[inline(always)]
    pub(crate) fn head<'a>(&'a self, kv_head: usize, room: &'a mut Widened) -> (&'a [Lane], &'a [Lane]) {
        let range = self.shape.head_range(kv_head);
        let lanes = match self.shape.dtype {
            KvDtype::F32 => self.elements::<f32>()[range].as_chunks().0,
            KvDtype::F16 => {
                room.lanes.resize(range.len() / LANES, [0.0; LANES]);
                for (wide, &narrow) in
                    room.lanes.as_flattened_mut().iter_mut().zip(&self.elements::<u16>()[range])
                {
                    *wide = widen(narrow);
                }
                &room.lanes
            }
        };
        lanes.split_at(self.shape.k_head_elements() / LANES)
    }

    fn elements<T: Pod>(&self) -> &[T] {
        bytemuck::cast_slice(&self.lines)
    }

    fn get(&self, index: usize) -> f32 {
        match self.shape.dtype {
            KvDtype::F32 => self.elements::<f32>()[index],
            KvDtype::F16 => self.elements::<f16>()[index].to_f32(),
        }
    }

    fn set(&mut self, index: usize, value: f32) {
        match self.shape.dtype {
            KvDtype::F32 => bytemuck::cast_slice_mut::<Line, f32>(&mut self.lines)[index] = value,
            KvDtype::F16 => {
                bytemuck::cast_slice_mut::<Line, f16>(&mut self.lines)[index] = f16::from_f32(value)
            }
        }
    }
}

impl TileShape {
    /// Where a head lies in the body, in elements.
    fn head_range(&self, kv_head: usize) -> Range<usize> {
        let size = self.k_head_elements() + self.v_head_elements();
        kv_head * size..(kv_head + 1) * size
    }

    /// Where element `index` of `[kv_heads, head_dim]` of a token lies: (in K, in V), in elements from the body's start.
    fn element(&self, token: usize, index: usize) -> (usize, usize) {
        let (head, element) = (index / self.head_dim, index % self.head_dim);
        let start = self.head_range(head).start;
        let (k, v) = (k_place(self.head_dim, token, element), v_place(self.block_tokens, token, element));
        (start + k, start + self.k_head_elements() + v)
    }
}

/// The f32 of an f16's bits, exactly; in operations that the compiler can do on a whole vector at once.
#[inline(always)]
fn widen(narrow: u16) -> f32 {
    /// Difference of the exponents' biases, as a power of two.
    const REBIAS: f32 = f32::from_bits((127 + 112) << 23);
    const INFINITY: u32 = 0x7c00;

    let narrow = u32::from(narrow);
    let magnitude = narrow & 0x7fff;
    let finite = f32::from_bits(magnitude << 13) * REBIAS;
    let special = f32::from_bits((magnitude << 13) | f32::INFINITY.to_bits());
    let wide = if magnitude >= INFINITY { special } else { finite };
    f32::from_bits(wide.to_bits() | (narrow & 0x8000) << 16)
}

/// Place of a key's element in the K panels of a head: `[token / 16][element][token % 16]`.
pub(crate) fn k_place(head_dim: usize, token: usize, element: usize) -> usize {
    (token / LANES * head_dim + element) * LANES + token % LANES
}

/// Place of a value's element in the V panels of a head: `[element / 16][token][element % 16]`.
pub(crate) fn v_place(block_tokens: usize, token: usize, element: usize) -> usize {
    (element / LANES * block_tokens + token) * LANES + element % LANES
}

fn invalid(field: &'static str, problem: String) -> Error {
    Error::Invalid { field, problem }
}

#[cfg(test)]
mod tests;
