//! Brings a model's weights to the device, one matrix at a time through a bounded buffer of the host.

use std::sync::Arc;

use longshore_compute::ComputePool;
use longshore_model::{
    LayerWeight, LoadProgress, ModelConfig, Rope, StoredMatrix, TensorType, WeightName, Weights,
};

use super::compute::Compute;
use super::heads::HeadWeights;
use super::linear::{Linear, Products};
use super::pack::Problem;
use super::programs::{Form, Precision, Programs};
use super::upload::{Fault, RowOf, upload};
use super::{failed, invalid};
use crate::{Buffer, Device, Error};

/// Rows of gates, then of ups, that alternate in one matrix.
const ALTERNATE: usize = 8;

/// How a device computes a model.
#[derive(Debug, Clone)]
pub struct ModelOptions {
    /// Packs weights.
    pub pool: Arc<ComputePool>,
    /// Precision of linear layers; `None` keeps that of the weights: f16 for quantised ones.
    pub precision: Option<Precision>,
    /// Keeps quantised weights in 4 or 8 bits, dequantised as they are multiplied, where there is a form for their type (`Q4_0`, `Q4_1`,
    /// `Q4_K`, `Q5_0`, `Q6_K`, `Q8_0`); all others become 16 bits at load.
    pub keep_quantised: bool,
    /// Rows that go through a layer together; bounds scratch memory and changes no bit. At least 32 do.
    pub pass_rows: usize,
    /// A library for products of many rows; without it our own kernels compute them, which keep a row's bits apart from other rows.
    pub products: Option<Arc<dyn Products>>,
}

impl ModelOptions {
    /// Our own kernels, in the precision of the weights.
    pub fn new(pool: Arc<ComputePool>) -> Self {
        Self { pool, precision: None, keep_quantised: true, pass_rows: 2048, products: None }
    }

    /// The precision of a model whose weights are mostly of type `kind`.
    pub(super) fn precision_of(&self, kind: TensorType) -> Precision {
        self.precision.unwrap_or(match kind {
            TensorType::F32 => Precision::F32,
            TensorType::Bf16 => Precision::Bf16,
            _ => Precision::F16,
        })
    }
}

/// Some outputs of a linear layer that are computed together; they begin at output `first`.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) first: usize,
    pub(super) linear: Linear,
}

/// Weights of one layer. With `q = query_heads * head_dim` and `kv = kv_heads * head_dim`:
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) attn_norm: Buffer,
    /// Together `[q + 2 kv, hidden]`.
    pub(super) qkv: Vec<Part>,
    pub(super) heads: HeadWeights,
    /// `[hidden, q]`.
    pub(super) attn_out: Linear,
    pub(super) ffn_norm: Buffer,
    /// `[2 ffn, hidden]`, eight gates and eight ups in turn; both are filled up to a multiple of eight with zeros.
    pub(super) gate_up: Linear,
    /// `[hidden, ffn]`.
    pub(super) down: Linear,
}

impl Layer {
    pub(super) fn matrices(&self) -> impl Iterator<Item = &Linear> {
        let rest = [&self.attn_out, &self.gate_up, &self.down];
        self.qkv.iter().map(|part| &part.linear).chain(rest)
    }
}

/// A model on the device.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) compute: Arc<Compute>,
    pub(super) rope: Rope,
    pub(super) embedding: Linear,
    /// `None` where the model ties it to the embedding.
    pub(super) output: Option<Linear>,
    pub(super) output_norm: Buffer,
    pub(super) layers: Vec<Layer>,
}

/// The type that takes most bytes of the matrices.
fn main_type(config: &ModelConfig, weights: &Weights) -> Result<TensorType, longshore_model::Error> {
    let mut bytes = TensorType::ALL.map(|kind| (0, kind));
    for name in WeightName::all(config).filter(WeightName::is_matrix) {
        let kind = weights.stored_matrix(name)?.kind;
        let index = TensorType::ALL.iter().position(|other| *other == kind).expect("it is one of all");
        bytes[index].0 += weights.stored_bytes(name);
    }
    let (_, kind) = bytes.into_iter().max().expect("there are types");
    Ok(kind)
}

/// Bytes on the device that [`load`] is going to need, scratch not counted.
pub(super) fn expected_bytes(
    config: &ModelConfig,
    weights: &Weights,
    options: &ModelOptions,
) -> Result<u64, longshore_model::Error> {
    let precision = options.precision_of(main_type(config, weights)?);
    let mut bytes = 0;
    for name in WeightName::all(config) {
        let StoredMatrix { kind, rows, cols, .. } = weights.stored_matrix(name)?;
        let own = Form::of(precision, kind, options.keep_quantised);
        let (form, rows) = match pair_of(name) {
            _ if !name.is_matrix() => (Form::F32, rows),
            Some(other) => {
                let other = Form::of(precision, weights.stored_matrix(other)?.kind, options.keep_quantised);
                (pair_form(own, other), rows.next_multiple_of(ALTERNATE))
            }
            None => (own, rows),
        };
        bytes += form.row_bytes(cols).iter().sum::<usize>() as u64 * rows as u64;
    }
    Ok(bytes)
}

