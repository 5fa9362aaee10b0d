//! K and V of one block in one layer: owns the bytes and where each element lies; never computes with them.

mod element;
mod promise;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use longshore_compute::SlabBuffer;

use crate::shape::LANES;
use crate::simd::Lane;
use crate::{Error, KvDtype, TileShape};

pub(crate) use element::Element;
pub use promise::Promise;

#[cfg(target_endian = "big")]
compile_error!("tiles travel as little-endian bytes and are read in place");

/// 64 bytes on a cache-line boundary, where elements of any type can lie.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; 64]);

/// K and V of one block in one layer, in the CPU layout ([`crate::LAYOUT_CPU_PANELS`]), 64-byte aligned, in huge pages where
/// the system has them. Elements never written are zero.
#[derive(Debug, Clone)]
pub struct Tile {
    shape: TileShape,
    body: SlabBuffer,
    version: u64,
}

/// A number that no tile of this process had before.
fn next_version() -> u64 {
    versions(1)
}

/// The first of so many.
fn versions(count: u64) -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(count, Ordering::Relaxed)
}

/// K and V of one head, as they are stored.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head<'a, E> {
    /// `[block / 16][head_dim]` lanes.
    pub(crate) k: &'a [[E; LANES]],
    /// `[ceil(head_dim / 16)][block]` lanes.
    pub(crate) v: &'a [[E; LANES]],
    /// Scales of the keys, 16 a lane; empty where elements have none.
    pub(crate) k_scales: &'a [Lane],
    /// Scales of the values, 16 a lane; empty where elements have none.
    pub(crate) v_scales: &'a [Lane],
}

impl AsRef<[u8]> for Tile {
    fn as_ref(&self) -> &[u8] {
        self.as_bytes()
    }
}

/// For whoever brings a body from elsewhere: as with [`Tile::from_bytes`], its checksum comes first.
impl AsMut<[u8]> for Tile {
    fn as_mut(&mut self) -> &mut [u8] {
        self.bytes_mut()
    }
}

impl Tile {
    /// An all-zero tile. `shape` must be valid.
    pub fn zeroed(shape: TileShape) -> Self {
        assert!(shape.validate().is_ok(), "tile of an invalid shape: {shape:?}");
        Self { shape, body: SlabBuffer::zeroed(shape.bytes()), version: next_version() }
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
        Ok(Self { shape, body: SlabBuffer::copied(body), version: next_version() })
    }

    /// A tile whose body `fill` writes, all of it; returns what `fill` returned too. Refuses an invalid shape. As with
    /// [`Self::from_bytes`], whoever takes bodies from others checks their checksum, of the tile.
    pub fn filled<T>(shape: TileShape, fill: impl FnOnce(&mut [u8]) -> T) -> Result<(Self, T), Error> {
        shape.validate()?;
        let mut tile = Self::zeroed(shape);
        let told = fill(tile.bytes_mut());
        Ok((tile, told))
    }

    /// A tile whose bytes are those of whoever had its memory before, until they are written ([`AsMut`]): for whoever writes all of them
    /// before anybody reads one. `shape` must be valid.
    pub fn unwritten(shape: TileShape) -> Self {
        assert!(shape.validate().is_ok(), "tile of an invalid shape: {shape:?}");
        Self { shape, body: SlabBuffer::unwritten(shape.bytes()), version: next_version() }
    }

    /// The body as it travels.
    pub fn as_bytes(&self) -> &[u8] {
        &self.body
    }

    /// Whoever takes this is going to write: what was copied elsewhere under the old version is old.
    fn bytes_mut(&mut self) -> &mut [u8] {
        self.version = next_version();
        &mut self.body
    }

    /// Names the content within this process: tiles of equal versions have equal bytes, and a tile that is written to gets a
    /// version that no tile had before. For copies of tiles on devices.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Sets versions aside for tiles that are read more than once from where they lie: the first of `count` that no tile gets but by
    /// [`Self::with_version`].
    pub fn reserve_versions(count: u32) -> u64 {
        versions(u64::from(count))
    }

