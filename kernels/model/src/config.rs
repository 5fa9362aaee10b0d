//! What a model says of itself.

use longshore_attention::HeadShape;

use crate::Error;

/// Shape and constants of a Llama-architecture decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Architecture as the weights name it: `llama`, `mistral`, `qwen2`, `qwen3`.
    pub architecture: String,
    /// Name as the weights give it, or the file's.
    pub name: String,
    /// Layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Heads of a layer.
    pub heads: HeadShape,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Entries of the vocabulary.
    pub vocabulary: usize,
    /// Epsilon of RMSNorm.
    pub norm_eps: f32,
    /// Positions that the model was made for.
    pub context_tokens: u64,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// The output matrix is the embedding.
    pub tied_embeddings: bool,
    /// q, k and v have biases (Qwen2).
    pub qkv_bias: bool,
    /// q and k are RMS-normalised per head before rotation (Qwen3).
    pub qk_norm: bool,
}

/// Which elements of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// Elements 2i and 2i + 1 (GGUF `llama` weights, which are stored permuted).
    Interleaved,
    /// Elements i and i + dim / 2 (Hugging Face weights, GGUF `qwen2`, `qwen3`).
    Halves,
}

/// Rotary position embedding of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Pairing.
    pub style: RopeStyle,
    /// Base of the frequencies.
    pub theta: f32,
    /// Rotated elements of a head; the rest pass through.
    pub dim: usize,
    /// Scaling for contexts beyond the training length.
    pub scaling: RopeScaling,
}

/// RoPE scaling of a model's own configuration.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// > 1.
        factor: f32,
    },
    /// NTK-aware: theta grows with `factor`.
    Ntk {
        /// > 1.
        factor: f32,
    },
    /// Llama 3.1: by wavelength.
    Llama3 {
        /// > 1.
        factor: f32,
        /// Low-frequency factor.
        low_freq_factor: f32,
        /// High-frequency factor.
        high_freq_factor: f32,
        /// Training context.
        original_context: u64,
    },
    /// YaRN.
    Yarn {
        /// > 1.
        factor: f32,
        /// Training context.
        original_context: u64,
        /// Multiplies q·k by its square; `None` means `0.1 ln(factor) + 1`.
        attention_factor: Option<f32>,
        /// Rotations where interpolation is off.
        beta_fast: f32,
        /// Rotations where interpolation is full.
        beta_slow: f32,
    },
    /// One divisor per frequency, as GGUF's `rope_freqs.weight` carries them.
    Factors(Vec<f32>),
}

impl ModelConfig {
    /// Refuses sizes that no backend can compute with: 0, and rotations of more elements than a head has.
    pub fn check(&self) -> Result<(), Error> {
        let invalid = |field: &str, problem| Err(Error::Invalid { field: field.to_owned(), problem });
        let heads = self.heads;
        for (field, value) in [
            ("layers", self.layers),
            ("hidden", self.hidden),
            ("heads.kv_heads", heads.kv_heads),
            ("heads.group", heads.group),
            ("heads.head_dim", heads.head_dim),
            ("ffn", self.ffn),
            ("vocabulary", self.vocabulary),
        ] {
            if value == 0 {
                return invalid(field, "is 0".to_owned());
            }
        }
        if self.rope.dim > heads.head_dim {
            let problem = format!("is {}, a head has {} elements", self.rope.dim, heads.head_dim);
            return invalid("rope.dim", problem);
        }
        Ok(())
    }

    /// Softmax scale of attention. (YaRN's factor is applied to the rotation, not here.)
    pub fn attention_scale(&self) -> f32 {
        1.0 / (self.heads.head_dim as f32).sqrt()
    }

    /// Stable text form of the position policy, for the namespace digest.
    pub fn position_fingerprint(&self) -> String {
        format!("{:?}", self.rope)
    }
}
