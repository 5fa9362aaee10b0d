//! Keys and values in pages against tiles of the CPU, bit for bit.

use std::sync::Arc;

use longshore_attention::{KvDtype, Tile, TileShape};
use longshore_model::testing::{TinyArchitecture, TinyOptions};
use longshore_model::{Activations, Backend as _, Error, Qkv};

use super::{case, random, same_bits, tiny};
use crate::model::failed;
use crate::model::heads::Append;
use crate::model::programs::Precision;
use crate::selftest::Case;
use crate::{Buffer, Device};

const BLOCK_TOKENS: usize = 16;
/// Rows begin in the middle of one page and end in the middle of another.
const FIRST: usize = 9;
const ROWS: usize = 30;

pub(super) fn cases() -> Vec<Case> {
    let check = |dtype: KvDtype| {
        let architecture =
            if dtype == KvDtype::Bf16 { TinyArchitecture::Qwen2 } else { TinyArchitecture::Qwen3 };
        let name = format!("append to {} pages, {}", dtype.name(), architecture.name());
        case(name, 0.0, move |device| appended(device, dtype, architecture))
    };
    KvDtype::ALL.map(check).into_iter().collect()
}

fn appended(device: &Arc<dyn Device>, dtype: KvDtype, architecture: TinyArchitecture) -> Result<f64, Error> {
    let options = TinyOptions { architecture, head_dim: 20, ..TinyOptions::default() };
    let model = tiny::open(&options)?;
    let backend = tiny::backend(device, &model, Precision::F32)?;
    let heads = backend.config().heads;
    // One row is zero, one is no number.
    let mut x = random(ROWS * backend.config().hidden, 21);
    x[..64].fill(0.0);
    x[64] = f32::NAN;
    let x = Activations::from_host(backend.config().hidden, x);
    let positions: Vec<u64> = (0..ROWS as u64).map(|row| (1 << 31) - 15 + row).collect();
    let Qkv { q, k, v } = backend.qkv(1, &x, &positions)?;
    let shape =
        TileShape { block_tokens: BLOCK_TOKENS, kv_heads: heads.kv_heads, head_dim: heads.head_dim, dtype };
    let pages = Pages::new(device, shape, (FIRST + ROWS).div_ceil(BLOCK_TOKENS)).map_err(failed)?;
    let places: Vec<u64> = (0..ROWS as u64).map(|row| FIRST as u64 + row).collect();
    let places = Buffer::from_slice(device, &places).map_err(failed)?;
    let append = Append { shape, pages: &pages.table, places: &places };
    let appended = backend.qkv_append(1, &x, &positions, &append)?;
    let tiles = tiles(shape, &k, &v);
    let mut differ = same_bits(&appended.to_host()?, &q);
    for token in FIRST..FIRST + ROWS {
        let (page, offset) = (token / BLOCK_TOKENS, token % BLOCK_TOKENS);
        let (key, value) = tiles[page].read(offset).expect("a token of the tile");
        let (found_key, found_value) = pages.read(page, offset).map_err(failed)?;
        differ += same_bits(&found_key, &key) + same_bits(&found_value, &value);
    }
    Ok(differ)
}

/// The rows in tiles.
fn tiles(shape: TileShape, k: &[f32], v: &[f32]) -> Vec<Tile> {
    let width = shape.kv_heads * shape.head_dim;
    let mut tiles = vec![Tile::zeroed(shape); (FIRST + ROWS).div_ceil(shape.block_tokens)];
    for (row, (k, v)) in k.chunks_exact(width).zip(v.chunks_exact(width)).enumerate() {
        let token = FIRST + row;
        tiles[token / shape.block_tokens].write(token % shape.block_tokens, k, v).expect("a row of the tile");
    }
    tiles
}

/// Pages on the device.
struct Pages {
    shape: TileShape,
    pages: Vec<Buffer>,
    table: Buffer,
}

impl Pages {
    fn new(device: &Arc<dyn Device>, shape: TileShape, count: usize) -> Result<Self, crate::Error> {
        let bytes = shape.kv_heads * Self::head_bytes(&shape);
        let pages: Vec<Buffer> =
            (0..count).map(|_| Buffer::from_slice(device, &vec![0u8; bytes])).collect::<Result<_, _>>()?;
        let addresses: Vec<u64> = pages.iter().map(Buffer::address).collect();
        Ok(Self { shape, pages, table: Buffer::from_slice(device, &addresses)? })
    }

    fn head_bytes(shape: &TileShape) -> usize {
        shape.block_tokens * (2 * shape.head_dim * shape.dtype.bytes() + shape.dtype.scale_bytes())
    }

    /// Key and value of one token, f32 `[kv_heads, head_dim]` each, by the layout in `docs/cuda.md`.
    fn read(&self, page: usize, offset: usize) -> Result<(Vec<f32>, Vec<f32>), crate::Error> {
        let TileShape { block_tokens, head_dim, dtype, kv_heads } = self.shape;
        let bytes: Vec<u8> = self.pages[page].to_vec()?;
        let plane = block_tokens * head_dim * dtype.bytes();
        let row = |head: usize, second: usize| {
            let head = &bytes[head * Self::head_bytes(&self.shape)..][..Self::head_bytes(&self.shape)];
            let scale = match dtype {
                KvDtype::Int8 => f32_at(&head[2 * plane + second * block_tokens * 4..], offset),
                _ => 1.0,
            };
            let elements = &head[second * plane..];
            (0..head_dim).map(move |i| element(dtype, elements, offset * head_dim + i) * scale)
        };
        let rows = |second| (0..kv_heads).flat_map(|head| row(head, second)).collect();
        Ok((rows(0), rows(1)))
    }
}

fn f32_at(bytes: &[u8], index: usize) -> f32 {
    f32::from_le_bytes([bytes[4 * index], bytes[4 * index + 1], bytes[4 * index + 2], bytes[4 * index + 3]])
}

fn element(dtype: KvDtype, bytes: &[u8], index: usize) -> f32 {
    let half = || [bytes[2 * index], bytes[2 * index + 1]];
    match dtype {
        KvDtype::F32 => f32_at(bytes, index),
        KvDtype::F16 => half::f16::from_le_bytes(half()).to_f32(),
        KvDtype::Bf16 => half::bf16::from_le_bytes(half()).to_f32(),
        KvDtype::Int8 => f32::from(bytes[index] as i8),
    }
}
