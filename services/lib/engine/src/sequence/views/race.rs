//! Finding a shard for every stripe: all shards are asked at once, then the next copies of what was not found. A shard opens a view after
//! it read all of it, which takes long where that is much or the shard is busy. So who is late is not given up: the next copy is asked
//! besides, and whoever is first has the stripe.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    time::Duration,
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use longshore_blocks::BlockKey;
use longshore_fabric::CallContext;

use super::{ShardBlocks, View, ViewPart, place::Wanted};
use crate::{
    Error, Sequence,
    error::check,
    patience::{late, within_time},
    readers::ReadOrder,
};

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
        let (mut race, mut order) = (Race::new(self, ctx), ReadOrder::new(&self.links));
        for stripe in stripes {
            let first = stripe * u64::from(self.geometry.stripe_blocks());
            let end = (first + u64::from(self.geometry.stripe_blocks())).min(upto);
            let Wanted { blocks, shards, .. } = self.wanted(ctx, &mut order, self.keyed(first..end), not)?;
            race.wanted.insert(stripe, Sought { blocks, shards, asked: 0 });
        }
        race.run().await
    }

    /// Opens a view of `blocks`, all of one stripe, as [`Self::place`] does, where that was begun already.
    pub(super) async fn place_begun<'a>(
        &'a self,
        ctx: &'a CallContext,
        (stripe, blocks): (u64, ShardBlocks),
        (shards, late, failure): Begun<'a>,
    ) -> Result<Vec<View>, Error> {
        let mut race = Race::new(self, ctx);
        race.failure = failure;
        race.wanted.insert(stripe, Sought { blocks, shards, asked: usize::from(late.is_some()) });
        if let Some((shard, opening)) = late {
            let ask = Ask { shard, stripes: vec![stripe], late: true, opening };
            race.asks.push(ask.wait(None).boxed());
        }
        race.run().await
    }
}

/// Shards that were not asked yet, in their order; one that was asked and is late, with its answer; what those said that were asked before.
pub(super) type Begun<'a> = (VecDeque<usize>, Option<(usize, Opening<'a>)>, Option<Error>);

type Opening<'a> = BoxFuture<'a, Result<u64, Error>>;

/// A stripe that no shard has opened yet.
struct Sought {
    blocks: ShardBlocks,
    /// Shards that are not asked for it now and were not in vain, the next one first.
    shards: VecDeque<usize>,
    /// How many are asked for it now.
    asked: usize,
}

/// A shard that is asked for a view of stripes.
struct Ask<'a> {
    shard: usize,
    /// Ascending.
    stripes: Vec<u64>,
    late: bool,
    opening: Opening<'a>,
}

type Answer<'a> = (Ask<'a>, Option<Result<u64, Error>>);

impl<'a> Ask<'a> {
    /// What it says; `None`: nothing for as long as `patience`.
    async fn wait(mut self, patience: Option<Duration>) -> Answer<'a> {
        let answer = match patience {
            Some(patience) => tokio::time::timeout(patience, &mut self.opening).await.ok(),
            None => Some((&mut self.opening).await),
        };
        (self, answer)
    }
}

/// A search for views. What is being opened when it ends is closed by who opens it.
struct Race<'a> {
    sequence: &'a Sequence,
    ctx: &'a CallContext,
    patience: Duration,
    /// By stripe.
    wanted: BTreeMap<u64, Sought>,
    asks: FuturesUnordered<BoxFuture<'a, Answer<'a>>>,
    /// Those of them that are not late: when there are none, the next copies are asked, so that one call asks a shard for all.
    awaited: usize,
    opened: Opened<'a>,
    failure: Option<Error>,
}

impl<'a> Race<'a> {
    fn new(sequence: &'a Sequence, ctx: &'a CallContext) -> Self {
        let opened = Opened { sequence, views: Vec::new() };
        let (asks, patience) = (FuturesUnordered::new(), within_time(ctx, sequence.patience));
        Self { sequence, ctx, patience, wanted: BTreeMap::new(), asks, awaited: 0, opened, failure: None }
    }

    /// Asks until every stripe has a view.
    async fn run(mut self) -> Result<Vec<View>, Error> {
        while !self.wanted.is_empty() {
            if self.awaited == 0 {
                self.ask_next()?;
            }
            self.hear().await?;
        }
        Ok(std::mem::take(&mut self.opened.views))
    }

    /// Asks the next shard of every stripe that has one. Fails when there is a stripe that nobody has.
    fn ask_next(&mut self) -> Result<(), Error> {
        check(self.ctx)?;
        let mut round: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
        for (&stripe, sought) in &mut self.wanted {
            match sought.shards.pop_front() {
                Some(shard) => {
                    sought.asked += 1;
                    round.entry(shard).or_default().push(stripe);
                }
                None if sought.asked == 0 => return Err(self.failure.take().unwrap_or(Error::NoShards)),
                None => {}
            }
        }
        for (shard, stripes) in round {
            let blocks =
                stripes.iter().flat_map(|stripe| self.wanted[stripe].blocks.iter().copied()).collect();
            let opening = self.sequence.open_view(self.ctx, shard, blocks, None).boxed();
            let ask = Ask { shard, stripes, late: false, opening };
            self.asks.push(ask.wait(Some(self.patience)).boxed());
            self.awaited += 1;
        }
        Ok(())
    }

    /// Waits until one shard answers or is late.
    async fn hear(&mut self) -> Result<(), Error> {
        let (mut ask, answer) = self.asks.next().await.expect("some shard is asked for each stripe");
        self.awaited -= usize::from(!ask.late);
        match answer {
            Some(Ok(id)) => self.found(ask, id),
            Some(Err(error)) => self.failed(ask, error),
            None => {
                // Whoever went away meanwhile makes no shard late.
                check(self.ctx)?;
                let link = &self.sequence.links.links()[ask.shard];
                self.sequence.note(ask.shard, &Err::<(), Error>(late(link, self.patience)));
                ask.late = true;
                self.asks.push(ask.wait(None).boxed());
            }
        }
        Ok(())
    }

    /// A shard opened a view: it answers for what no other one opened before.
    fn found(&mut self, ask: Ask<'a>, id: u64) {
        let part = |stripe: u64| ViewPart { stripe, used: self.wanted.remove(&stripe).is_some() };
        let parts: Vec<ViewPart> = ask.stripes.into_iter().map(part).collect();
        let view = View { shard: ask.shard, id, parts };
        if view.used().next().is_some() {
            self.opened.views.push(view);
        } else {
            self.sequence.links.close_later(view.shard, view.id);
        }
    }

    /// A shard opened nothing: what it lacks is looked for on the next one, the rest there again; when it failed, all of it.
    fn failed(&mut self, ask: Ask<'a>, error: Error) {
        let missing: Option<HashSet<BlockKey>> = match &error {
            Error::Missing { keys, .. } => Some(keys.iter().copied().collect()),
            _ => None,
        };
        for stripe in ask.stripes {
            let Some(sought) = self.wanted.get_mut(&stripe) else { continue };
            sought.asked -= 1;
            let lacks = missing
                .as_ref()
                .is_none_or(|missing| sought.blocks.iter().any(|(_, key)| missing.contains(key)));
            if !lacks {
                sought.shards.push_front(ask.shard);
            }
        }
        // What is missing can be computed again, whatever else failed.
        if missing.is_some() || self.failure.is_none() {
            self.failure = Some(error);
        }
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