/// The matrix whose rows take turns with those of `name`.
fn pair_of(name: WeightName) -> Option<WeightName> {
    match name {
        WeightName::Layer(layer, LayerWeight::Gate) => Some(WeightName::Layer(layer, LayerWeight::Up)),
        WeightName::Layer(layer, LayerWeight::Up) => Some(WeightName::Layer(layer, LayerWeight::Gate)),
        _ => None,
    }
}

/// The form of two matrices whose rows take turns.
fn pair_form(first: Form, second: Form) -> Form {
    if first == second { first } else { Form::Plain }
}

/// Loads every weight that `config` asks for.
pub(super) fn load(
    device: Arc<dyn Device>,
    config: &ModelConfig,
    weights: &Weights,
    options: &ModelOptions,
    progress: &dyn Fn(LoadProgress),
) -> Result<Loaded, longshore_model::Error> {
    config.check()?;
    let rope = Rope::new(&config.rope)?;
    let precision = options.precision_of(main_type(config, weights)?);
    let programs = Programs::new(precision);
    let compute = Arc::new(Compute { device, precision, programs, products: options.products.clone() });
    let total_bytes = WeightName::all(config).map(|name| weights.stored_bytes(name)).sum();
    let state = LoadProgress { done_bytes: 0, total_bytes };
    let needed = expected_bytes(config, weights, options)?;
    let mut loader = Loader { compute: &compute, config, weights, options, needed, progress, state };
    let embedding = loader.matrix(WeightName::Embedding, config.vocabulary, config.hidden)?;
    let layers = (0..config.layers).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
    let output_norm = loader.vectors(&[WeightName::OutputNorm], &[config.hidden])?;
    let output = match config.tied_embeddings {
        true => None,
        false => Some(loader.matrix(WeightName::Output, config.vocabulary, config.hidden)?),
    };
    // What was queued is done, or told, before anybody counts on the model.
    compute.device.synchronize().map_err(failed)?;
    Ok(Loaded { compute, rope, embedding, output, output_norm, layers })
}

struct Loader<'a> {
    compute: &'a Arc<Compute>,
    config: &'a ModelConfig,
    weights: &'a Weights,
    options: &'a ModelOptions,
    /// Bytes of the whole model on the device.
    needed: u64,
    progress: &'a dyn Fn(LoadProgress),
    state: LoadProgress,
}

impl<'a> Loader<'a> {
    fn layer(&mut self, layer: usize) -> Result<Layer, longshore_model::Error> {
        use LayerWeight as L;
        let (config, name) = (self.config, |weight| WeightName::Layer(layer, weight));
        let (hidden, ffn, heads) = (config.hidden, config.ffn, config.heads);
        let (q, kv) = (heads.query_heads() * heads.head_dim, heads.kv_heads * heads.head_dim);
        Ok(Layer {
            attn_norm: self.vectors(&[name(L::AttnNorm)], &[hidden])?,
            qkv: self.stacked(&[name(L::Q), name(L::K), name(L::V)], &[q, kv, kv], hidden)?,
            heads: HeadWeights {
                bias: match config.qkv_bias {
                    true => {
                        Some(self.vectors(&[name(L::QBias), name(L::KBias), name(L::VBias)], &[q, kv, kv])?)
                    }
                    false => None,
                },
                norms: match config.qk_norm {
                    true => Some([
                        self.vectors(&[name(L::QNorm)], &[heads.head_dim])?,
                        self.vectors(&[name(L::KNorm)], &[heads.head_dim])?,
                    ]),
                    false => None,
                },
            },
            attn_out: self.matrix(name(L::AttnOut), hidden, q)?,
            ffn_norm: self.vectors(&[name(L::FfnNorm)], &[hidden])?,
            gate_up: self.alternating([name(L::Gate), name(L::Up)], ffn, hidden)?,
            down: self.matrix(name(L::Down), hidden, ffn)?,
        })
    }

