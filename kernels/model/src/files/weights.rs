//! Where each weight of a model lies, and how it is handed out.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::dequantize::{TensorType, dequantize};
use super::fault::Fault;
use super::mapping::Mapping;
use crate::{Error, ModelConfig};

/// A weight of a decoder, whatever the file calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WeightName {
    /// Token embedding `[vocabulary, hidden]`.
    Embedding,
    /// Output matrix `[vocabulary, hidden]`; the embedding where the model ties them.
    Output,
    /// Scale of the last norm `[1, hidden]`.
    OutputNorm,
    /// Divisors of the rotation frequencies `[1, rope.dim / 2]`; only some GGUF files have them.
    RopeFreqs,
    /// A weight of the layer with this index.
    Layer(usize, LayerWeight),
}

impl WeightName {
    /// Every weight that a backend reads for a model of this configuration.
    pub fn all(config: &ModelConfig) -> impl Iterator<Item = Self> {
        let output = (!config.tied_embeddings).then_some(Self::Output);
        let layers = (0..config.layers).flat_map(|layer| {
            let used = LayerWeight::ALL.into_iter().filter(|weight| weight.used_by(config));
            used.map(move |weight| Self::Layer(layer, weight))
        });
        [Self::Embedding, Self::OutputNorm].into_iter().chain(output).chain(layers)
    }

    /// Whether rows of activations are multiplied with it.
    pub fn is_matrix(&self) -> bool {
        use LayerWeight::{AttnOut, Down, Gate, K, Q, Up, V};
        match self {
            Self::Embedding | Self::Output => true,
            Self::OutputNorm | Self::RopeFreqs => false,
            Self::Layer(_, weight) => matches!(weight, Q | K | V | AttnOut | Gate | Up | Down),
        }
    }
}

/// A weight of one layer. With `q = query_heads * head_dim` and `kv = kv_heads * head_dim`:
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LayerWeight {
    /// Scale of the norm before attention `[1, hidden]`.
    AttnNorm,
    /// Query projection `[q, hidden]`.
    Q,
    /// Key projection `[kv, hidden]`.
    K,
    /// Value projection `[kv, hidden]`.
    V,
    /// Query bias `[1, q]`, where the model has biases.
    QBias,
    /// Key bias `[1, kv]`, where the model has biases.
    KBias,
    /// Value bias `[1, kv]`, where the model has biases.
    VBias,
    /// Scale of the query norm `[1, head_dim]`, where the model norms heads.
    QNorm,
    /// Scale of the key norm `[1, head_dim]`, where the model norms heads.
    KNorm,
    /// Output projection of attention `[hidden, q]`.
    AttnOut,
    /// Scale of the norm before the feed-forward layer `[1, hidden]`.
    FfnNorm,
    /// Gate projection `[ffn, hidden]`.
    Gate,
    /// Up projection `[ffn, hidden]`.
    Up,
    /// Down projection `[hidden, ffn]`.
    Down,
}

impl LayerWeight {
    /// Every weight of a layer, in the order of the forward pass.
    pub const ALL: [Self; 14] = [
        Self::AttnNorm,
        Self::Q,
        Self::K,
        Self::V,
        Self::QBias,
        Self::KBias,
        Self::VBias,
        Self::QNorm,
        Self::KNorm,
        Self::AttnOut,
        Self::FfnNorm,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// Whether a model of this configuration has the weight.
    pub fn used_by(self, config: &ModelConfig) -> bool {
        match self {
            Self::QBias | Self::KBias | Self::VBias => config.qkv_bias,
            Self::QNorm | Self::KNorm => config.qk_norm,
            _ => true,
        }
    }

    /// Stored shape, slowest dimension first.
    fn shape(self, config: &ModelConfig) -> Vec<usize> {
        let q = config.heads.query_heads() * config.heads.head_dim;
        let kv = config.heads.kv_heads * config.heads.head_dim;
        match self {
            Self::AttnNorm | Self::FfnNorm => vec![config.hidden],
            Self::Q => vec![q, config.hidden],
            Self::K | Self::V => vec![kv, config.hidden],
            Self::QBias => vec![q],
            Self::KBias | Self::VBias => vec![kv],
            Self::QNorm | Self::KNorm => vec![config.heads.head_dim],
            Self::AttnOut => vec![config.hidden, q],
            Self::Gate | Self::Up => vec![config.ffn, config.hidden],
            Self::Down => vec![config.hidden, config.ffn],
        }
    }
}

/// A weight in f32, row-major; vectors have one row.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// Rows (outputs of a projection).
    pub rows: usize,
    /// Columns (inputs of a projection).
    pub cols: usize,
    /// `rows * cols` finite elements.
    pub data: Vec<f32>,
}

/// A weight as a file has it, row-major; vectors have one row.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredMatrix<'a> {
    /// Element type.
    pub kind: TensorType,
    /// Rows (outputs of a projection).
    pub rows: usize,
    /// Columns (inputs of a projection).
    pub cols: usize,
    /// Whole rows of whole blocks.
    pub bytes: Cow<'a, [u8]>,
}

