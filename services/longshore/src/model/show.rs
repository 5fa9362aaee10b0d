//! `longshore model list` and `longshore model show`.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};
use longshore_attention::{KvDtype, TileShape};
use longshore_model::{ModelInfo, RopeScaling};
use serde_json::json;

use super::{
    cache::{Cache, loadable},
    reference::{ModelRef, PINNED},
};
use crate::console;

/// Prints every model of the cache, and the ones that can be pulled by name.
pub(crate) fn list() -> Result<()> {
    let cache = Cache::of_user()?;
    let folder = cache.models();
    let mut rows = Vec::new();
    if let Ok(entries) = fs::read_dir(&folder) {
        let mut names: Vec<_> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.retain(|name| !name.starts_with('.'));
        names.sort();
        rows.extend(names.iter().map(|name| (name.clone(), describe(&folder.join(name)))));
    }
    for pinned in PINNED {
        if rows.iter().any(|(name, _)| name == pinned.name) {
            continue;
        }
        rows.push((
            pinned.name.to_owned(),
            format!("not pulled; run `longshore model pull {}`", pinned.name),
        ));
    }
    console::note(format!("models in {}", folder.display()));
    for (name, what) in rows {
        console::say(format!("{name:32} {what}"));
    }
    Ok(())
}

fn describe(folder: &Path) -> String {
    let Some(path) = loadable(folder) else { return "incomplete; pull it again".to_owned() };
    match ModelInfo::open(&path) {
        Ok(info) => {
            let c = &info.config;
            let per_token = console::bytes(kv_bytes_per_token(&info, KvDtype::F16));
            let size = console::bytes(info.file_bytes);
            format!(
                "{} {} layers, {}, {size}, KV {per_token}/token (f16)",
                c.architecture, c.layers, info.quantization
            )
        }
        Err(error) => format!("cannot be read: {error}"),
    }
}

/// KV bytes of one token over all layers.
pub(crate) fn kv_bytes_per_token(info: &ModelInfo, dtype: KvDtype) -> u64 {
    let heads = info.config.heads;
    let block = 64;
    let tile = TileShape { block_tokens: block, kv_heads: heads.kv_heads, head_dim: heads.head_dim, dtype };
    (tile.bytes() / block * info.config.layers) as u64
}

/// Prints one model's shape.
pub(crate) fn show(reference: &ModelRef, as_json: bool) -> Result<()> {
    let cache = Cache::of_user()?;
    let path = match (cache.find(reference), reference) {
        (Some(path), _) => path,
        // Says what is wrong with the path.
        (None, ModelRef::Path(_)) => super::pull(&cache, reference)?,
        (None, _) => {
            bail!("`{0}` is not in the cache; hint: run `longshore model pull {0}`", reference.text())
        }
    };
    let info = ModelInfo::open(&path).context("cannot read the model")?;
    let fields = fields(&path, &info);
    if as_json {
        let object: serde_json::Map<_, _> = fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        console::say(serde_json::to_string_pretty(&object).context("a model is JSON")?);
        return Ok(());
    }
    for (key, value) in fields {
        let text = value
            .as_str()
            .map_or_else(|| value.as_u64().map_or(value.to_string(), console::grouped), str::to_owned);
        console::say(format!("{key:24} {text}"));
    }
    Ok(())
}

fn fields(path: &Path, info: &ModelInfo) -> Vec<(&'static str, serde_json::Value)> {
    let c = &info.config;
    let digest: String = info.digest.iter().map(|byte| format!("{byte:02x}")).collect();
    vec![
        ("path", json!(path.display().to_string())),
        ("name", json!(c.name)),
        ("architecture", json!(c.architecture)),
        ("file_bytes", json!(info.file_bytes)),
        ("quantization", json!(info.quantization)),
        ("digest", json!(digest)),
        ("layers", json!(c.layers)),
        ("hidden", json!(c.hidden)),
        ("query_heads", json!(c.heads.query_heads())),
        ("kv_heads", json!(c.heads.kv_heads)),
        ("head_dim", json!(c.heads.head_dim)),
        ("ffn", json!(c.ffn)),
        ("vocabulary", json!(c.vocabulary)),
        ("context_tokens", json!(c.context_tokens)),
        ("rope_style", json!(format!("{:?}", c.rope.style).to_lowercase())),
        ("rope_theta", json!(c.rope.theta)),
        ("rope_dim", json!(c.rope.dim)),
        ("rope_scaling", json!(scaling(&c.rope.scaling))),
        ("chat_template", json!(info.chat_template.is_some())),
        ("kv_bytes_per_token_f16", json!(kv_bytes_per_token(info, KvDtype::F16))),
        ("kv_bytes_per_token_int8", json!(kv_bytes_per_token(info, KvDtype::Int8))),
        ("kv_bytes_per_token_f32", json!(kv_bytes_per_token(info, KvDtype::F32))),
    ]
}

fn scaling(scaling: &RopeScaling) -> String {
    match scaling {
        RopeScaling::None => "none".to_owned(),
        RopeScaling::Linear { factor } => format!("linear, factor {factor}"),
        RopeScaling::Ntk { factor } => format!("NTK, factor {factor}"),
        RopeScaling::Llama3 { factor, .. } => format!("llama3, factor {factor}"),
        RopeScaling::Yarn { factor, .. } => format!("YaRN, factor {factor}"),
        RopeScaling::Factors(factors) => format!("{} divisors in the file", factors.len()),
    }
}
