//! The CPU backend: weights packed for products in the precision of their file, rows computed in parallel on a compute pool.
//!
//! A row's bits depend on nothing but the row: every sum runs in an order that the shapes alone fix, so results are the same
//! for any chunking, batching, number of threads and instruction set. The arithmetic is in `linear` and `rows`.

mod linear;
mod load;
mod rotations;
mod rows;
mod scratch;
mod versions;

use std::collections::BTreeMap;
use std::sync::Arc;

use longshore_compute::{ComputePool, DisjointSlice, InstructionSet};

pub use self::linear::{Linear, LinearLayer, QuantisedGroup};

use self::linear::{Computed, Forms, Input, PackedMatrix, Plain, Then, multiply};
use self::rotations::Rotations;
use self::scratch::{Scratch, ScratchPool};
use crate::rope::{Rope, Rotation};
use crate::{Activations, Backend, Error, LoadProgress, ModelConfig, Qkv, Weights};

/// Rows that go through the feed-forward layer together; bounds its scratch.
const FINISH_ROWS: usize = 512;

/// Rows of one task of element-wise work; fewer are done by the caller.
const TASK_ROWS: usize = 8;

/// How the CPU computes.
#[derive(Debug, Clone)]
pub struct CpuOptions {
    /// Where it computes.
    pub pool: Arc<ComputePool>,
    /// What products are computed in.
    pub linear: Linear,
}

/// A decoder in host memory.
#[derive(Debug)]
pub struct CpuBackend {
    config: ModelConfig,
    rope: Rope,
    pool: Arc<ComputePool>,
    set: InstructionSet,
    /// `[vocabulary, hidden]`; the output matrix too where the model ties them.
    embedding: PackedMatrix,
    output: Option<PackedMatrix>,
    output_norm: Vec<f32>,
    layers: Vec<Layer>,
    scratch: ScratchPool,
    rotations: Rotations,
}

/// Weights of one layer. With `q = query_heads * head_dim` and `kv = kv_heads * head_dim`:
#[derive(Debug)]
struct Layer {
    attn_norm: Vec<f32>,
    /// `[q, hidden]`.
    q: PackedMatrix,
    /// `[kv, hidden]`.
    k: PackedMatrix,
    /// `[kv, hidden]`.
    v: PackedMatrix,
    /// Biases of q, k and v.
    qkv_bias: Option<[Vec<f32>; 3]>,
    /// Norms of the heads of q and of k, `[head_dim]` each.
    qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    /// `[hidden, q]`.
    attn_out: PackedMatrix,
    ffn_norm: Vec<f32>,
    /// `[ffn, hidden]`.
    gate: PackedMatrix,
    /// `[ffn, hidden]`.
    up: PackedMatrix,
    /// `[hidden, ffn]`.
    down: PackedMatrix,
}

impl Layer {
    fn matrices(&self) -> [&PackedMatrix; 7] {
        [&self.q, &self.k, &self.v, &self.attn_out, &self.gate, &self.up, &self.down]
    }
}

impl CpuBackend {
    /// Packs all weights; `progress` counts their bytes in the files. Nothing of the files stays in memory afterwards.
    pub fn new(
        config: ModelConfig,
        weights: &Weights,
        options: CpuOptions,
        progress: &dyn Fn(LoadProgress),
    ) -> Result<Self, Error> {
        load::load(config, weights, options, progress)
    }

    fn new_from(
        config: ModelConfig,
        rope: Rope,
        options: CpuOptions,
        (embedding, output, output_norm): (PackedMatrix, Option<PackedMatrix>, Vec<f32>),
        layers: Vec<Layer>,
    ) -> Self {
        Self {
            config,
            rope,
            pool: options.pool,
            set: InstructionSet::detect(),
            embedding,
            output,
            output_norm,
            layers,
            scratch: ScratchPool::default(),
            rotations: Rotations::default(),
        }
    }

    /// [`Backend::memory_bytes`] of what [`Self::new`] would make of `weights`.
    pub fn expected_bytes(config: &ModelConfig, weights: &Weights, linear: Linear) -> Result<u64, Error> {
        load::expected_bytes(config, weights, linear)
    }

    /// What products are computed in, by the type of the weights in the file, for example
    /// `Q4_1 x 210: int8 activations; Q8_0 x 1: int8 activations (avx512)`.
    pub fn linear_description(&self) -> String {
        let mut kinds = BTreeMap::new();
        for matrix in self.matrices() {
            *kinds.entry(matrix.kinds()).or_insert(0) += 1;
        }
        let kinds =
            kinds.into_iter().map(|((kind, computed), count)| format!("{kind} x {count}: {computed}"));
        format!("{} ({})", kinds.collect::<Vec<_>>().join("; "), self.set)
    }

