//! The configuration of a model, from GGUF metadata.

use longshore_attention::HeadShape;

use super::{Gguf, Metadata, Value};
use crate::files::architecture::{Architecture, check};
use crate::files::dequantize::dequantize;
use crate::files::fault::{Fault, quote};
use crate::files::weights::{LayerWeight, Naming, WeightName};
use crate::{ModelConfig, RopeConfig, RopeScaling, RopeStyle};

/// Reads the configuration; `file` is the whole file, for the few tensors that are configuration.
pub(crate) fn model_config(gguf: &Gguf<'_>, file: &[u8], file_stem: &str) -> Result<ModelConfig, Fault> {
    let metadata = &gguf.metadata;
    let name = metadata.text("general.architecture")?;
    let name = name.ok_or_else(|| Fault::corrupt("general.architecture", "is missing"))?;
    let architecture = Architecture::from_gguf(name)?;
    let keys = Keys { metadata, architecture: name };
    keys.refuse_variants()?;
    let hidden = keys.size("embedding_length")?;
    let heads = head_shape(&keys, hidden)?;
    let embedding = stored_shape(gguf, WeightName::Embedding)?;
    let rope = RopeConfig {
        style: match architecture {
            Architecture::Llama => RopeStyle::Interleaved,
            Architecture::Qwen2 | Architecture::Qwen3 => RopeStyle::Halves,
        },
        theta: keys.float("rope.freq_base")?.unwrap_or(10_000.0) as f32,
        dim: keys.unsigned("rope.dimension_count")?.map_or(heads.head_dim, clamp),
        scaling: rope_scaling(&keys, gguf, file)?,
    };
    let has = |weight| gguf.tensors.contains_key(&Naming::Gguf.of(weight));
    let epsilon = "attention.layer_norm_rms_epsilon";
    let config = ModelConfig {
        architecture: name.to_owned(),
        name: metadata.text("general.name")?.filter(|name| !name.is_empty()).unwrap_or(file_stem).to_owned(),
        layers: keys.size("block_count")?,
        hidden,
        heads,
        ffn: keys.size("feed_forward_length")?,
        vocabulary: embedding[0],
        norm_eps: keys.float(epsilon)?.ok_or_else(|| keys.missing(epsilon))? as f32,
        context_tokens: keys.size("context_length")? as u64,
        rope,
        tied_embeddings: !has(WeightName::Output),
        // Some llama files carry biases; what the file has is what the model was trained with.
        qkv_bias: architecture.has_qkv_bias() || has(WeightName::Layer(0, LayerWeight::QBias)),
        qk_norm: architecture.has_qk_norm(),
    };
    check(&config)?;
    Ok(config)
}

/// Metadata keys under the architecture's prefix.
struct Keys<'a> {
    metadata: &'a Metadata<'a>,
    architecture: &'a str,
}

impl Keys<'_> {
    fn key(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.architecture)
    }

    fn missing(&self, suffix: &str) -> Fault {
        Fault::corrupt(self.key(suffix), "is missing")
    }

    fn unsigned(&self, suffix: &str) -> Result<Option<u64>, Fault> {
        let key = self.key(suffix);
        if let Some(Value::Array(_)) = self.metadata.get(&key) {
            let hint = "use a model whose layers all have the same shape";
            return Err(Fault::unsupported(format!("a value per layer in `{key}`"), hint));
        }
        self.metadata.unsigned(&key)
    }

    fn float(&self, suffix: &str) -> Result<Option<f64>, Fault> {
        self.metadata.float(&self.key(suffix))
    }

    /// A size that has to be there. Sizes beyond any limit stay beyond it, and are refused by `check`.
    fn size(&self, suffix: &str) -> Result<usize, Fault> {
        self.unsigned(suffix)?.map(clamp).ok_or_else(|| self.missing(suffix))
    }

    /// Refuses metadata that changes what the architecture computes.
    fn refuse_variants(&self) -> Result<(), Fault> {
        let dense = "use a dense model of the unmodified architecture";
        for suffix in [
            "expert_count",
            "attention.clamp_kqv",
            "attention.max_alibi_bias",
            "rope.scaling.yarn_log_multiplier",
        ] {
            if self.float(suffix)?.is_some_and(|value| value != 0.0) {
                return Err(Fault::unsupported(format!("`{}`", self.key(suffix)), dense));
            }
        }
        Ok(())
    }
}