impl StoredMatrix<'_> {
    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        let (elements, bytes) = self.kind.block();
        self.cols / elements * bytes
    }

    /// Dequantises some rows, f32 `[rows.len(), cols]`; tells whether all of it is finite.
    ///
    /// # Panics
    /// When the matrix does not have the rows, or `out` not their size.
    #[must_use]
    pub fn dequantize(&self, rows: Range<usize>, out: &mut [f32]) -> bool {
        let bytes = self.row_bytes();
        dequantize(self.kind, &self.bytes[rows.start * bytes..rows.end * bytes], out)
    }
}

/// Names of weights in a family of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Naming {
    Gguf,
    HuggingFace,
}

impl Naming {
    /// Name of the stored tensor.
    pub(crate) fn of(self, name: WeightName) -> String {
        match (self, name) {
            (Self::Gguf, WeightName::Embedding) => "token_embd.weight".into(),
            (Self::Gguf, WeightName::Output) => "output.weight".into(),
            (Self::Gguf, WeightName::OutputNorm) => "output_norm.weight".into(),
            (_, WeightName::RopeFreqs) => "rope_freqs.weight".into(),
            (Self::Gguf, WeightName::Layer(layer, weight)) => format!("blk.{layer}.{}", gguf_suffix(weight)),
            (Self::HuggingFace, WeightName::Embedding) => "model.embed_tokens.weight".into(),
            (Self::HuggingFace, WeightName::Output) => "lm_head.weight".into(),
            (Self::HuggingFace, WeightName::OutputNorm) => "model.norm.weight".into(),
            (Self::HuggingFace, WeightName::Layer(layer, weight)) => {
                format!("model.layers.{layer}.{}", hugging_face_suffix(weight))
            }
        }
    }

    /// Tensors that some exporters write and that carry nothing the configuration does not say.
    fn is_redundant(self, name: &str) -> bool {
        self == Self::HuggingFace && name.ends_with(".rotary_emb.inv_freq")
    }
}

fn gguf_suffix(weight: LayerWeight) -> &'static str {
    match weight {
        LayerWeight::AttnNorm => "attn_norm.weight",
        LayerWeight::Q => "attn_q.weight",
        LayerWeight::K => "attn_k.weight",
        LayerWeight::V => "attn_v.weight",
        LayerWeight::QBias => "attn_q.bias",
        LayerWeight::KBias => "attn_k.bias",
        LayerWeight::VBias => "attn_v.bias",
        LayerWeight::QNorm => "attn_q_norm.weight",
        LayerWeight::KNorm => "attn_k_norm.weight",
        LayerWeight::AttnOut => "attn_output.weight",
        LayerWeight::FfnNorm => "ffn_norm.weight",
        LayerWeight::Gate => "ffn_gate.weight",
        LayerWeight::Up => "ffn_up.weight",
        LayerWeight::Down => "ffn_down.weight",
    }
}

fn hugging_face_suffix(weight: LayerWeight) -> &'static str {
    match weight {
        LayerWeight::AttnNorm => "input_layernorm.weight",
        LayerWeight::Q => "self_attn.q_proj.weight",
        LayerWeight::K => "self_attn.k_proj.weight",
        LayerWeight::V => "self_attn.v_proj.weight",
        LayerWeight::QBias => "self_attn.q_proj.bias",
        LayerWeight::KBias => "self_attn.k_proj.bias",
        LayerWeight::VBias => "self_attn.v_proj.bias",
        LayerWeight::QNorm => "self_attn.q_norm.weight",
        LayerWeight::KNorm => "self_attn.k_norm.weight",
        LayerWeight::AttnOut => "self_attn.o_proj.weight",
        LayerWeight::FfnNorm => "post_attention_layernorm.weight",
        LayerWeight::Gate => "mlp.gate_proj.weight",
        LayerWeight::Up => "mlp.up_proj.weight",
        LayerWeight::Down => "mlp.down_proj.weight",
    }
}

/// A tensor in one of the mapped files. Whoever makes one has checked that the range lies in the file and has the size
/// that shape and type ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoredTensor {
    /// Index of the file.
    pub(crate) file: usize,
    /// First byte.
    pub(crate) start: usize,
    /// Bytes.
    pub(crate) bytes: usize,
    /// Element type.
    pub(crate) kind: TensorType,
    /// Shape, slowest dimension first.
    pub(crate) shape: Vec<usize>,
}

