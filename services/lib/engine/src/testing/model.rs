//! A model of random matrices, in the plainest arithmetic.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use longshore_attention::HeadShape;
use longshore_model::{
    Activations, Backend, Error, Likeliest, ModelConfig, Qkv, RopeConfig, RopeScaling, RopeStyle, RowLogits,
    WantedRow,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A decoder of 3 layers, 4 query heads over 2 KV heads, and 97 tokens. Every row is computed by itself.
#[derive(Debug)]
pub struct TinyModel {
    config: ModelConfig,
    embedding: Vec<f32>,
    layers: Vec<Layer>,
    /// Calls of `qkv` so far: how far computations went.
    pub layers_computed: AtomicU64,
    /// Milliseconds that every layer takes in addition.
    pub layer_delay_ms: AtomicU64,
    /// Calls of `qkv` that may go on; later ones wait until there are more.
    pub layers_allowed: AtomicU64,
    /// It chooses where candidates are enough, as a device does.
    pub chooses: AtomicBool,
    /// Rows of logits that it gave whole, and rows that it chose of.
    pub whole_rows: AtomicU64,
    /// See `whole_rows`.
    pub chosen_rows: AtomicU64,
}

#[derive(Debug)]
struct Layer {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
    ffn: Vec<f32>,
}

/// `count` tokens of the tiny vocabulary, fixed by `seed`.
pub fn tokens(seed: u64, count: usize) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| random.next_u32() % 97).collect()
}

impl TinyModel {
    /// A model whose weights `seed` fixes.
    pub fn new(seed: u64) -> Self {
        let heads = HeadShape { kv_heads: 2, group: 2, head_dim: 8 };
        let config = ModelConfig {
            architecture: "tiny".to_owned(),
            name: "tiny".to_owned(),
            layers: 3,
            hidden: 24,
            heads,
            ffn: 24,
            vocabulary: 97,
            norm_eps: 1e-5,
            context_tokens: 4096,
            rope: RopeConfig {
                style: RopeStyle::Halves,
                theta: 10_000.0,
                dim: 8,
                scaling: RopeScaling::None,
            },
            tied_embeddings: true,
            qkv_bias: false,
            qk_norm: false,
        };
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut matrix = |rows: usize, cols: usize| -> Vec<f32> {
            let scale = 2.0 / (cols as f32).sqrt();
            (0..rows * cols)
                .map(|_| (random.next_u32() as f32 / u32::MAX as f32 - 0.5) * 2.0 * scale)
                .collect()
        };
        let (q_width, kv_width, hidden) = (heads.query_heads() * 8, heads.kv_heads * 8, config.hidden);
        let layers = (0..config.layers)
            .map(|_| Layer {
                q: matrix(q_width, hidden),
                k: matrix(kv_width, hidden),
                v: matrix(kv_width, hidden),
                out: matrix(hidden, q_width),
                ffn: matrix(hidden, hidden),
            })
            .collect();
        let embedding = matrix(config.vocabulary, hidden);
        Self {
            config,
            embedding,
            layers,
            layers_computed: AtomicU64::new(0),
            layer_delay_ms: AtomicU64::new(0),
            layers_allowed: AtomicU64::new(u64::MAX),
            chooses: AtomicBool::new(false),
            whole_rows: AtomicU64::new(0),
            chosen_rows: AtomicU64::new(0),
        }
    }

    fn rows<'a>(&self, x: &'a Activations) -> impl Iterator<Item = &'a [f32]> {
        x.host().chunks_exact(self.config.hidden)
    }
}

impl Backend for TinyModel {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn memory_bytes(&self) -> u64 {
        (self.embedding.len() * size_of::<f32>()) as u64
    }

    fn embed(&self, tokens: &[u32]) -> Result<Activations, Error> {
        let hidden = self.config.hidden;
        let row = |&token: &u32| &self.embedding[token as usize * hidden..][..hidden];
        Ok(Activations::from_host(hidden, tokens.iter().flat_map(row).copied().collect()))
    }

