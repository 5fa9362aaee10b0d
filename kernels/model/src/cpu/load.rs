//! Builds the backend out of a model's weights, one at a time, so that only one lies in memory unpacked.

use super::linear::PackedMatrix;
use super::{CpuBackend, Layer, invalid};
use crate::rope::Rope;
use crate::{Error, LayerWeight, LoadProgress, Matrix, ModelConfig, WeightName, Weights};

/// Where weights come from.
pub(super) trait Source {
    /// A weight in f32.
    fn tensor(&self, name: WeightName) -> Result<Matrix, Error>;
    /// Its share of the progress.
    fn bytes(&self, name: WeightName) -> u64;
}

impl Source for Weights {
    fn tensor(&self, name: WeightName) -> Result<Matrix, Error> {
        Self::tensor(self, name)
    }

    fn bytes(&self, name: WeightName) -> u64 {
        self.stored_bytes(name)
    }
}

/// Loads every weight that `config` asks for.
pub(super) fn load(
    config: ModelConfig,
    source: &dyn Source,
    progress: &dyn Fn(LoadProgress),
) -> Result<CpuBackend, Error> {
    check(&config)?;
    let rope = Rope::new(&config.rope)?;
    let total_bytes = names(&config).map(|name| source.bytes(name)).sum();
    let mut loader =
        Loader { config: &config, source, progress, state: LoadProgress { done_bytes: 0, total_bytes } };
    let table = [(WeightName::Embedding, config.vocabulary)];
    let embedding = loader.stacked(&table, config.hidden)?;
    let layers = (0..config.layers).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
    let output_norm = loader.vector(WeightName::OutputNorm, config.hidden)?;
    let output = match config.tied_embeddings {
        true => None,
        false => Some(loader.stacked(&[(WeightName::Output, config.vocabulary)], config.hidden)?),
    };
    Ok(CpuBackend { rope, embedding, output, output_norm, layers, config })
}

fn check(config: &ModelConfig) -> Result<(), Error> {
    let heads = config.heads;
    for (field, value) in [
        ("layers", config.layers),
        ("hidden", config.hidden),
        ("heads.kv_heads", heads.kv_heads),
        ("heads.group", heads.group),
        ("heads.head_dim", heads.head_dim),
        ("ffn", config.ffn),
        ("vocabulary", config.vocabulary),
    ] {
        if value == 0 {
            return Err(invalid(field, "is 0".to_owned()));
        }
    }
    if config.rope.dim > heads.head_dim {
        let problem = format!("is {}, a head has {} elements", config.rope.dim, heads.head_dim);
        return Err(invalid("rope.dim", problem));
    }
    Ok(())
}

/// Every weight that is read.
fn names(config: &ModelConfig) -> impl Iterator<Item = WeightName> {
    let output = (!config.tied_embeddings).then_some(WeightName::Output);
    let layers = (0..config.layers).flat_map(|layer| {
        LayerWeight::ALL.into_iter().filter(|w| w.used_by(config)).map(move |w| WeightName::Layer(layer, w))
    });
    [WeightName::Embedding, WeightName::OutputNorm].into_iter().chain(output).chain(layers)
}

struct Loader<'a> {
    config: &'a ModelConfig,
    source: &'a dyn Source,
    progress: &'a dyn Fn(LoadProgress),
    state: LoadProgress,
}

impl Loader<'_> {
    fn layer(&mut self, layer: usize) -> Result<Layer, Error> {
        let (config, name) = (self.config, |weight| WeightName::Layer(layer, weight));
        let (hidden, ffn, heads) = (config.hidden, config.ffn, config.heads);
        let (q, kv) = (heads.query_heads() * heads.head_dim, heads.kv_heads * heads.head_dim);
        let projections = [(LayerWeight::Q, q), (LayerWeight::K, kv), (LayerWeight::V, kv)];
        let biases = [(LayerWeight::QBias, q), (LayerWeight::KBias, kv), (LayerWeight::VBias, kv)];
        Ok(Layer {
            attn_norm: self.vector(name(LayerWeight::AttnNorm), hidden)?,
            qkv: self.stacked(&projections.map(|(weight, outputs)| (name(weight), outputs)), hidden)?,
            qkv_bias: match config.qkv_bias {
                true => Some(self.concatenated(&biases.map(|(weight, len)| (name(weight), len)))?),
                false => None,
            },
            qk_norm: match config.qk_norm {
                true => Some((
                    self.vector(name(LayerWeight::QNorm), heads.head_dim)?,
                    self.vector(name(LayerWeight::KNorm), heads.head_dim)?,
                )),
                false => None,
            },
            attn_out: self.stacked(&[(name(LayerWeight::AttnOut), hidden)], q)?,
            ffn_norm: self.vector(name(LayerWeight::FfnNorm), hidden)?,
            gate_up: self.stacked(&[(name(LayerWeight::Gate), ffn), (name(LayerWeight::Up), ffn)], hidden)?,
            down: self.stacked(&[(name(LayerWeight::Down), hidden)], ffn)?,
        })
    }

    /// Reads a weight and checks its shape.
    fn tensor(&mut self, name: WeightName, rows: usize, cols: usize) -> Result<Vec<f32>, Error> {
        let matrix = self.source.tensor(name)?;
        if (matrix.rows, matrix.cols) != (rows, cols) || matrix.data.len() != rows * cols {
            let problem = format!("has shape [{}, {}], must be [{rows}, {cols}]", matrix.rows, matrix.cols);
            return Err(invalid(&format!("{name:?}"), problem));
        }
        self.state.done_bytes += self.source.bytes(name);
        (self.progress)(self.state);
        Ok(matrix.data)
    }

    fn vector(&mut self, name: WeightName, len: usize) -> Result<Vec<f32>, Error> {
        self.tensor(name, 1, len)
    }

    /// Vectors one after another.
    fn concatenated(&mut self, parts: &[(WeightName, usize)]) -> Result<Vec<f32>, Error> {
        let mut whole = Vec::new();
        for (name, len) in parts {
            whole.extend(self.vector(*name, *len)?);
        }
        Ok(whole)
    }

    /// Matrices with the same inputs, their outputs over one another.
    fn stacked(&mut self, parts: &[(WeightName, usize)], inputs: usize) -> Result<PackedMatrix, Error> {
        let outputs = parts.iter().map(|(_, outputs)| outputs).sum();
        let mut whole = Vec::new();
        for (name, outputs) in parts {
            let part = self.tensor(*name, *outputs, inputs)?;
            // A single part, the embedding above all, is not copied.
            if whole.is_empty() { whole = part } else { whole.extend(part) }
        }
        Ok(PackedMatrix::pack(outputs, inputs, &whole))
    }
}