    /// The same tile under a version that was reserved for its content, so that copies on devices which were made when it was read before
    /// are found. Its bytes must be those of every tile that ever had this version: whoever says so has compared the same checksum.
    #[must_use]
    pub fn with_version(self, version: u64) -> Self {
        Self { version, ..self }
    }

    /// Shape.
    pub fn shape(&self) -> TileShape {
        self.shape
    }

    /// Whether every element and scale is a number, neither infinite nor NaN; scales must not be negative either.
    pub fn is_finite(&self) -> bool {
        (0..self.shape.kv_heads).all(|head| match self.shape.dtype {
            KvDtype::F32 => self.head::<f32>(head).is_finite(),
            KvDtype::F16 => self.head::<f16>(head).is_finite(),
            KvDtype::Bf16 => self.head::<bf16>(head).is_finite(),
            KvDtype::Int8 => self.head::<i8>(head).is_finite(),
        })
    }

    /// Writes keys and values of consecutive tokens, f32 `[n, kv_heads, head_dim]` each, from token `offset` of the block
    /// on.
    ///
    /// f16 and bf16 round to nearest even; what is beyond the range becomes the largest finite number, and NaN stays NaN.
    /// int8 stores a token's head under the scale `max|x| / 127` (f32), each element as `x / scale` rounded to the nearest
    /// even integer; a head of zeros, or so small that the scale vanishes, has scale 0; one with NaN has scale NaN, which
    /// makes it NaN throughout; infinities count as the largest finite f32.
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
        match self.shape.dtype {
            KvDtype::F32 => self.write_as::<f32>(offset, keys, values),
            KvDtype::F16 => self.write_as::<f16>(offset, keys, values),
            KvDtype::Bf16 => self.write_as::<bf16>(offset, keys, values),
            KvDtype::Int8 => self.write_as::<i8>(offset, keys, values),
        }
        Ok(())
    }

    fn write_as<E: Element>(&mut self, offset: usize, keys: &[f32], values: &[f32]) {
        let shape = self.shape;
        let (dim, heads, parts) = (shape.head_dim, shape.kv_heads, shape.parts());
        let mut stored = vec![E::zeroed(); dim];
        let body = self.bytes_mut();
        for (index, (keys, values)) in keys.chunks_exact(dim).zip(values.chunks_exact(dim)).enumerate() {
            let (token, head) = (offset + index / heads, index % heads);
            let bytes = &mut body[head * shape.head_bytes()..][..shape.head_bytes()];
            let scale = E::narrow(keys, &mut stored);
            write_scale::<E>(&mut bytes[parts.k_scales.clone()], token, scale);
            let k = bytemuck::cast_slice_mut::<u8, E>(&mut bytes[parts.k.clone()]);
            for (to, &from) in k[k_place(dim, token, 0)..].iter_mut().step_by(LANES).zip(&stored) {
                *to = from;
            }
            let scale = E::narrow(values, &mut stored);
            write_scale::<E>(&mut bytes[parts.v_scales.clone()], token, scale);
            let v = bytemuck::cast_slice_mut::<u8, E>(&mut bytes[parts.v.clone()]);
            for (panel, from) in stored.chunks(LANES).enumerate() {
                v[v_place(shape.block_tokens, token, panel * LANES)..][..from.len()].copy_from_slice(from);
            }
        }
    }

    /// Reads one token back as (key, value), f32 `[kv_heads, head_dim]` each.
    pub fn read(&self, offset: usize) -> Result<(Vec<f32>, Vec<f32>), Error> {
        if offset >= self.shape.block_tokens {
            return Err(invalid(
                "offset",
                format!("is {offset}, the block has {} tokens", self.shape.block_tokens),
            ));
        }
        Ok(match self.shape.dtype {
            KvDtype::F32 => self.read_as::<f32>(offset),
            KvDtype::F16 => self.read_as::<f16>(offset),
            KvDtype::Bf16 => self.read_as::<bf16>(offset),
            KvDtype::Int8 => self.read_as::<i8>(offset),
        })
    }

    fn read_as<E: Element>(&self, token: usize) -> (Vec<f32>, Vec<f32>) {
        let (dim, block) = (self.shape.head_dim, self.shape.block_tokens);
        let all = (0..self.shape.kv_heads).flat_map(|head| (0..dim).map(move |element| (head, element)));
        all.map(|(head, element)| {
            let head = self.head::<E>(head);
            let scale = |scales: &[Lane]| scales.as_flattened().get(token).copied().unwrap_or(1.0);
            let k = head.k.as_flattened()[k_place(dim, token, element)].widen();
            let v = head.v.as_flattened()[v_place(block, token, element)].widen();
            (k * scale(head.k_scales), v * scale(head.v_scales))
        })
        .unzip()
    }

    /// One head; `E` must be the element type of the tile.
    #[inline(always)]
    pub(crate) fn head<E: Element>(&self, kv_head: usize) -> Head<'_, E> {
        assert_eq!(E::DTYPE, self.shape.dtype, "read as what it is");
        let (parts, size) = (self.shape.parts(), self.shape.head_bytes());
        let bytes = &self.as_bytes()[kv_head * size..][..size];
        Head {
            k: bytemuck::cast_slice(&bytes[parts.k]),
            v: bytemuck::cast_slice(&bytes[parts.v]),
            k_scales: bytemuck::cast_slice(&bytes[parts.k_scales]),
            v_scales: bytemuck::cast_slice(&bytes[parts.v_scales]),
        }
    }
}

