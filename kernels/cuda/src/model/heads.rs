//! Between the product that makes queries, keys and values and attention: biases, q/k norms, rotation, and the append to pages.

use bytemuck::{Pod, Zeroable};
use longshore_attention::{KvDtype, TileShape};
use longshore_model::{ModelConfig, RopeStyle};

use super::compute::{At, Compute, number};
use crate::{Buffer, Error, Span};

/// Heads of a block.
const WARPS: usize = 4;

/// `Heads` of `heads.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct HeadsParams {
    x: u64,
    bias: u64,
    q_norm: u64,
    k_norm: u64,
    rotations: u64,
    q: u64,
    k: u64,
    v: u64,
    pages: u64,
    places: u64,
    rows: u32,
    query_heads: u32,
    kv_heads: u32,
    head_dim: u32,
    rope_dim: u32,
    style: u32,
    block_tokens: u32,
    eps: f32,
}

/// Where the keys and values of new rows go: pages on the device, in the layout of `docs/cuda.md`.
#[derive(Debug, Clone, Copy)]
pub struct Append<'a> {
    /// Shape of the tile that a page holds.
    pub shape: TileShape,
    /// u64 addresses of pages.
    pub pages: &'a Buffer,
    /// u64, one for each row: the token that it becomes, counted from the first of `pages`. Each must lie in a page that is there, and no two
    /// may be equal.
    pub places: &'a Buffer,
}

impl Append<'_> {
    /// Refuses pages of another model, and lists that are too short.
    pub(super) fn check(&self, config: &ModelConfig, rows: usize) -> Result<(), longshore_model::Error> {
        let heads = config.heads;
        if (self.shape.kv_heads, self.shape.head_dim) != (heads.kv_heads, heads.head_dim) {
            let (kv_heads, head_dim) = (self.shape.kv_heads, self.shape.head_dim);
            let problem = format!(
                "has {kv_heads} heads of {head_dim}, the model {} of {}",
                heads.kv_heads, heads.head_dim
            );
            return Err(super::invalid("append.shape", problem));
        }
        if let Err(error) = self.shape.validate() {
            return Err(super::invalid("append.shape", format!("is no shape of a tile: {error}")));
        }
        if self.places.bytes() != rows * size_of::<u64>() {
            let problem = format!("has {} bytes for {rows} rows of 8", self.places.bytes());
            return Err(super::invalid("append.places", problem));
        }
        if self.pages.bytes() == 0 || !self.pages.bytes().is_multiple_of(size_of::<u64>()) {
            let problem = format!("has {} bytes, must be one or more addresses of 8", self.pages.bytes());
            return Err(super::invalid("append.pages", problem));
        }
        Ok(())
    }
}

/// Weights of a layer that shape heads.
#[derive(Debug, Default)]
pub(super) struct HeadWeights {
    /// f32 of queries, keys, values, one after the other.
    pub(super) bias: Option<Buffer>,
    /// Norms of the heads of q and of k, f32 `[head_dim]` each.
    pub(super) norms: Option<[Buffer; 2]>,
}

/// Where shaped heads go.
#[derive(Debug, Clone, Copy)]
pub(super) enum To<'a> {
    /// f32 rows of keys and values.
    Rows { k: At<'a>, v: At<'a> },
    /// Pages; `first` is the row of this pass.
    Pages { append: &'a Append<'a>, first: usize },
}

/// `DTYPE` of the sources.
fn dtype(dtype: KvDtype) -> usize {
    match dtype {
        KvDtype::F32 => 0,
        KvDtype::F16 => 1,
        KvDtype::Bf16 => 2,
        KvDtype::Int8 => 3,
    }
}

impl Compute {
    /// Shapes the heads of `rows` rows of products, f32 `[rows, query_heads + 2 kv_heads, head_dim]`; `rotations` has the angles from the
    /// first of them on.
    pub(super) fn shape_heads(
        &self,
        config: &ModelConfig,
        weights: &HeadWeights,
        (x, rows): (At<'_>, usize),
        rotations: Span<'_>,
        q: At<'_>,
        to: To<'_>,
    ) -> Result<(), Error> {
        let (heads, float) = (config.heads, size_of::<f32>());
        let (q_width, kv_width) = (heads.query_heads() * heads.head_dim, heads.kv_heads * heads.head_dim);
        let width = q_width + 2 * kv_width;
        let weight = |buffer: Option<&Buffer>, field, count| {
            buffer.map_or(Ok(0), |buffer| buffer.whole().for_kernel(field, &[count], float))
        };
        let [q_norm, k_norm] = [0, 1].map(|index| weights.norms.as_ref().map(|norms| &norms[index]));
        let mut argument = HeadsParams {
            x: x.rows("x", rows, width)?,
            bias: weight(weights.bias.as_ref(), "bias", width)?,
            q_norm: weight(q_norm, "q_norm", heads.head_dim)?,
            k_norm: weight(k_norm, "k_norm", heads.head_dim)?,
            rotations: rotations.for_kernel("rotations", &[rows, config.rope.dim], float)?,
            q: q.rows("q", rows, q_width)?,
            rows: number(rows, "rows")?,
            query_heads: number(heads.query_heads(), "heads")?,
            kv_heads: number(heads.kv_heads, "heads")?,
            head_dim: number(heads.head_dim, "head_dim")?,
            rope_dim: number(config.rope.dim, "rope.dim")?,
            style: u32::from(config.rope.style == RopeStyle::Halves),
            block_tokens: 1,
            eps: config.norm_eps,
            ..HeadsParams::zeroed()
        };
        let mut kernel = self.programs.heads(0);
        match to {
            To::Rows { k, v } => {
                (argument.k, argument.v) = (k.rows("k", rows, kv_width)?, v.rows("v", rows, kv_width)?);
            }
            To::Pages { append, first } => {
                kernel = self.programs.heads(dtype(append.shape.dtype));
                // Which pages there are is read on the device.
                argument.pages = append.pages.address();
                let places = append.places.whole().after(first * size_of::<u64>());
                argument.places = places.for_kernel("places", &[rows], size_of::<u64>())?;
                argument.block_tokens = number(append.shape.block_tokens, "block_tokens")?;
            }
        }
        let blocks = (rows * (heads.query_heads() + 2 * heads.kv_heads)).div_ceil(WARPS);
        let shared = WARPS * heads.head_dim * size_of::<f32>();
        self.launch(kernel, [blocks, 1, 1], 32 * WARPS as u32, shared, &argument)
    }
}
