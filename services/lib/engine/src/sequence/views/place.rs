//! Finding a shard for every stripe, and blocks on any of theirs: all shards at once, then the next copies of what was not found.

use std::collections::{BTreeMap, HashSet, VecDeque};

use futures::future::join_all;
use longshore_blocks::BlockKey;
use longshore_fabric::CallContext;

use super::{ShardBlocks, View, ViewPart};
use crate::{Engine, Error, LocalBlock, Sequence, error::check, fetch_blocks};

/// What is looked for, and the shards that were not asked yet.
struct Wanted {
    blocks: ShardBlocks,
    shards: VecDeque<usize>,
}

impl Sequence {
    /// Opens views of `stripes` (ascending), each whole up to block `upto`, on one shard each that holds it. `not` is asked last.
    /// On an error everything is closed again.
    pub(super) async fn place(
        &self,
        ctx: &CallContext,
        stripes: Vec<u64>,
        upto: u64,
        not: Option<usize>,
    ) -> Result<Vec<View>, Error> {
        let mut search = Search::new(stripes.len());
        for stripe in stripes {
            let first = stripe * u64::from(self.geometry.stripe_blocks());
            let end = (first + u64::from(self.geometry.stripe_blocks())).min(upto);
            let mut shards: VecDeque<usize> = self.links.readers(&self.chain.stripe_seed(first))?.into();
            if let Some(at) = shards.iter().position(|shard| Some(*shard) == not).filter(|_| shards.len() > 1)
            {
                let last = shards.remove(at).expect("it was found there");
                shards.push_back(last);
            }
            search.wanted.push(Wanted { blocks: self.keyed(first..end), shards });
        }
        let mut opened = Opened { sequence: self, views: Vec::new() };
        while let Some(round) = search.round()? {
            check(ctx)?;
            let calls = round.into_iter().map(|(shard, wanted)| async move {
                let blocks = wanted.iter().flat_map(|wanted| wanted.blocks.iter().copied()).collect();
                let opened = self.open_view(ctx, shard, blocks, None).await;
                (shard, wanted, opened)
            });
            for (shard, wanted, outcome) in join_all(calls).await {
                match outcome {
                    Ok(id) => {
                        let part = |wanted: &Wanted| ViewPart {
                            stripe: self.geometry.stripe_of(wanted.blocks[0].0),
                            used: true,
                        };
                        opened.views.push(View { shard, id, parts: wanted.iter().map(part).collect() });
                    }
                    Err(error) => search.failed(wanted, error),
                }
            }
        }
        Ok(std::mem::take(&mut opened.views))
    }

    /// Copies all full blocks here, from any shard that holds them.
    pub(super) async fn fetch_all(
        &self,
        engine: &Engine,
        ctx: &CallContext,
    ) -> Result<Vec<(u64, LocalBlock)>, Error> {
        let mut search = Search::new(self.full_blocks() as usize);
        for block in self.keyed(0..self.full_blocks()) {
            let shards = self.links.readers(&self.chain.stripe_seed(block.0))?.into();
            search.wanted.push(Wanted { blocks: vec![block], shards });
        }
        let mut found = Vec::new();
        while let Some(round) = search.round()? {
            check(ctx)?;
            let calls = round.into_iter().map(|(shard, wanted)| async move {
                let keys: Vec<BlockKey> = wanted.iter().map(|wanted| wanted.blocks[0].1).collect();
                let link = &self.links.links()[shard];
                let (blocks, ended) = fetch_blocks(engine, ctx, link, self.identity, &keys).await;
                link.note(&ended);
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

/// Views that nobody knows of yet: closed unless they are taken, also when the search is given up half-way.
struct Opened<'a> {
    sequence: &'a Sequence,
    views: Vec<View>,
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        self.views.iter().for_each(|view| self.sequence.links.close_later(view.shard, view.id));
    }
}

struct Search {
    wanted: Vec<Wanted>,
    failure: Option<Error>,
}

impl Search {
    fn new(count: usize) -> Self {
        Self { wanted: Vec::with_capacity(count), failure: None }
    }

    /// What to ask each shard next; `None` when everything was found.
    fn round(&mut self) -> Result<Option<BTreeMap<usize, Vec<Wanted>>>, Error> {
        if self.wanted.is_empty() {
            return Ok(None);
        }
        let mut round = BTreeMap::<usize, Vec<Wanted>>::new();
        // Views and calls name blocks in ascending order.
        self.wanted.sort_by_key(|wanted| wanted.blocks[0].0);
        for wanted in std::mem::take(&mut self.wanted) {
            match wanted.shards.front() {
                Some(&shard) => round.entry(shard).or_default().push(wanted),
                None => return Err(self.failure.take().unwrap_or(Error::NoShards)),
            }
        }
        Ok(Some(round))
    }

    /// A shard found nothing: what it lacks is looked for on the next one, the rest there again; when it failed, all of it.
    fn failed(&mut self, wanted: Vec<Wanted>, error: Error) {
        let missing: Option<HashSet<BlockKey>> = match &error {
            Error::Missing { keys, .. } => Some(keys.iter().copied().collect()),
            _ => None,
        };
        for mut wanted in wanted {
            let lacks = missing
                .as_ref()
                .is_none_or(|missing| wanted.blocks.iter().any(|(_, key)| missing.contains(key)));
            if lacks {
                wanted.shards.pop_front();
            }
            self.wanted.push(wanted);
        }
        // What is missing can be computed again, whatever else failed.
        if matches!(error, Error::Missing { .. }) || self.failure.is_none() {
            self.failure = Some(error);
        }
    }
}
