//! Finding blocks on any shard that has them: all shards at once, then the next copies of what was not found.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    time::Duration,
};

use futures::future::join_all;
use longshore_blocks::BlockKey;
use longshore_fabric::CallContext;

use super::ShardBlocks;
use crate::{
    Engine, Error, LocalBlock, Sequence, error::check, fetch_blocks, patience::within_time,
    readers::ReadOrder,
};

/// Blocks that are looked for together, and whom to ask for them.
pub(super) struct Wanted {
    pub(super) blocks: ShardBlocks,
    /// Shards that were not asked yet, the first one next.
    pub(super) shards: VecDeque<usize>,
    /// Shards that were late. They are asked again when nobody else is left, and waited for twice as long each time.
    late: Vec<usize>,
    /// How long a shard may send nothing.
    patience: Duration,
}

impl Sequence {
    /// Blocks of one stripe, and whom to ask for them: `not` comes last.
    pub(super) fn wanted(
        &self,
        ctx: &CallContext,
        order: &mut ReadOrder<'_>,
        blocks: ShardBlocks,
        not: Option<usize>,
    ) -> Result<Wanted, Error> {
        let mut shards: VecDeque<usize> = order.readers(&self.chain.stripe_seed(blocks[0].0))?.into();
        if let Some(at) = shards.iter().position(|shard| Some(*shard) == not).filter(|_| shards.len() > 1) {
            let last = shards.remove(at).expect("it was found there");
            shards.push_back(last);
        }
        order.plan(shards[0], blocks.len() as u64 * self.block_bytes());
        Ok(Wanted { blocks, shards, late: Vec::new(), patience: within_time(ctx, self.patience) })
    }

    /// Copies all full blocks here, from any shard that holds them.
    pub(super) async fn fetch_all(
        &self,
        engine: &Engine,
        ctx: &CallContext,
    ) -> Result<Vec<(u64, LocalBlock)>, Error> {
        let mut search = Search::new(self.full_blocks() as usize);
        let mut order = ReadOrder::new(&self.links);
        for block in self.keyed(0..self.full_blocks()) {
            let wanted = self.wanted(ctx, &mut order, vec![block], None)?;
            search.wanted.push(wanted);
        }
        let mut found = Vec::new();
        while let Some(round) = search.round()? {
            check(ctx)?;
            let calls = round.into_iter().map(|((shard, patience), wanted)| async move {
                let keys: Vec<BlockKey> = wanted.iter().map(|wanted| wanted.blocks[0].1).collect();
                let link = &self.links.links()[shard];
                let (blocks, ended) = fetch_blocks(engine, ctx, link, self.identity, &keys, patience).await;
                self.note(shard, &ended);
                (wanted, blocks, ended)
            });
            for (wanted, blocks, ended) in join_all(calls).await {
                // What came before a failure need not come again.
                let mut wanted: Vec<Option<Wanted>> = wanted.into_iter().map(Some).collect();
                for (at, block) in blocks {
                    found.extend(wanted[at].take().map(|wanted| (wanted.blocks[0].0, block)));
                }
                if let Err(error) = ended {
                    search.failed(wanted.into_iter().flatten().collect(), error);
                }
            }
        }
        Ok(found)
    }
}

/// Whom to ask next for what: by shard, and by how long it may send nothing (without end where nobody else can be asked).
type Round = BTreeMap<(usize, Option<Duration>), Vec<Wanted>>;

struct Search {
    wanted: Vec<Wanted>,
    failure: Option<Error>,
}

impl Search {
    fn new(count: usize) -> Self {
        Self { wanted: Vec::with_capacity(count), failure: None }
    }

    /// What to ask each shard next; `None` when everything was found.
    fn round(&mut self) -> Result<Option<Round>, Error> {
        if self.wanted.is_empty() {
            return Ok(None);
        }
        let mut round = Round::new();
        // Views and calls name blocks in ascending order.
        self.wanted.sort_by_key(|wanted| wanted.blocks[0].0);
        for mut wanted in std::mem::take(&mut self.wanted) {
            if wanted.shards.is_empty() && !wanted.late.is_empty() {
                wanted.shards.extend(std::mem::take(&mut wanted.late));
                wanted.patience *= 2;
            }
            let others = wanted.shards.len() + wanted.late.len() > 1;
            let patience = others.then_some(wanted.patience);
            match wanted.shards.front() {
                Some(&shard) => round.entry((shard, patience)).or_default().push(wanted),
                None => return Err(self.failure.take().unwrap_or(Error::NoShards)),
            }
        }
        Ok(Some(round))
    }

    /// A shard found nothing: what it lacks is looked for on the next one, the rest there again; when it failed or was late, all of it.
    fn failed(&mut self, wanted: Vec<Wanted>, error: Error) {
        let late = matches!(error, Error::Late { .. });
        let missing: Option<HashSet<BlockKey>> = match &error {
            Error::Missing { keys, .. } => Some(keys.iter().copied().collect()),
            _ => None,
        };
        for mut wanted in wanted {
            let lacks = missing
                .as_ref()
                .is_none_or(|missing| wanted.blocks.iter().any(|(_, key)| missing.contains(key)));
            let asked = if lacks { wanted.shards.pop_front() } else { None };
            wanted.late.extend(asked.filter(|_| late));
            self.wanted.push(wanted);
        }
        // What is missing can be computed again, whatever else failed; and any other failure says more than that somebody was late.
        let is_missing = matches!(error, Error::Missing { .. });
        if is_missing || matches!(self.failure, None | Some(Error::Late { .. })) {
            self.failure = Some(error);
        }
    }
}
