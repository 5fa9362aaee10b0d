//! The head plan of a deployment: a file, or what is shipped for the model.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use longshore_attention::{GatesCut, HeadBudgets, HeadPlan};
use longshore_model::ModelInfo;

use crate::{
    config::{Config, ModelConfig},
    console,
};

/// How DuoAttention deploys its gates: share of streaming heads among grouped ones, and where each query head has its own
/// KV head.
const DUO_GROUPED: GatesCut = GatesCut::Sparsity(0.5);
const DUO_SINGLE: GatesCut = GatesCut::Sparsity(0.75);
/// First and newest keys that its streaming heads see.
const DUO_SINK: u64 = 64;
/// What a plan is.
const HINT: &str =
    "name a file that `longshore calibrate` wrote, or MInference's JSON, or DuoAttention's TSV";
const DUO_RECENT: u64 = 256;

/// Plans of budgets that `longshore calibrate` found, by the digest of the model's files.
const SHIPPED: &[(&str, &str)] = &[(
    "0a0c51db50b2b7713ee8b49a2adf2614527f7f406e84ce3f587d0bc553f609e0",
    include_str!("../plans/smollm2-135m-instruct.json"),
)];

/// The plan that the configuration names; without one, that of the model, if there is one.
pub(crate) fn of(config: &Config, info: &ModelInfo) -> Result<Option<Arc<HeadPlan>>> {
    let path = &config.model.head_plan;
    if path.is_empty() {
        return if is_as_calibrated(&config.model) { shipped(info) } else { Ok(None) };
    }
    let text = std::fs::read_to_string(path).map_err(|error| {
        anyhow!("`model.head_plan` is `{path}`, which cannot be read as text: {error}; hint: {HINT}")
    })?;
    let plan = read(&text, info)
        .with_context(|| format!("`model.head_plan` is `{path}`, which is no plan for this model"))?;
    Ok(Some(Arc::new(plan)))
}

/// An object is a plan of budgets, a list MInference's; a table of numbers begins with neither bracket.
fn read(text: &str, info: &ModelInfo) -> Result<HeadPlan, longshore_attention::Error> {
    let (layers, heads) = (info.config.layers, info.config.heads);
    match text.trim_start().chars().next() {
        Some('{') => HeadBudgets::from_json(text, layers, heads.kv_heads).map(HeadPlan::from),
        Some('[') => HeadPlan::from_minference_json(text, layers, heads.query_heads(), heads.kv_heads),
        _ => {
            let cut = if heads.group > 1 { DUO_GROUPED } else { DUO_SINGLE };
            HeadPlan::from_duo_tsv(text, cut, DUO_SINK, DUO_RECENT, layers, heads.kv_heads)
        }
    }
}

/// Whether a deployment is what the shipped plans were searched for: blocks of 64 tokens, positions as the model has them. A plan
/// says nothing of others.
fn is_as_calibrated(model: &ModelConfig) -> bool {
    model.block_tokens == 64 && matches!(model.rope_scaling.as_str(), "" | "none")
}

fn shipped(info: &ModelInfo) -> Result<Option<Arc<HeadPlan>>> {
    let digest = console::hex(&info.digest);
    let Some((_, text)) = SHIPPED.iter().find(|(of, _)| *of == digest) else { return Ok(None) };
    let plan = read(text, info).context("the plan that is shipped for this model cannot be read")?;
    Ok(Some(Arc::new(plan)))
}

#[cfg(test)]
mod tests {
    use longshore_attention::PrefillPolicy;

    use super::*;

    /// SmolLM2-135M has 30 layers of 3 KV heads.
    #[test]
    fn shipped_plans_say_what_presets_mean() {
        for (_, text) in SHIPPED {
            let plan: HeadPlan = HeadBudgets::from_json(text, 30, 3).unwrap().into();
            for name in ["faithful", "balanced", "fast"] {
                let policy = PrefillPolicy::parse(name, Some(&plan)).unwrap();
                assert!(policy.fingerprint().starts_with("heads:plan="), "{name} is {policy}");
                assert!(!policy.reads().all_keys, "{name} would make whole prefixes travel to the worker");
            }
        }
    }

    /// What `longshore calibrate --search patterns` found for the same model; given by `--head-plan`.
    #[test]
    fn the_minference_plan_is_one_of_its_model() {
        let text = include_str!("../plans/smollm2-135m-instruct-minference.json");
        let plan = HeadPlan::from_minference_json(text, 30, 9, 3).unwrap();
        assert!(PrefillPolicy::parse("minference", Some(&plan)).is_ok());
        assert_eq!(plan.to_minference_json(), text);
    }
}
