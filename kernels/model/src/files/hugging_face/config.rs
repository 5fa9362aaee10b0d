//! The configuration of a model, from `config.json`.

use longshore_attention::HeadShape;
use serde_json::Value;

use crate::files::architecture::{Architecture, check};
use crate::files::fault::{Fault, quote};
use crate::{ModelConfig, RopeConfig, RopeScaling, RopeStyle};

/// Reads the configuration; `fallback_name` names models that do not name themselves.
pub(crate) fn model_config(json: &Value, fallback_name: &str) -> Result<ModelConfig, Fault> {
    let fields = Fields { json, prefix: "" };
    let class = json["architectures"][0].as_str();
    let class = class.ok_or_else(|| Fault::corrupt("architectures", "names no class"))?;
    let (architecture, name) = Architecture::from_class(class)?;
    refuse_variants(&fields)?;
    let hidden = fields.size("hidden_size")?;
    let heads = head_shape(&fields, hidden)?;
    let trained = fields.required("max_position_embeddings", Fields::unsigned)?;
    let (rope, context_tokens) = rope(&fields, heads.head_dim, trained)?;
    let config = ModelConfig {
        architecture: name.to_owned(),
        name: model_name(json, fallback_name),
        layers: fields.size("num_hidden_layers")?,
        hidden,
        heads,
        ffn: fields.size("intermediate_size")?,
        vocabulary: fields.size("vocab_size")?,
        norm_eps: fields.required("rms_norm_eps", Fields::float)? as f32,
        context_tokens: window(&fields, architecture)?
            .map_or(context_tokens, |window| window.min(context_tokens)),
        rope,
        tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        qkv_bias: architecture.has_qkv_bias() || fields.flag("attention_bias")?.unwrap_or(false),
        qk_norm: architecture.has_qk_norm(),
    };
    check(&config)?;
    Ok(config)
}

fn model_name(json: &Value, fallback: &str) -> String {
    let path = json["_name_or_path"].as_str().unwrap_or_default().trim_end_matches('/');
    let name = path.rsplit('/').next().filter(|name| !name.is_empty());
    name.unwrap_or(fallback).to_owned()
}

/// Positions that a token may see, where the model was trained with a sliding window. Attention here sees everything, which
/// is the same as long as the context is no longer than the window.
fn window(fields: &Fields<'_>, architecture: Architecture) -> Result<Option<u64>, Fault> {
    let used = match architecture {
        Architecture::Llama => true,
        Architecture::Qwen2 | Architecture::Qwen3 => fields.flag("use_sliding_window")?.unwrap_or(false),
    };
    Ok(fields.unsigned("sliding_window")?.filter(|_| used))
}

/// Refuses settings that change what the architecture computes.
fn refuse_variants(fields: &Fields<'_>) -> Result<(), Fault> {
    let activation = fields.text("hidden_act")?.unwrap_or("silu");
    if activation != "silu" {
        let feature = format!("`hidden_act` `{}`", quote(activation));
        return Err(Fault::unsupported(feature, "use a model with silu"));
    }
    if fields.present("quantization_config") {
        let hint = "use F32, F16 or BF16 weights, or a GGUF file";
        return Err(Fault::unsupported("`quantization_config`", hint));
    }
    if fields.flag("mlp_bias")?.unwrap_or(false) {
        return Err(Fault::unsupported(
            "`mlp_bias` true",
            "use a model without biases in the feed-forward layer",
        ));
    }
    Ok(())
}

fn head_shape(fields: &Fields<'_>, hidden: usize) -> Result<HeadShape, Fault> {
    let query_heads = fields.size("num_attention_heads")?;
    let kv_heads = fields.unsigned("num_key_value_heads")?.map_or(query_heads, |heads| heads as usize);
    if query_heads == 0 || kv_heads == 0 {
        let field = if query_heads == 0 { "num_attention_heads" } else { "num_key_value_heads" };
        return Err(Fault::corrupt(field, "is 0"));
    }
    if query_heads % kv_heads != 0 {
        let problem = format!("is {query_heads}, which is no multiple of the {kv_heads} KV heads");
        return Err(Fault::corrupt("num_attention_heads", problem));
    }
    let head_dim = fields.unsigned("head_dim")?.map(|dim| dim as usize);
    if head_dim.is_none() && !hidden.is_multiple_of(query_heads) {
        let problem = format!("is {hidden}, which is no multiple of the {query_heads} heads");
        return Err(Fault::corrupt("hidden_size", problem));
    }
    Ok(HeadShape {
        kv_heads,
        group: query_heads / kv_heads,
        head_dim: head_dim.unwrap_or(hidden / query_heads),
    })
}