impl StoredTensor {
    /// Elements.
    pub(crate) fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The weights of a model, still in their files.
pub struct Weights {
    naming: Naming,
    files: Vec<Arc<Mapping>>,
    tensors: BTreeMap<String, StoredTensor>,
    tied: bool,
}

impl Weights {
    /// Checks that every weight of `config` is there in the right shape and that nothing else is.
    pub(crate) fn new(
        naming: Naming,
        files: Vec<Arc<Mapping>>,
        tensors: BTreeMap<String, StoredTensor>,
        config: &ModelConfig,
    ) -> Result<Self, Fault> {
        let expected = expected_shapes(naming, config);
        for (name, shape) in &expected {
            let tensor = tensors.get(name).ok_or_else(|| Fault::corrupt(name, "is missing"))?;
            if tensor.shape != *shape {
                let found = &tensor.shape;
                return Err(Fault::corrupt(
                    name,
                    format!("has shape {found:?}, where {shape:?} is expected"),
                ));
            }
        }
        // A tensor that nothing reads would mean that the model computes something else than its author meant.
        let tied_copy = naming.of(WeightName::Output);
        let optional = naming.of(WeightName::RopeFreqs);
        for name in tensors.keys() {
            let spare = naming.is_redundant(name) || *name == optional;
            let copy = config.tied_embeddings && *name == tied_copy;
            if !(expected.contains_key(name) || spare || copy) {
                let feature =
                    format!("tensor `{}` in a `{}` model", super::fault::quote(name), config.architecture);
                return Err(Fault::unsupported(feature, "use weights of the unmodified architecture"));
            }
        }
        Ok(Self { naming, files, tensors, tied: config.tied_embeddings })
    }

    /// Reads a weight and dequantises it to f32.
    pub fn tensor(&self, name: WeightName) -> Result<Matrix, Error> {
        let StoredMatrix { kind, rows, cols, bytes } = self.stored_matrix(name)?;
        let mut data = vec![0.0; rows * cols];
        if !dequantize(kind, &bytes, &mut data) {
            return Err(self.not_finite(name));
        }
        Ok(Matrix { rows, cols, data })
    }

    /// A weight as the file has it.
    pub fn stored_matrix(&self, name: WeightName) -> Result<StoredMatrix<'_>, Error> {
        let stored = self.stored(name).ok_or_else(|| self.corrupt(name, "is missing"))?;
        let bytes = &self.files[stored.file][stored.start..stored.start + stored.bytes];
        let cols = *stored.shape.last().expect("tensors have one or more dimensions");
        let rows = stored.elements() / cols;
        Ok(StoredMatrix { kind: stored.kind, rows, cols, bytes: Cow::Borrowed(bytes) })
    }

    /// What is wrong with a weight that holds an infinity or NaN.
    pub fn not_finite(&self, name: WeightName) -> Error {
        self.corrupt(name, "holds a value that is not finite")
    }

    /// Lets the pages of a weight go; they are read again when they are touched.
    pub fn release(&self, name: WeightName) {
        if let Some(stored) = self.stored(name) {
            self.files[stored.file].release(stored.start, stored.bytes);
        }
    }

    fn corrupt(&self, name: WeightName, problem: &str) -> Error {
        let file = self.stored(name).map_or(0, |stored| stored.file);
        let path = self.files.get(file).map(|file| file.path().to_path_buf()).unwrap_or_default();
        Error::Corrupt { path, field: self.naming.of(self.held(name)), problem: problem.into() }
    }

    /// Whether the files hold the weight (a tied output counts as held).
    pub fn contains(&self, name: WeightName) -> bool {
        self.stored(name).is_some()
    }

    /// Bytes of a weight in the files; 0 where it is absent.
    pub fn stored_bytes(&self, name: WeightName) -> u64 {
        self.stored(name).map_or(0, |tensor| tensor.bytes as u64)
    }

    /// Bytes of all tensors in the files.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.bytes as u64).sum()
    }

    fn stored(&self, name: WeightName) -> Option<&StoredTensor> {
        self.tensors.get(&self.naming.of(self.held(name)))
    }

    /// The weight that stands for this one.
    fn held(&self, name: WeightName) -> WeightName {
        if self.tied && name == WeightName::Output { WeightName::Embedding } else { name }
    }

    pub(crate) fn inventory(&self) -> Inventory {
        let mut by_kind = BTreeMap::new();
        for tensor in self.tensors.values() {
            *by_kind.entry(tensor.kind).or_insert(0u64) += tensor.bytes as u64;
        }
        let main = by_kind.into_iter().max_by_key(|(_, bytes)| *bytes).map(|(kind, _)| kind);
        Inventory {
            tensors: self.tensors.len(),
            parameters: self.tensors.values().map(|tensor| tensor.elements() as u64).sum(),
            quantization: main.map_or("none", TensorType::name).into(),
        }
    }
}

/// What `model show` tells about the tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Inventory {
    pub(crate) tensors: usize,
    pub(crate) parameters: u64,
    /// The type that takes most bytes.
    pub(crate) quantization: String,
}

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Weights")
            .field("naming", &self.naming)
            .field("files", &self.files)
            .field("tensors", &self.tensors.len())
            .finish()
    }
}

fn expected_shapes(naming: Naming, config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
    let mut expected = BTreeMap::new();
    let table = vec![config.vocabulary, config.hidden];
    expected.insert(naming.of(WeightName::Embedding), table.clone());
    if !config.tied_embeddings {
        expected.insert(naming.of(WeightName::Output), table);
    }
    expected.insert(naming.of(WeightName::OutputNorm), vec![config.hidden]);
    for layer in 0..config.layers {
        for weight in LayerWeight::ALL.into_iter().filter(|weight| weight.used_by(config)) {
            expected.insert(naming.of(WeightName::Layer(layer, weight)), weight.shape(config));
        }
    }
    expected
}