    fn matrices(&self) -> impl Iterator<Item = &PackedMatrix> {
        let tables = [&self.embedding].into_iter().chain(&self.output);
        tables.chain(self.layers.iter().flat_map(Layer::matrices))
    }

    fn layer(&self, layer: usize) -> Result<&Layer, Error> {
        let count = self.layers.len();
        self.layers.get(layer).ok_or_else(|| invalid("layer", format!("is {layer}, the model has {count}")))
    }

    fn check_width(&self, x: &Activations) -> Result<(), Error> {
        let (found, hidden) = (x.width(), self.config.hidden);
        if found == hidden {
            Ok(())
        } else {
            Err(invalid("x", format!("has rows of {found} elements, must have {hidden}")))
        }
    }

    /// Norms rows of `x`, f32 `[rows, hidden]`, into `input`; `row(r)` is the row that becomes row `r`.
    fn norm_into<'a>(
        &self,
        input: &mut Input,
        forms: Forms,
        rows: usize,
        weight: &[f32],
        row: impl Fn(usize) -> &'a [f32] + Sync,
    ) {
        let norm = |r: usize, to: &mut [f32]| rows::norm(self.set, row(r), weight, self.config.norm_eps, to);
        input.fill(&self.pool, self.set, [rows, self.config.hidden], forms, &Computed(norm));
    }

    /// Takes rows of `width` elements as they are.
    fn copy_into(&self, input: &mut Input, forms: Forms, x: &[f32], width: usize) {
        input.fill(&self.pool, self.set, [x.len() / width, width], forms, &Plain { x, width });
    }

    /// Runs `f(row, parts)` for all rows of some tensors, each `[rows, width]`; few rows on the calling thread.
    fn for_rows<const N: usize>(
        &self,
        rows: usize,
        tensors: [(&mut [f32], usize); N],
        f: impl Fn(usize, [&mut [f32]; N]) + Sync,
    ) {
        let tensors = tensors.map(|(tensor, width)| (DisjointSlice::new(tensor), width));
        self.pool.run(rows.div_ceil(TASK_ROWS), |task| {
            for row in task * TASK_ROWS..rows.min((task + 1) * TASK_ROWS) {
                #[expect(unsafe_code, reason = "each task has its own rows")]
                // SAFETY: a row of a tensor does not overlap others, and each row is visited once.
                f(
                    row,
                    tensors.each_ref().map(|(t, width)| unsafe { t.range(row * width..(row + 1) * width) }),
                );
            }
        });
    }

    /// Biases, norms and rotation of one row's heads, in place.
    fn shape_heads(&self, layer: &Layer, [q, k, v]: [&mut [f32]; 3], rotation: &Rotation) {
        if let Some([q_bias, k_bias, v_bias]) = &layer.qkv_bias {
            rows::add(q, q_bias);
            rows::add(k, k_bias);
            rows::add(v, v_bias);
        }
        if let Some((q_norm, k_norm)) = &layer.qk_norm {
            rows::norm_heads(self.set, q, q_norm, self.config.norm_eps);
            rows::norm_heads(self.set, k, k_norm, self.config.norm_eps);
        }
        let head_dim = self.config.heads.head_dim;
        rows::rotate_heads(self.set, &self.rope, q, head_dim, rotation);
        rows::rotate_heads(self.set, &self.rope, k, head_dim, rotation);
    }

    /// Everything after attention for some rows, in place: `x` f32 `[rows, hidden]`.
    fn finish_rows(&self, layer: &Layer, x: &mut [f32], attention: &[f32], scratch: &mut Scratch) {
        let (pool, set, hidden, ffn) = (&self.pool, self.set, self.config.hidden, self.config.ffn);
        let rows = x.len() / hidden;
        let Scratch { input, gated } = scratch;
        self.copy_into(input, layer.attn_out.forms(), attention, attention.len() / rows);
        multiply(pool, set, input, vec![(&layer.attn_out, Then::Add(x))]);
        let forms = layer.gate.forms().with(layer.up.forms());
        self.norm_into(input, forms, rows, &layer.ffn_norm, |r| &x[r * hidden..][..hidden]);
        let gated = scratch::sized(gated, rows * ffn);
        multiply(pool, set, input, vec![(&layer.gate, Then::Gate(&layer.up, gated))]);
        self.copy_into(input, layer.down.forms(), gated, ffn);
        multiply(pool, set, input, vec![(&layer.down, Then::Add(x))]);
    }
}

