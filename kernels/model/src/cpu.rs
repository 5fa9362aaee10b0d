//! The CPU backend: f32 weights packed for products, rows computed in parallel on the rayon pool of the caller.
//!
//! A row's bits depend on nothing but the row: every sum runs in an order that the shapes alone fix, so results are the same
//! for any chunking, batching and number of threads.

mod linear;
mod load;
mod rows;

use rayon::prelude::*;

use self::linear::PackedMatrix;
use crate::rope::{Rope, Rotation};
use crate::{Activations, Backend, Error, LoadProgress, ModelConfig, Qkv, Weights};

/// Rows that go through the feed-forward layer together; bounds its scratch.
const FINISH_ROWS: usize = 512;

/// A decoder in host memory.
#[derive(Debug)]
pub struct CpuBackend {
    config: ModelConfig,
    rope: Rope,
    /// `[vocabulary, hidden]`; the output matrix too where the model ties them.
    embedding: PackedMatrix,
    output: Option<PackedMatrix>,
    output_norm: Vec<f32>,
    layers: Vec<Layer>,
}

/// Weights of one layer.
#[derive(Debug)]
struct Layer {
    attn_norm: Vec<f32>,
    /// q, k and v over one another, `[(query_heads + 2 kv_heads) * head_dim, hidden]`.
    qkv: PackedMatrix,
    /// Biases in the order of `qkv`.
    qkv_bias: Option<Vec<f32>>,
    /// Norms of the heads of q and of k, `[head_dim]` each.
    qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    attn_out: PackedMatrix,
    ffn_norm: Vec<f32>,
    /// Gate and up over one another, `[2 * ffn, hidden]`.
    gate_up: PackedMatrix,
    down: PackedMatrix,
}

impl CpuBackend {
    /// Dequantises and packs all weights; `progress` counts their bytes in the files.
    pub fn new(
        config: ModelConfig,
        weights: &Weights,
        progress: &dyn Fn(LoadProgress),
    ) -> Result<Self, Error> {
        load::load(config, weights, progress)
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

    /// Biases, norms and rotation of one row's heads, in place: `row` f32 `[(query_heads + 2 kv_heads) * head_dim]`.
    fn shape_heads(&self, layer: &Layer, row: &mut [f32], rotation: &Rotation) {
        if let Some(bias) = &layer.qkv_bias {
            rows::add(row, bias);
        }
        let heads = self.config.heads;
        let (queries, rest) = row.split_at_mut(heads.query_heads() * heads.head_dim);
        let keys = &mut rest[..heads.kv_heads * heads.head_dim];
        if let Some((q_norm, k_norm)) = &layer.qk_norm {
            let eps = self.config.norm_eps;
            queries.chunks_exact_mut(heads.head_dim).for_each(|head| rows::norm_in_place(head, q_norm, eps));
            keys.chunks_exact_mut(heads.head_dim).for_each(|head| rows::norm_in_place(head, k_norm, eps));
        }
        for head in queries.chunks_exact_mut(heads.head_dim).chain(keys.chunks_exact_mut(heads.head_dim)) {
            self.rope.rotate(head, rotation);
        }
    }

    /// Everything after attention for some rows, in place: `x` f32 `[rows, hidden]`.
    fn finish_rows(&self, layer: &Layer, x: &mut [f32], attention: &[f32]) {
        let (hidden, ffn) = (self.config.hidden, self.config.ffn);
        let rows = x.len() / hidden;
        let mut branch = vec![0.0; x.len()];
        layer.attn_out.multiply(attention, rows, &mut branch);
        rows::add_rows(x, &branch, hidden);
        let normed = rows::norm_rows(x, &layer.ffn_norm, self.config.norm_eps);
        let mut gate_up = vec![0.0; rows * 2 * ffn];
        layer.gate_up.multiply(&normed, rows, &mut gate_up);
        let gated = rows::swiglu_rows(&gate_up, ffn);
        layer.down.multiply(&gated, rows, &mut branch);
        rows::add_rows(x, &branch, hidden);
    }
}

impl Backend for CpuBackend {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn embed(&self, tokens: &[u32]) -> Result<Activations, Error> {
        let vocabulary = self.config.vocabulary;
        if let Some(i) = tokens.iter().position(|token| *token as usize >= vocabulary) {
            let problem = format!("is {}, the vocabulary has {vocabulary} entries", tokens[i]);
            return Err(invalid(&format!("tokens[{i}]"), problem));
        }
        let hidden = self.config.hidden;
        let mut x = vec![0.0; tokens.len() * hidden];
        x.par_chunks_exact_mut(hidden)
            .zip(tokens)
            .for_each(|(row, token)| self.embedding.row(*token as usize, row));
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
        let heads = self.config.heads;
        let (q_width, kv_width) = (heads.query_heads() * heads.head_dim, heads.kv_heads * heads.head_dim);
        let (rows, width) = (x.rows(), q_width + 2 * kv_width);
        let normed = rows::norm_rows(x.host(), &layer.attn_norm, self.config.norm_eps);
        let mut fused = vec![0.0; rows * width];
        layer.qkv.multiply(&normed, rows, &mut fused);
        let mut q = vec![0.0; rows * q_width];
        let (mut k, mut v) = (vec![0.0; rows * kv_width], vec![0.0; rows * kv_width]);
        let outputs = q
            .par_chunks_exact_mut(q_width)
            .zip(k.par_chunks_exact_mut(kv_width))
            .zip(v.par_chunks_exact_mut(kv_width));
        fused.par_chunks_exact_mut(width).zip(positions).zip(outputs).for_each(
            |((row, position), ((q, k), v))| {
                self.shape_heads(layer, row, &self.rope.at(*position));
                q.copy_from_slice(&row[..q_width]);
                k.copy_from_slice(&row[q_width..q_width + kv_width]);
                v.copy_from_slice(&row[q_width + kv_width..]);
            },
        );
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
        for (x, attention) in blocks.zip(attention.chunks(FINISH_ROWS * width)) {
            self.finish_rows(layer, x, attention);
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
        let chosen: Vec<f32> =
            rows.iter().flat_map(|row| &x.host()[row * hidden..][..hidden]).copied().collect();
        let normed = rows::norm_rows(&chosen, &self.output_norm, self.config.norm_eps);
        let mut logits = vec![0.0; rows.len() * self.config.vocabulary];
        self.output.as_ref().unwrap_or(&self.embedding).multiply(&normed, rows.len(), &mut logits);
        Ok(logits)
    }
}

fn invalid(field: &str, problem: String) -> Error {
    Error::Invalid { field: field.to_owned(), problem }
}

#[cfg(test)]
mod tests;
