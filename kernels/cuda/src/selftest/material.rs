//! What the comparisons are made of: numbers, tiles, pages on the device.

use std::sync::Arc;

use half::{bf16, f16};
use longshore_attention::{KvDtype, Tile, TileShape};

use crate::{Buffer, Device, Error, PageElement, PageShape, page_of};

/// Numbers from a seed (splitmix64): the same on every machine.
#[derive(Debug, Clone)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// From −1 to 1.
    pub(super) fn number(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
    }

    /// Below `end`.
    pub(super) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// `count` numbers from −`size` to `size`.
    pub(super) fn numbers(&mut self, count: usize, size: f32) -> Vec<f32> {
        (0..count).map(|_| self.number() * size).collect()
    }
}

/// The nearest that an element can be; 8-bit elements are multiplied as f16.
pub(super) fn rounded(element: PageElement, numbers: &mut [f32]) {
    for x in numbers {
        *x = match element {
            PageElement::F32 => *x,
            PageElement::Bf16 => bf16::from_f32(*x).to_f32(),
            PageElement::F16 | PageElement::Int8 | PageElement::E4m3 => f16::from_f32(*x).to_f32(),
        };
    }
}

/// `√(Σ (found − wanted)² / Σ wanted²)`; infinite where one is no number and the other is not the same.
pub(super) fn relative(found: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(found.len(), wanted.len(), "compared with as many");
    let (mut off, mut all) = (0.0, 0.0);
    for (&found, &wanted) in found.iter().zip(wanted) {
        if found.to_bits() == wanted.to_bits() {
            all += if wanted.is_finite() { f64::from(wanted) * f64::from(wanted) } else { 0.0 };
            continue;
        }
        let difference = f64::from(found) - f64::from(wanted);
        off += difference * difference;
        all += f64::from(wanted) * f64::from(wanted);
    }
    match off {
        0.0 => 0.0,
        off if off.is_nan() || all.is_nan() => f64::INFINITY,
        off => (off / all).sqrt(),
    }
}

/// How many differ.
pub(super) fn differing<T: PartialEq>(found: &[T], wanted: &[T]) -> f64 {
    assert_eq!(found.len(), wanted.len(), "compared with as many");
    found.iter().zip(wanted).filter(|(found, wanted)| found != wanted).count() as f64
}

/// Tiles full of random keys and values.
pub(super) fn random_tiles(random: &mut Random, shape: TileShape, count: usize, size: f32) -> Vec<Tile> {
    let elements = shape.block_tokens * shape.kv_heads * shape.head_dim;
    (0..count)
        .map(|_| {
            let mut tile = Tile::zeroed(shape);
            let (keys, values) = (random.numbers(elements, size), random.numbers(elements, 1.0));
            tile.write(0, &keys, &values).expect("as many tokens as the tile has");
            tile
        })
        .collect()
}

/// Pages on the device, in one slab in an order of their own, and the table of their addresses.
#[derive(Debug)]
pub(super) struct Pages {
    pub(super) slab: Buffer,
    pub(super) table: Buffer,
    pub(super) addresses: Vec<u64>,
}

impl Pages {
    /// Copies bodies of one size to the device.
    pub(super) fn new(device: &Arc<dyn Device>, bodies: &[Vec<u8>]) -> Result<Self, Error> {
        let size = bodies.first().map_or(0, Vec::len);
        // The last comes first: neighbours in the table are none in memory.
        let all: Vec<u8> = bodies.iter().rev().flatten().copied().collect();
        let slab = Buffer::from_slice(device, &all)?;
        let place = |index: usize| slab.address() + ((bodies.len() - 1 - index) * size) as u64;
        let addresses: Vec<u64> = (0..bodies.len()).map(place).collect();
        let table = Buffer::from_slice(device, &addresses)?;
        Ok(Self { slab, table, addresses })
    }

    /// Room for `count` pages of `bytes` bytes, filled with ones.
    pub(super) fn empty(device: &Arc<dyn Device>, count: usize, bytes: usize) -> Result<Self, Error> {
        Self::new(device, &vec![vec![0xff; bytes]; count])
    }

    /// The bodies, as they are on the device.
    pub(super) fn bodies(&self) -> Result<Vec<Vec<u8>>, Error> {
        let (all, count) = (self.slab.to_vec::<u8>()?, self.addresses.len());
        let size = all.len() / count.max(1);
        Ok(all.chunks_exact(size.max(1)).rev().map(<[u8]>::to_vec).collect())
    }
}

/// Pages of tiles.
pub(super) fn pages_of(tiles: &[Tile]) -> Vec<Vec<u8>> {
    tiles.iter().map(|tile| page_of(tile).expect("a shape that pages have")).collect()
}

/// Overwrites what a page holds from token `len` on with ones (NaN, or 255): nobody may look at it.
pub(super) fn spoil(shape: &PageShape, page: &mut [u8], len: usize) {
    let row = shape.head_dim * shape.element.bytes();
    for head in page.chunks_exact_mut(shape.head_bytes()) {
        let (sides, scales) = head.split_at_mut(2 * shape.side_bytes());
        sides.chunks_exact_mut(shape.side_bytes()).for_each(|side| side[len * row..].fill(0xff));
        scales.chunks_exact_mut(4 * shape.tokens).for_each(|side| side[4 * len..].fill(0xff));
    }
}

/// The number that an E4M3 element is.
pub(super) fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let size = match exponent {
        0 => mantissa * (2.0_f32).powi(-9),
        _ => (1.0 + mantissa / 8.0) * (2.0_f32).powi(exponent - 7),
    };
    if bits & 0x80 == 0 { size } else { -size }
}

/// The f32 tile with what a page of E4M3 holds.
pub(super) fn widened(shape: &PageShape, page: &[u8]) -> Tile {
    let PageShape { tokens, kv_heads, head_dim, .. } = *shape;
    let tile = TileShape { block_tokens: tokens, kv_heads, head_dim, dtype: KvDtype::F32 };
    let mut sides = [vec![0.0; tokens * kv_heads * head_dim], vec![0.0; tokens * kv_heads * head_dim]];
    for (number, head) in page.chunks_exact(shape.head_bytes()).enumerate() {
        for (index, side) in sides.iter_mut().enumerate() {
            for at in 0..tokens * head_dim {
                let row = index * tokens + at / head_dim;
                let scale = &head[2 * shape.side_bytes() + 4 * row..][..4];
                let scale = f32::from_le_bytes(scale.try_into().expect("4 bytes"));
                let to = (at / head_dim * kv_heads + number) * head_dim + at % head_dim;
                side[to] = e4m3(head[index * shape.side_bytes() + at]) * scale;
            }
        }
    }
    let mut widened = Tile::zeroed(tile);
    widened.write(0, &sides[0], &sides[1]).expect("as many tokens as the tile has");
    widened
}
