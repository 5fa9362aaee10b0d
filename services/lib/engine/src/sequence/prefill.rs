//! What a sequence keeps when its rows are attended to by a sparse policy: the means of its full blocks.

mod load;

use std::sync::Arc;

use longshore_attention::{Mean, PolicyReads, PrefillPolicy, Promise, PromisedMeans, Summaries};
use longshore_compute::ComputePool;
use longshore_model::KeptMeans;

use super::Sequence;
use crate::Error;

/// A policy that is not exact, and what it reads.
#[derive(Debug)]
pub(crate) struct SparsePrefill {
    pub(crate) policy: Arc<PrefillPolicy>,
    /// Rows from this position on are exact.
    pub(crate) dense_from: u64,
    /// What the policy reads of blocks that it does not visit.
    pub(crate) reads: PolicyReads,
    /// Means of full blocks, per layer; made when a step comes to the layer.
    pub(crate) summaries: Vec<Summaries>,
}

impl Sequence {
    /// Rows of later steps are attended to by `policy`, those from position `dense_from` on exactly. Blocks that lie on shards are
    /// visited there once [`Self::load_summaries`] brought what the policy reads of them; a policy that reads all keys is refused
    /// by a step over such blocks. Stripes of more than 256 blocks are beyond sparse policies.
    pub fn set_prefill(&mut self, policy: Arc<PrefillPolicy>, dense_from: u64) -> Result<(), Error> {
        if policy.is_exact() {
            self.prefill = None;
            return Ok(());
        }
        let reads = policy.reads();
        let mut empty = Summaries::new(self.shape, self.geometry.stripe_blocks(), 0)?;
        if !reads.spreads {
            empty = empty.without_spreads();
        }
        let summaries = vec![empty; self.layers];
        self.prefill = Some(SparsePrefill { policy, dense_from, reads, summaries });
        Ok(())
    }

    /// The policy, when it is not exact.
    pub(crate) fn prefill(&self) -> Option<&SparsePrefill> {
        self.prefill.as_ref()
    }

    pub(super) fn check_prefill(&self) -> Result<(), Error> {
        let Some(prefill) = self.prefill.as_ref().filter(|_| self.remote_blocks > 0) else { return Ok(()) };
        let refused = |problem: String| {
            let problem = format!("is `{}`, {problem}", prefill.policy);
            Err(Error::Invalid { field: "prefill_policy", problem })
        };
        let remote = self.remote_blocks;
        if prefill.reads.all_keys {
            return refused(format!(
                "which reads all keys, but {remote} blocks lie on shards; hint: fetch the prefix"
            ));
        }
        let known = prefill.summaries.iter().map(|layer| layer.blocks().end).min().unwrap_or(0);
        if prefill.reads.means && known < remote {
            return refused(format!(
                "which reads summaries of {remote} blocks on shards, {known} are here; hint: load the summaries"
            ));
        }
        Ok(())
    }

    /// Has `make` make the means of the blocks that the step fills, out of pages under the promised versions of the tiles that it writes to; gives
    /// the versions that the tiles of means get. `None`: none were made, or the policy reads more of the host than where things lie.
    pub(crate) fn promise_means(
        &mut self,
        layer: usize,
        promised: &[Promise],
        make: impl FnOnce(&KeptMeans<'_>) -> Result<bool, Error>,
    ) -> Result<Option<PromisedMeans>, Error> {
        let opened = self.geometry.full_blocks(self.done);
        let (full, tile) = (self.geometry.full_blocks(self.done + self.under_way), self.shape);
        let chooses = |prefill: &&mut SparsePrefill| prefill.policy.chooses_by_means(layer);
        let Some(prefill) = self.prefill.as_mut().filter(chooses) else { return Ok(None) };
        let summaries = &mut prefill.summaries[layer];
        let first_block = summaries.blocks().end;
        // Others that are full have no pages that were promised.
        let Some(skipped) = first_block.checked_sub(opened) else { return Ok(None) };
        let versions = summaries.promise(full);
        if versions.tiles().is_empty() {
            return Ok(Some(versions));
        }
        let blocks = &promised[skipped as usize..(full - opened) as usize];
        let visited = prefill.reads.values;
        let means = KeptMeans { tile, blocks, first_block, summaries, visited, promised: versions.tiles() };
        Ok(if make(&means)? { Some(versions) } else { None })
    }

    /// Makes the means of the blocks that are full in this layer, when the policy reads any; blocks in parallel. Their tiles get the promised
    /// versions, where there are any.
    pub(crate) fn summarise(
        &mut self,
        pool: &ComputePool,
        layer: usize,
        promised: PromisedMeans,
    ) -> Result<(), Error> {
        let full = self.geometry.full_blocks(self.done + self.under_way);
        let Some(prefill) = self.prefill.as_mut().filter(|prefill| prefill.reads.means) else {
            return Ok(());
        };
        let summaries = &mut prefill.summaries[layer];
        let first = summaries.blocks().end;
        let (local, remote) = (&self.local, self.remote_blocks);
        let means = pool.map((full - first) as usize, |index| {
            Mean::of(local[(first - remote) as usize + index].tile(layer))
        });
        for (block, mean) in (first..).zip(means) {
            summaries.insert(block, &mean)?;
        }
        Ok(summaries.keep(promised)?)
    }
}
