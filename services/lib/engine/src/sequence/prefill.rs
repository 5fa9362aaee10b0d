//! What a sequence keeps when its rows are attended to by a sparse policy: the means of its full blocks.

use std::sync::Arc;

use longshore_attention::{Mean, PrefillPolicy, Summaries};
use longshore_compute::ComputePool;

use super::Sequence;
use crate::Error;

/// A policy that is not exact, and what it reads.
#[derive(Debug)]
pub(crate) struct SparsePrefill {
    pub(crate) policy: Arc<PrefillPolicy>,
    /// Rows from this position on are exact.
    pub(crate) dense_from: u64,
    /// Means of full blocks, per layer; made when a step comes to the layer.
    pub(crate) summaries: Vec<Summaries>,
}

impl Sequence {
    /// Rows of later steps are attended to by `policy`, those from position `dense_from` on exactly. All blocks must be
    /// here then: a step over blocks on shards is refused. Stripes of more than 256 blocks are beyond sparse policies.
    pub fn set_prefill(&mut self, policy: Arc<PrefillPolicy>, dense_from: u64) -> Result<(), Error> {
        if policy.is_exact() {
            self.prefill = None;
            return Ok(());
        }
        let empty = Summaries::new(self.shape, self.geometry.stripe_blocks(), 0)?;
        let summaries = vec![empty; self.layers];
        self.prefill = Some(SparsePrefill { policy, dense_from, summaries });
        Ok(())
    }

    /// The policy, when it is not exact.
    pub(crate) fn prefill(&self) -> Option<&SparsePrefill> {
        self.prefill.as_ref()
    }

    pub(super) fn check_prefill(&self) -> Result<(), Error> {
        match &self.prefill {
            Some(prefill) if self.remote_blocks > 0 => {
                let problem = format!(
                    "is `{}`, but {} blocks lie on shards; hint: fetch the prefix",
                    prefill.policy, self.remote_blocks
                );
                Err(Error::Invalid { field: "prefill_policy", problem })
            }
            _ => Ok(()),
        }
    }

    /// Makes the means of the blocks that are full in this layer; blocks in parallel.
    pub(crate) fn summarise(&mut self, pool: &ComputePool, layer: usize) -> Result<(), Error> {
        let full = self.geometry.full_blocks(self.done + self.under_way);
        let Some(prefill) = &mut self.prefill else { return Ok(()) };
        let summaries = &mut prefill.summaries[layer];
        let first = summaries.blocks().end;
        let local = &self.local;
        let means =
            pool.map((full - first) as usize, |index| Mean::of(local[first as usize + index].tile(layer)));
        for (block, mean) in (first..).zip(means) {
            summaries.insert(block, &mean)?;
        }
        Ok(())
    }
}
