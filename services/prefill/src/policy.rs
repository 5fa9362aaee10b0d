//! How a prompt is attended to: what the caller names, read with this worker's head plan and held against its budget.

use std::sync::Arc;

use longshore_attention::{HeadPlan, PrefillPolicy, QUERY_TILE};
use longshore_engine::Engine;
use longshore_proto::types::PrefillStart;

use crate::{
    Config, Error,
    prefix::{block_bytes, kept_summary_bytes},
};

/// The policy of one prompt.
#[derive(Debug, Clone)]
pub(crate) struct JobPolicy {
    /// Which blocks its rows visit.
    pub(crate) policy: Arc<PrefillPolicy>,
    /// Rows from this position on are exact.
    pub(crate) dense_from: u64,
    /// Rows from this position on belong to the answer, of which some was generated before.
    pub(crate) answer_from: u64,
}

impl JobPolicy {
    /// Reads the policy of `start`. Refuses what does not parse, what means something else here, and what this worker has no
    /// memory for; nothing was computed then.
    pub(crate) fn of(
        start: &PrefillStart,
        plan: Option<&HeadPlan>,
        engine: &Engine,
        config: &Config,
    ) -> Result<Self, Error> {
        let text = &start.prefill_policy;
        let refused = |problem: String| Error::Policy { policy: text.clone(), problem };
        let policy =
            PrefillPolicy::from_fingerprint(text, plan).map_err(|error| refused(error.to_string()))?;
        let aligned = start.dense_from.is_multiple_of(QUERY_TILE as u64);
        if !aligned || start.dense_from > start.prompt_tokens {
            return Err(Error::DenseFrom { position: start.dense_from, prompt_tokens: start.prompt_tokens });
        }
        let Some(answer_from) = start.prompt_tokens.checked_sub(start.generated_tokens) else {
            let (generated_tokens, prompt_tokens) = (start.generated_tokens, start.prompt_tokens);
            return Err(Error::Generated { generated_tokens, prompt_tokens });
        };
        let policy = Self { policy: Arc::new(policy), dense_from: start.dense_from, answer_from };
        policy.check_room(start, engine, config)?;
        Ok(policy)
    }

    /// Whether every row visits everything.
    pub(crate) fn is_exact(&self) -> bool {
        self.policy.is_exact()
    }

    /// Positions that chunks end on a multiple of, so that chunks never change a decision. Whole blocks, so that every chunk
    /// ends with full ones.
    pub(crate) fn chunk_grid(&self, block_tokens: usize) -> usize {
        let multiple = if self.is_exact() { 1 } else { self.policy.chunk_multiple().max(1) };
        (1..=multiple)
            .map(|blocks| blocks * block_tokens)
            .find(|tokens| tokens.is_multiple_of(multiple))
            .expect("`multiple` blocks are a multiple of it")
    }

    /// A policy that reads all keys while it selects has the whole prompt here, one that reads summaries has those of all blocks. Others
    /// leave their oldest blocks to the shards.
    fn check_room(&self, start: &PrefillStart, engine: &Engine, config: &Config) -> Result<(), Error> {
        let stored = engine.geometry().stored_blocks(start.prompt_tokens);
        let reads = self.policy.reads();
        let kept_bytes = match reads.all_keys {
            true => block_bytes(engine),
            false => kept_summary_bytes(engine, &reads),
        };
        let needed_bytes = stored.saturating_mul(kept_bytes);
        if self.is_exact() || start.cached_blocks >= stored || needed_bytes <= config.local_kv_bytes {
            return Ok(());
        }
        Err(Error::TooLongForPolicy {
            policy: start.prefill_policy.clone(),
            prompt_tokens: start.prompt_tokens,
            kept: if reads.all_keys { "the KV" } else { "summaries of the KV" },
            needed_bytes,
            limit_bytes: config.local_kv_bytes,
        })
    }
}