fn clamp(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn head_shape(keys: &Keys<'_>, hidden: usize) -> Result<HeadShape, Fault> {
    let query_heads = keys.size("attention.head_count")?;
    let kv_heads = keys.unsigned("attention.head_count_kv")?.map_or(query_heads, clamp);
    if query_heads == 0 || kv_heads == 0 {
        let suffix = if query_heads == 0 { "attention.head_count" } else { "attention.head_count_kv" };
        return Err(Fault::corrupt(keys.key(suffix), "is 0"));
    }
    if query_heads % kv_heads != 0 {
        let problem = format!("is {query_heads}, which is no multiple of the {kv_heads} KV heads");
        return Err(Fault::corrupt(keys.key("attention.head_count"), problem));
    }
    let head_dim = keys.unsigned("attention.key_length")?.map(clamp);
    if head_dim.is_none() && !hidden.is_multiple_of(query_heads) {
        let problem = format!("is {hidden}, which is no multiple of the {query_heads} heads");
        return Err(Fault::corrupt(keys.key("embedding_length"), problem));
    }
    let head_dim = head_dim.unwrap_or(hidden / query_heads);
    if let Some(value_dim) = keys.unsigned("attention.value_length")?.filter(|dim| clamp(*dim) != head_dim) {
        let feature = format!("`{}` {value_dim} with keys of {head_dim}", keys.key("attention.value_length"));
        return Err(Fault::unsupported(feature, "use a model whose keys and values have the same size"));
    }
    Ok(HeadShape { kv_heads, group: query_heads / kv_heads, head_dim })
}

fn stored_shape<'a>(gguf: &'a Gguf<'_>, weight: WeightName) -> Result<&'a [usize], Fault> {
    let name = Naming::Gguf.of(weight);
    let tensor = gguf.tensors.get(&name).ok_or_else(|| Fault::corrupt(name, "is missing"))?;
    Ok(&tensor.shape)
}

fn rope_scaling(keys: &Keys<'_>, gguf: &Gguf<'_>, file: &[u8]) -> Result<RopeScaling, Fault> {
    let type_key = keys.key("rope.scaling.type");
    let factor = keys.float("rope.scaling.factor")?;
    let old_factor = keys.float("rope.scale_linear")?;
    let kind = match keys.metadata.text(&type_key)? {
        Some(kind) => kind,
        None if old_factor.or(factor).is_some_and(|factor| factor != 0.0 && factor != 1.0) => "linear",
        None => "none",
    };
    let factor = factor.or(old_factor).unwrap_or(1.0) as f32;
    let scaling = match kind {
        "none" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor },
        "yarn" => yarn(keys, factor)?,
        other => {
            let feature = format!("`{type_key}` `{}`", quote(other));
            return Err(Fault::unsupported(feature, "supported kinds are none, linear and yarn"));
        }
    };
    match (rope_factors(gguf, file)?, scaling) {
        (None, scaling) => Ok(scaling),
        (Some(factors), RopeScaling::None) => Ok(RopeScaling::Factors(factors)),
        (Some(_), _) => Err(Fault::unsupported(
            format!("`rope_freqs.weight` together with `{type_key}` `{kind}`"),
            "use a model with one kind of scaling",
        )),
    }
}

fn yarn(keys: &Keys<'_>, factor: f32) -> Result<RopeScaling, Fault> {
    let original = keys.unsigned("rope.scaling.original_context_length")?;
    // GGUF's factor multiplies the usual one, where Hugging Face's replaces it.
    let usual = 0.1 * factor.ln() + 1.0;
    let attention_factor = keys.float("rope.scaling.attn_factor")?.map(|times| times as f32 * usual);
    Ok(RopeScaling::Yarn {
        factor,
        original_context: match original {
            Some(original) => original,
            None => keys.size("context_length")? as u64,
        },
        attention_factor,
        beta_fast: keys.float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0) as f32,
        beta_slow: keys.float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0) as f32,
    })
}

/// Divisors of the frequencies; their values are checked by `check`.
fn rope_factors(gguf: &Gguf<'_>, file: &[u8]) -> Result<Option<Vec<f32>>, Fault> {
    let name = Naming::Gguf.of(WeightName::RopeFreqs);
    let Some(tensor) = gguf.tensors.get(&name) else { return Ok(None) };
    const FACTORS_MAX: usize = 4_096;
    if tensor.shape.len() != 1 || tensor.shape[0] > FACTORS_MAX {
        let problem = format!("has shape {:?}, where one divisor per frequency is expected", tensor.shape);
        return Err(Fault::corrupt(name, problem));
    }
    let mut factors = vec![0.0; tensor.elements()];
    if !dequantize(tensor.kind, &file[tensor.start..tensor.start + tensor.bytes], &mut factors) {
        return Err(Fault::corrupt(name, "holds a value that is not finite"));
    }
    Ok(Some(factors))
}