/// The rotation, and the positions that it reaches.
fn rope(fields: &Fields<'_>, head_dim: usize, trained: u64) -> Result<(RopeConfig, u64), Fault> {
    // Newer files put everything under `rope_parameters`.
    let new = fields.under("rope_parameters", "rope_parameters.");
    let old = fields.under("rope_scaling", "rope_scaling.");
    let own_theta = new.as_ref().map_or(Ok(None), |new| new.float("rope_theta"))?;
    let theta = own_theta.or(fields.float("rope_theta")?).unwrap_or(10_000.0) as f32;
    let partial = new.as_ref().map_or(Ok(None), |new| new.float("partial_rotary_factor"))?;
    let partial = partial.or(fields.float("partial_rotary_factor")?).unwrap_or(1.0);
    let dim = (head_dim as f64 * partial) as usize;
    let (scaling, context) = match new.or(old) {
        Some(part) => scaling(&part, trained)?,
        None => (RopeScaling::None, trained),
    };
    Ok((RopeConfig { style: RopeStyle::Halves, theta, dim, scaling }, context))
}

fn scaling(part: &Fields<'_>, trained: u64) -> Result<(RopeScaling, u64), Fault> {
    let kind = match part.text("rope_type")? {
        Some(kind) => kind,
        None => part.text("type")?.unwrap_or("default"),
    };
    if kind == "default" {
        return Ok((RopeScaling::None, trained));
    }
    let factor = part.required("factor", Fields::float)? as f32;
    let original = part.unsigned("original_max_position_embeddings")?.unwrap_or(trained);
    // A factor of x reaches x times the original positions; some files already say so, others leave the original.
    let reach = trained.max((original as f64 * f64::from(factor)) as u64);
    match kind {
        "linear" => Ok((RopeScaling::Linear { factor }, reach)),
        // The reference grows theta with the length of each text. KV that is kept and shared has to be rotated in one way, so
        // theta is what the reference uses at the full reach.
        "dynamic" | "ntk" => Ok((RopeScaling::Ntk { factor: factor * factor - factor + 1.0 }, reach)),
        "llama3" => Ok((llama3(part, factor)?, trained)),
        "yarn" => Ok((yarn(part, factor, original)?, reach)),
        other => Err(Fault::unsupported(
            format!("RoPE scaling `{}`", quote(other)),
            "supported kinds are linear, dynamic, llama3 and yarn",
        )),
    }
}

fn llama3(part: &Fields<'_>, factor: f32) -> Result<RopeScaling, Fault> {
    Ok(RopeScaling::Llama3 {
        factor,
        low_freq_factor: part.required("low_freq_factor", Fields::float)? as f32,
        high_freq_factor: part.required("high_freq_factor", Fields::float)? as f32,
        original_context: part.required("original_max_position_embeddings", Fields::unsigned)?,
    })
}

fn yarn(part: &Fields<'_>, factor: f32, original_context: u64) -> Result<RopeScaling, Fault> {
    if part.flag("truncate")? == Some(false) {
        return Err(Fault::unsupported("`rope_scaling.truncate` false", "use a model with plain YaRN"));
    }
    let usual = |scale: f64| 0.1 * scale * f64::from(factor).ln() + 1.0;
    let attention_factor =
        match (part.float("attention_factor")?, part.float("mscale")?, part.float("mscale_all_dim")?) {
            (Some(given), _, _) => Some(given as f32),
            (None, Some(scale), Some(all)) if scale != 0.0 && all != 0.0 => {
                Some((usual(scale) / usual(all)) as f32)
            }
            _ => None,
        };
    Ok(RopeScaling::Yarn {
        factor,
        original_context,
        attention_factor,
        beta_fast: part.float("beta_fast")?.unwrap_or(32.0) as f32,
        beta_slow: part.float("beta_slow")?.unwrap_or(1.0) as f32,
    })
}

/// Typed reading of one JSON object; null counts as absent.
struct Fields<'a> {
    json: &'a Value,
    prefix: &'static str,
}

impl<'a> Fields<'a> {
    fn under(&self, name: &str, prefix: &'static str) -> Option<Self> {
        self.json.get(name).filter(|json| json.is_object()).map(|json| Self { json, prefix })
    }

    fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn present(&self, name: &str) -> bool {
        self.json.get(name).is_some_and(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        name: &str,
        want: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Fault> {
        match self.json.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| {
                Fault::corrupt(
                    self.name(name),
                    format!("is `{}`, where {want} is expected", quote(&value.to_string())),
                )
            }),
        }
    }

    fn unsigned(&self, name: &str) -> Result<Option<u64>, Fault> {
        self.typed(name, "a non-negative integer", Value::as_u64)
    }

    fn float(&self, name: &str) -> Result<Option<f64>, Fault> {
        self.typed(name, "a number", Value::as_f64)
    }

    fn text(&self, name: &str) -> Result<Option<&'a str>, Fault> {
        self.typed(name, "a string", Value::as_str)
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, Fault> {
        self.typed(name, "a boolean", Value::as_bool)
    }

    fn required<T>(
        &self,
        name: &str,
        read: impl Fn(&Self, &str) -> Result<Option<T>, Fault>,
    ) -> Result<T, Fault> {
        read(self, name)?.ok_or_else(|| Fault::corrupt(self.name(name), "is missing"))
    }

    fn size(&self, name: &str) -> Result<usize, Fault> {
        self.required(name, Self::unsigned).map(|size| usize::try_from(size).unwrap_or(usize::MAX))
    }
}