    /// Finds a weight and checks its shape.
    fn stored(
        &self,
        name: WeightName,
        rows: usize,
        cols: usize,
    ) -> Result<StoredMatrix<'a>, longshore_model::Error> {
        let matrix = self.weights.stored_matrix(name)?;
        if (matrix.rows, matrix.cols) != (rows, cols) {
            let problem = format!("has shape [{}, {}], must be [{rows}, {cols}]", matrix.rows, matrix.cols);
            return Err(invalid(&format!("{name:?}"), problem));
        }
        Ok(matrix)
    }

    /// Some vectors as f32, one after the other.
    fn vectors(&mut self, names: &[WeightName], lens: &[usize]) -> Result<Buffer, longshore_model::Error> {
        let mut data = vec![0.0; lens.iter().sum()];
        let mut rest = &mut data[..];
        for (name, len) in names.iter().zip(lens) {
            let (part, after) = rest.split_at_mut(*len);
            if !self.stored(*name, 1, *len)?.dequantize(0..1, part) {
                return Err(self.weights.not_finite(*name));
            }
            rest = after;
        }
        self.done(names);
        Buffer::from_slice(&self.compute.device, &data).map_err(|error| self.out_of_memory(error))
    }

    fn matrix(
        &mut self,
        name: WeightName,
        rows: usize,
        cols: usize,
    ) -> Result<Linear, longshore_model::Error> {
        let matrix = self.stored(name, rows, cols)?;
        let form = self.form(matrix.kind);
        let linear = self.pack(form, &[(name, matrix)], rows, &|row| Some((0, row)))?;
        self.done(&[name]);
        Ok(linear)
    }

    /// Matrices of the same inputs, one after the other; neighbours of one form become one.
    fn stacked(
        &mut self,
        names: &[WeightName],
        rows: &[usize],
        cols: usize,
    ) -> Result<Vec<Part>, longshore_model::Error> {
        let mut sources = Vec::new();
        for (name, rows) in names.iter().zip(rows) {
            let matrix = self.stored(*name, *rows, cols)?;
            sources.push((self.form(matrix.kind), (*name, matrix)));
        }
        let (mut parts, mut first) = (Vec::new(), 0);
        for same in sources.chunk_by(|(a, _), (b, _)| a == b) {
            let form = same[0].0;
            let same: Vec<_> = same.iter().map(|(_, source)| source.clone()).collect();
            let of: Vec<(usize, usize)> = same
                .iter()
                .enumerate()
                .flat_map(|(i, (_, m))| (0..m.rows).map(move |row| (i, row)))
                .collect();
            let linear = self.pack(form, &same, of.len(), &|output| Some(of[output]))?;
            parts.push(Part { first, linear });
            first += of.len();
        }
        self.done(names);
        Ok(parts)
    }

    /// Two matrices of one shape, eight rows of each in turn.
    fn alternating(
        &mut self,
        names: [WeightName; 2],
        rows: usize,
        cols: usize,
    ) -> Result<Linear, longshore_model::Error> {
        let sources =
            [(names[0], self.stored(names[0], rows, cols)?), (names[1], self.stored(names[1], rows, cols)?)];
        let [first, second] = [&sources[0].1, &sources[1].1].map(|matrix| self.form(matrix.kind));
        let form = pair_form(first, second);
        let outputs = 2 * rows.next_multiple_of(ALTERNATE);
        let row_of = |output: usize| {
            let (pair, within) = (output / (2 * ALTERNATE), output % (2 * ALTERNATE));
            let row = pair * ALTERNATE + within % ALTERNATE;
            (row < rows).then_some((within / ALTERNATE, row))
        };
        let linear = self.pack(form, &sources, outputs, &row_of)?;
        self.done(&names);
        Ok(linear)
    }

    fn form(&self, kind: TensorType) -> Form {
        Form::of(self.compute.precision, kind, self.options.keep_quantised)
    }

    fn pack(
        &self,
        form: Form,
        sources: &[(WeightName, StoredMatrix<'_>)],
        outputs: usize,
        row_of: &RowOf<'_>,
    ) -> Result<Linear, longshore_model::Error> {
        let matrices: Vec<&StoredMatrix<'_>> = sources.iter().map(|(_, matrix)| matrix).collect();
        let packed = upload(self.compute, &self.options.pool, form, &matrices, outputs, row_of);
        packed.map_err(|fault| match fault {
            Fault::Device(error) => self.out_of_memory(error),
            Fault::Weights { matrix, problem: Problem::NotFinite } => {
                self.weights.not_finite(sources[matrix].0)
            }
            Fault::Weights { matrix, problem: Problem::TooLarge(x) } => {
                let (precision, name) = (self.compute.precision.name(), sources[matrix].0);
                let problem = format!("is {precision}, where `{name:?}` holds {x}; hint: use bf16 or f32");
                invalid("precision", problem)
            }
        })
    }

    /// What is told where the device has no room: the bytes of the whole model.
    fn out_of_memory(&self, error: Error) -> longshore_model::Error {
        failed(match error {
            Error::OutOfMemory { problem, .. } => Error::OutOfMemory {
                bytes: self.needed as usize,
                problem: format!("the model's weights; {problem}"),
            },
            other => other,
        })
    }

    fn done(&mut self, names: &[WeightName]) {
        for name in names {
            self.weights.release(*name);
            self.state.done_bytes += self.weights.stored_bytes(*name);
            (self.progress)(self.state);
        }
    }
}