impl Backend for CpuBackend {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn memory_bytes(&self) -> u64 {
        self.matrices().map(PackedMatrix::bytes).sum()
    }

    fn embed(&self, tokens: &[u32]) -> Result<Activations, Error> {
        let vocabulary = self.config.vocabulary;
        if let Some(i) = tokens.iter().position(|token| *token as usize >= vocabulary) {
            let problem = format!("is {}, the vocabulary has {vocabulary} entries", tokens[i]);
            return Err(invalid(&format!("tokens[{i}]"), problem));
        }
        let hidden = self.config.hidden;
        let mut x = vec![0.0; tokens.len() * hidden];
        self.for_rows(tokens.len(), [(&mut x, hidden)], |r, [row]| {
            self.embedding.row(tokens[r] as usize, row);
        });
        Ok(Activations::from_host(hidden, x))
    }

    fn qkv(&self, layer: usize, x: &Activations, positions: &[u64]) -> Result<Qkv, Error> {
        let layer = self.layer(layer)?;
        self.check_width(x)?;
        if positions.len() != x.rows() {
            return Err(invalid(
                "positions",
                format!("has {} elements for {} rows", positions.len(), x.rows()),
            ));
        }
        let (heads, hidden, rows) = (self.config.heads, self.config.hidden, x.rows());
        let (q_width, kv_width) = (heads.query_heads() * heads.head_dim, heads.kv_heads * heads.head_dim);
        let (mut q, mut k) = (vec![0.0; rows * q_width], vec![0.0; rows * kv_width]);
        let mut v = vec![0.0; rows * kv_width];
        let mut scratch = self.scratch.take();
        let forms = layer.q.forms().with(layer.k.forms()).with(layer.v.forms());
        let row = |r: usize| &x.host()[r * hidden..][..hidden];
        self.norm_into(&mut scratch.input, forms, rows, &layer.attn_norm, row);
        let products = vec![
            (&layer.q, Then::Store(&mut q)),
            (&layer.k, Then::Store(&mut k)),
            (&layer.v, Then::Store(&mut v)),
        ];
        multiply(&self.pool, self.set, &scratch.input, products);
        let rotations = self.rotations.at(&self.rope, positions);
        let tensors = [(&mut q[..], q_width), (&mut k[..], kv_width), (&mut v[..], kv_width)];
        self.for_rows(rows, tensors, |r, parts| self.shape_heads(layer, parts, &rotations[r]));
        Ok(Qkv { q, k, v })
    }

    fn finish(&self, layer: usize, mut x: Activations, attention: &[f32]) -> Result<Activations, Error> {
        let layer = self.layer(layer)?;
        self.check_width(&x)?;
        let width = self.config.heads.query_heads() * self.config.heads.head_dim;
        if attention.len() != x.rows() * width {
            let problem = format!("has {} elements for {} rows of {width}", attention.len(), x.rows());
            return Err(invalid("attention", problem));
        }
        let blocks = x.host_mut().chunks_mut(FINISH_ROWS * self.config.hidden);
        let mut scratch = self.scratch.take();
        for (x, attention) in blocks.zip(attention.chunks(FINISH_ROWS * width)) {
            self.finish_rows(layer, x, attention, &mut scratch);
        }
        Ok(x)
    }

    fn logits(&self, x: &Activations, rows: &[usize]) -> Result<Vec<f32>, Error> {
        self.check_width(x)?;
        if let Some(i) = rows.iter().position(|row| *row >= x.rows()) {
            return Err(invalid(
                &format!("rows[{i}]"),
                format!("is {}, there are {} rows", rows[i], x.rows()),
            ));
        }
        let hidden = self.config.hidden;
        let output = self.output.as_ref().unwrap_or(&self.embedding);
        let mut logits = vec![0.0; rows.len() * self.config.vocabulary];
        let mut scratch = self.scratch.take();
        let row = |r: usize| &x.host()[rows[r] * hidden..][..hidden];
        self.norm_into(&mut scratch.input, output.forms(), rows.len(), &self.output_norm, row);
        multiply(&self.pool, self.set, &scratch.input, vec![(output, Then::Store(&mut logits))]);
        Ok(logits)
    }
}

fn invalid(field: &str, problem: String) -> Error {
    Error::Invalid { field: field.to_owned(), problem }
}

#[cfg(test)]
mod tests;
