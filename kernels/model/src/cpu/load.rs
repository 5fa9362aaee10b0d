//! Builds the backend out of a model's weights, packed one at a time straight from the bytes of the file.

use super::linear::PackedMatrix;
use super::{CpuBackend, CpuOptions, Layer, Linear, invalid};
use crate::files::{StoredMatrix, dequantize};
use crate::rope::Rope;
use crate::{Error, LayerWeight, LoadProgress, ModelConfig, WeightName, Weights};

/// Where weights come from.
pub(super) trait Source {
    /// A weight as it is stored.
    fn stored(&self, name: WeightName) -> Result<StoredMatrix<'_>, Error>;
    /// Its share of the progress.
    fn bytes(&self, name: WeightName) -> u64;
    /// The weight has been read for the last time.
    fn release(&self, name: WeightName);
    /// The error for a weight that holds an infinity or NaN.
    fn not_finite(&self, name: WeightName) -> Error;
}

impl Source for Weights {
    fn stored(&self, name: WeightName) -> Result<StoredMatrix<'_>, Error> {
        self.stored_matrix(name)
    }

    fn bytes(&self, name: WeightName) -> u64 {
        self.stored_bytes(name)
    }

    fn release(&self, name: WeightName) {
        Self::release(self, name);
    }

    fn not_finite(&self, name: WeightName) -> Error {
        Self::not_finite(self, name)
    }
}

/// Loads every weight that `config` asks for.
pub(super) fn load(
    config: ModelConfig,
    source: &dyn Source,
    options: CpuOptions,
    progress: &dyn Fn(LoadProgress),
) -> Result<CpuBackend, Error> {
    config.check()?;
    let rope = Rope::new(&config.rope)?;
    let total_bytes = WeightName::all(&config).map(|name| source.bytes(name)).sum();
    let state = LoadProgress { done_bytes: 0, total_bytes };
    let mut loader = Loader { config: &config, source, options: &options, progress, state };
    let embedding = loader.matrix(WeightName::Embedding, config.vocabulary, config.hidden)?;
    let layers = (0..config.layers).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
    let output_norm = loader.vector(WeightName::OutputNorm, config.hidden)?;
    let output = match config.tied_embeddings {
        true => None,
        false => Some(loader.matrix(WeightName::Output, config.vocabulary, config.hidden)?),
    };
    Ok(CpuBackend::new_from(config, rope, options, (embedding, output, output_norm), layers))
}

/// Bytes that the packed matrices are going to need.
pub(super) fn expected_bytes(
    config: &ModelConfig,
    source: &dyn Source,
    linear: Linear,
) -> Result<u64, Error> {
    let mut bytes = 0;
    for name in WeightName::all(config).filter(WeightName::is_matrix) {
        let stored = source.stored(name)?;
        bytes += PackedMatrix::expected_bytes(linear, stored.kind, [stored.rows, stored.cols]);
    }
    Ok(bytes)
}

struct Loader<'a> {
    config: &'a ModelConfig,
    source: &'a dyn Source,
    options: &'a CpuOptions,
    progress: &'a dyn Fn(LoadProgress),
    state: LoadProgress,
}

impl Loader<'_> {
    fn layer(&mut self, layer: usize) -> Result<Layer, Error> {
        let (config, name) = (self.config, |weight| WeightName::Layer(layer, weight));
        let (hidden, ffn, heads) = (config.hidden, config.ffn, config.heads);
        let (q, kv) = (heads.query_heads() * heads.head_dim, heads.kv_heads * heads.head_dim);
        Ok(Layer {
            attn_norm: self.vector(name(LayerWeight::AttnNorm), hidden)?,
            q: self.matrix(name(LayerWeight::Q), q, hidden)?,
            k: self.matrix(name(LayerWeight::K), kv, hidden)?,
            v: self.matrix(name(LayerWeight::V), kv, hidden)?,
            qkv_bias: match config.qkv_bias {
                true => Some([
                    self.vector(name(LayerWeight::QBias), q)?,
                    self.vector(name(LayerWeight::KBias), kv)?,
                    self.vector(name(LayerWeight::VBias), kv)?,
                ]),
                false => None,
            },
            qk_norm: match config.qk_norm {
                true => Some((
                    self.vector(name(LayerWeight::QNorm), heads.head_dim)?,
                    self.vector(name(LayerWeight::KNorm), heads.head_dim)?,
                )),
                false => None,
            },
            attn_out: self.matrix(name(LayerWeight::AttnOut), hidden, q)?,
            ffn_norm: self.vector(name(LayerWeight::FfnNorm), hidden)?,
            gate: self.matrix(name(LayerWeight::Gate), ffn, hidden)?,
            up: self.matrix(name(LayerWeight::Up), ffn, hidden)?,
            down: self.matrix(name(LayerWeight::Down), hidden, ffn)?,
        })
    }

    /// Finds a weight and checks its shape.
    fn stored(&self, name: WeightName, rows: usize, cols: usize) -> Result<StoredMatrix<'_>, Error> {
        let matrix = self.source.stored(name)?;
        if (matrix.rows, matrix.cols) != (rows, cols) {
            let problem = format!("has shape [{}, {}], must be [{rows}, {cols}]", matrix.rows, matrix.cols);
            return Err(invalid(&format!("{name:?}"), problem));
        }
        Ok(matrix)
    }

    fn vector(&mut self, name: WeightName, len: usize) -> Result<Vec<f32>, Error> {
        let stored = self.stored(name, 1, len)?;
        let mut data = vec![0.0; len];
        if !dequantize(stored.kind, &stored.bytes, &mut data) {
            return Err(self.source.not_finite(name));
        }
        self.done(name);
        Ok(data)
    }

    fn matrix(&mut self, name: WeightName, rows: usize, cols: usize) -> Result<PackedMatrix, Error> {
        let StoredMatrix { kind, bytes, .. } = self.stored(name, rows, cols)?;
        let CpuOptions { pool, linear } = self.options;
        let matrix = PackedMatrix::pack(pool, *linear, kind, [rows, cols], &bytes)
            .ok_or_else(|| self.source.not_finite(name))?;
        self.done(name);
        Ok(matrix)
    }

    fn done(&mut self, name: WeightName) {
        self.source.release(name);
        self.state.done_bytes += self.source.bytes(name);
        (self.progress)(self.state);
    }
}
