//! The architectures that the forward pass computes, and the limits that every configuration keeps.

use super::fault::{Fault, quote};
use crate::{Error, ModelConfig, Rope};

/// A supported family. Mistral computes what Llama computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
}

const HINT: &str = "supported architectures are llama (Llama 2 and 3, Mistral, SmolLM2), qwen2 and qwen3";

impl Architecture {
    /// By GGUF's `general.architecture`.
    pub(crate) fn from_gguf(name: &str) -> Result<Self, Fault> {
        match name {
            "llama" => Ok(Self::Llama),
            "qwen2" => Ok(Self::Qwen2),
            "qwen3" => Ok(Self::Qwen3),
            other => Err(Fault::unsupported(format!("architecture `{}`", quote(other)), HINT)),
        }
    }

    /// By a class name of Hugging Face's `architectures`; also gives our name of the architecture.
    pub(crate) fn from_class(class: &str) -> Result<(Self, &'static str), Fault> {
        match class {
            "LlamaForCausalLM" => Ok((Self::Llama, "llama")),
            "MistralForCausalLM" => Ok((Self::Llama, "mistral")),
            "Qwen2ForCausalLM" => Ok((Self::Qwen2, "qwen2")),
            "Qwen3ForCausalLM" => Ok((Self::Qwen3, "qwen3")),
            other => Err(Fault::unsupported(format!("architecture `{}`", quote(other)), HINT)),
        }
    }

    /// q, k and v have biases.
    pub(crate) fn has_qkv_bias(self) -> bool {
        self == Self::Qwen2
    }

    /// q and k are normed per head.
    pub(crate) fn has_qk_norm(self) -> bool {
        self == Self::Qwen3
    }
}

/// Refuses configurations that no model has or that give NaN, before anything is sized by them.
pub(crate) fn check(config: &ModelConfig) -> Result<(), Fault> {
    let heads = config.heads;
    let sizes = [
        ("block_count", config.layers, 1_024),
        ("embedding_length", config.hidden, 1 << 18),
        ("feed_forward_length", config.ffn, 1 << 20),
        ("vocabulary", config.vocabulary, 1 << 22),
        ("attention.head_count_kv", heads.kv_heads, 1_024),
        ("attention.head_count", heads.kv_heads.saturating_mul(heads.group), 1_024),
        ("attention.key_length", heads.head_dim, 1_024),
    ];
    for (field, value, max) in sizes {
        if value == 0 || value > max {
            return Err(Fault::corrupt(field, format!("is {value}, where 1 to {max} is expected")));
        }
    }
    if config.context_tokens == 0 || config.context_tokens > 1 << 32 {
        let problem = format!("is {}, where 1 to 2^32 is expected", config.context_tokens);
        return Err(Fault::corrupt("context_length", problem));
    }
    if !heads.head_dim.is_multiple_of(2) {
        return Err(Fault::corrupt("attention.key_length", format!("is {}, which is odd", heads.head_dim)));
    }
    positive("attention.layer_norm_rms_epsilon", config.norm_eps, 0.1)?;
    check_rope(config)
}

fn check_rope(config: &ModelConfig) -> Result<(), Fault> {
    let (rope, head_dim) = (&config.rope, config.heads.head_dim);
    if rope.dim == 0 || rope.dim > head_dim || !rope.dim.is_multiple_of(2) {
        let problem = format!("is {}, where an even number from 2 to {head_dim} is expected", rope.dim);
        return Err(Fault::corrupt("rope.dimension_count", problem));
    }
    positive("rope.freq_base", rope.theta, 1e18)?;
    match Rope::new(rope) {
        Ok(_) => Ok(()),
        Err(Error::Invalid { field, problem }) => Err(Fault::corrupt(field, problem)),
        Err(other) => Err(Fault::corrupt("rope", other.to_string())),
    }
}

/// Refuses NaN, infinity, zero, negative numbers and absurd ones.
fn positive(field: &str, value: f32, max: f32) -> Result<(), Fault> {
    if value.is_finite() && value > 0.0 && value <= max {
        return Ok(());
    }
    Err(Fault::corrupt(field, format!("is {value}, where a number above 0 and up to {max} is expected")))
}