impl Tile {
    /// Where a head lies in memory, which is of use to who wants it soon.
    #[inline(always)]
    pub(crate) fn head_address(&self, kv_head: usize) -> usize {
        self.body.as_ptr().addr() + kv_head * self.shape.head_bytes()
    }
}

impl<E: Element> Head<'_, E> {
    fn is_finite(&self) -> bool {
        let scales = [self.k_scales, self.v_scales];
        E::are_finite(self.k)
            && E::are_finite(self.v)
            && scales.iter().all(|lanes| lanes.iter().flatten().all(|x| x.is_finite() && *x >= 0.0))
    }
}

/// Where the parts of a head lie, in bytes from its start.
struct Parts {
    k: Range<usize>,
    v: Range<usize>,
    k_scales: Range<usize>,
    v_scales: Range<usize>,
}

impl TileShape {
    #[inline(always)]
    fn parts(&self) -> Parts {
        let k = self.k_head_elements() * self.dtype.bytes();
        let v = k + self.v_head_elements() * self.dtype.bytes();
        let scales = v + self.block_tokens * self.dtype.scale_bytes() / 2;
        Parts { k: 0..k, v: k..v, k_scales: v..scales, v_scales: scales..self.head_bytes() }
    }
}

fn write_scale<E: Element>(scales: &mut [u8], token: usize, scale: f32) {
    if E::SCALED {
        bytemuck::cast_slice_mut::<u8, f32>(scales)[token] = scale;
    }
}

/// Place of a key's element in the K panels of a head: `[token / 16][element][token % 16]`.
#[inline(always)]
pub(crate) fn k_place(head_dim: usize, token: usize, element: usize) -> usize {
    (token / LANES * head_dim + element) * LANES + token % LANES
}

/// Place of a value's element in the V panels of a head: `[element / 16][token][element % 16]`.
#[inline(always)]
pub(crate) fn v_place(block_tokens: usize, token: usize, element: usize) -> usize {
    (element / LANES * block_tokens + token) * LANES + element % LANES
}

fn invalid(field: &'static str, problem: String) -> Error {
    Error::Invalid { field, problem }
}

#[cfg(test)]
mod tests;