    fn qkv(&self, layer: usize, x: &Activations, positions: &[u64]) -> Result<Qkv, Error> {
        let before = self.layers_computed.fetch_add(1, Ordering::SeqCst);
        while before >= self.layers_allowed.load(Ordering::SeqCst) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::thread::sleep(std::time::Duration::from_millis(self.layer_delay_ms.load(Ordering::SeqCst)));
        let weights = &self.layers[layer];
        let mut qkv = Qkv { q: Vec::new(), k: Vec::new(), v: Vec::new() };
        for (row, &position) in self.rows(x).zip(positions) {
            let row = normalised(row);
            qkv.q.extend(rotated(product(&weights.q, &row), position));
            qkv.k.extend(rotated(product(&weights.k, &row), position));
            qkv.v.extend(product(&weights.v, &row));
        }
        Ok(qkv)
    }

    fn finish(&self, layer: usize, x: Activations, attention: &[f32]) -> Result<Activations, Error> {
        let weights = &self.layers[layer];
        let width = self.config.heads.query_heads() * self.config.heads.head_dim;
        let mut output = Vec::with_capacity(x.host().len());
        for (row, attention) in self.rows(&x).zip(attention.chunks_exact(width)) {
            let row: Vec<f32> =
                row.iter().zip(product(&weights.out, attention)).map(|(x, y)| x + y).collect();
            let ffn = product(&weights.ffn, &normalised(&row));
            output.extend(row.iter().zip(ffn).map(|(x, y)| x + y.max(0.0)));
        }
        Ok(Activations::from_host(self.config.hidden, output))
    }

    fn logits(&self, x: &Activations, rows: &[usize]) -> Result<Vec<f32>, Error> {
        let all: Vec<&[f32]> = self.rows(x).collect();
        Ok(rows.iter().flat_map(|&row| product(&self.embedding, &normalised(all[row]))).collect())
    }

    fn candidates(&self, x: &Activations, wanted: &[WantedRow]) -> Result<Vec<RowLogits>, Error> {
        let logits = self.logits(x, &wanted.iter().map(|wanted| wanted.row).collect::<Vec<_>>())?;
        let rows = wanted.iter().zip(logits.chunks_exact(self.config.vocabulary));
        let row = |(wanted, logits): (&WantedRow, &[f32])| match wanted.candidates {
            Some(count) if self.chooses.load(Ordering::SeqCst) => {
                self.chosen_rows.fetch_add(1, Ordering::SeqCst);
                RowLogits::Likeliest(likeliest(logits, count))
            }
            _ => {
                self.whole_rows.fetch_add(1, Ordering::SeqCst);
                RowLogits::All(logits.to_vec())
            }
        };
        Ok(rows.map(row).collect())
    }
}

/// The likeliest tokens, of equals the one with the lowest id first.
fn likeliest(logits: &[f32], count: usize) -> Likeliest {
    let mut best: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    best.sort_by(|a, b| b.1.partial_cmp(&a.1).expect("weights are finite"));
    best.truncate(count);
    let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
    Likeliest { best, log_sum_exp: sum.ln() }
}

fn product(matrix: &[f32], row: &[f32]) -> Vec<f32> {
    matrix.chunks_exact(row.len()).map(|weights| weights.iter().zip(row).map(|(w, x)| w * x).sum()).collect()
}

fn normalised(row: &[f32]) -> Vec<f32> {
    let square = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
    let scale = (square + 1e-5).sqrt().recip();
    row.iter().map(|x| x * scale).collect()
}

fn rotated(mut heads: Vec<f32>, position: u64) -> Vec<f32> {
    for head in heads.chunks_exact_mut(8) {
        for pair in 0..4 {
            let angle = position as f32 * 10_000f32.powf(-(pair as f32) / 4.0);
            let (sin, cos) = angle.sin_cos();
            let (a, b) = (head[pair], head[pair + 4]);
            (head[pair], head[pair + 4]) = (a * cos - b * sin, a * sin + b * cos);
        }
    }
    heads
}
