//! The policies that are compared.

use std::sync::Arc;

use anyhow::{Context, Result};
use longshore_attention::{HeadPlan, PrefillPolicy};

use crate::cli::EvalArgs;

/// A policy as it was asked for.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    /// What was typed.
    pub(super) name: String,
    /// What it means.
    pub(super) policy: Arc<PrefillPolicy>,
}

impl Candidate {
    /// Exact attention, which the others are compared with.
    pub(super) fn exact() -> Self {
        Self { name: "exact".to_owned(), policy: Arc::new(PrefillPolicy::exact()) }
    }

    /// `exact`, unless it is skipped, then what the flags name.
    pub(super) fn all(args: &EvalArgs, plan: Option<&HeadPlan>) -> Result<Vec<Self>> {
        let mut all = if args.skip_exact { Vec::new() } else { vec![Self::exact()] };
        for name in &args.policies {
            let policy = PrefillPolicy::parse(name, plan).context("`--policy` cannot be used")?;
            if !policy.is_exact() || all.is_empty() {
                all.push(Self { name: name.clone(), policy: Arc::new(policy) });
            }
        }
        Ok(all)
    }

    /// Rows of a prompt from this position on are exact.
    pub(super) fn dense_from(&self, prompt_tokens: usize) -> u64 {
        self.policy.dense_from(prompt_tokens as u64)
    }

    /// Whether it visits everything.
    pub(super) fn is_exact(&self) -> bool {
        self.policy.is_exact()
    }
}
