//! Views of a sequence: opening, growing, moving to other copies, closing. A stripe is read from one shard at a time, so that
//! its partial is folded there whichever shard that is.

mod opening;
mod place;
mod race;

use std::{collections::VecDeque, mem, sync::Arc, time::Duration};

use futures::{FutureExt, future::join_all};
use longshore_blocks::BlockKey;
use longshore_fabric::CallContext;
use longshore_proto::types::{Identity, OpenView};

use super::{LocalBlock, Sequence};
use crate::{
    Engine, Error, ShardLinks,
    error::check,
    intake::within,
    patience::{patiently, within_time},
    readers::ReadOrder,
};

use opening::open_view;
use race::Begun;

/// How often what grows may move to other copies because an append failed. Copies that open views and take no appends would send it to and
/// fro for ever.
const MOVES_MAX: u32 = 8;
/// Why a sequence is broken while nobody knows whether a shard appended blocks to a view.
const NO_ANSWER: &str = "an append to a view got no answer";

/// Blocks of one sequence on one shard.
#[derive(Debug)]
pub(crate) struct View {
    /// Index of the shard.
    pub(crate) shard: usize,
    /// Name on the shard.
    pub(crate) id: u64,
    /// Stripes that the shard answers for, ascending.
    pub(crate) parts: Vec<ViewPart>,
}

/// One stripe of a view.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ViewPart {
    pub(crate) stripe: u64,
    /// False when another shard is asked for it now; what this one answers is passed over.
    pub(crate) used: bool,
}

impl View {
    /// A view that one stripe was opened with.
    fn of(shard: usize, id: u64, stripe: u64) -> Self {
        Self { shard, id, parts: vec![ViewPart { stripe, used: true }] }
    }

    fn uses(&self, stripe: u64) -> bool {
        self.parts.iter().any(|part| part.stripe == stripe && part.used)
    }

    fn used(&self) -> impl Iterator<Item = u64> {
        self.parts.iter().filter(|part| part.used).map(|part| part.stripe)
    }

    /// Blocks of `stripe`, which is the last one or a later one, were appended.
    fn grew(&mut self, stripe: u64) {
        if self.parts.last().is_none_or(|last| last.stripe != stripe) {
            self.parts.push(ViewPart { stripe, used: true });
        }
    }
}

/// Blocks of one shard, ascending by index.
type ShardBlocks = Vec<(u64, BlockKey)>;

impl Sequence {
    /// Opens a sequence whose first tokens, `prefix`, are whole blocks that the shards hold. All shards are asked at once;
    /// a stripe that one lacks is looked for on the next one. When no shard holds one whole, what was opened is closed again
    /// and the error names the keys.
    pub async fn open(
        engine: &Engine,
        ctx: &CallContext,
        identity: Identity,
        links: Arc<ShardLinks>,
        prefix: &[u32],
        lease_ms: u32,
    ) -> Result<Self, Error> {
        let mut sequence = Self::with_prefix(engine, identity, links, prefix)?;
        sequence.lease_ms = lease_ms;
        let blocks = sequence.full_blocks();
        let stripes = (0..blocks.div_ceil(u64::from(sequence.geometry.stripe_blocks()))).collect();
        sequence.views = sequence.place(ctx, stripes, blocks, None).await?;
        sequence.remote_blocks = blocks;
        Ok(sequence)
    }

    /// Like [`Self::open`], but copies the blocks here instead of attending to them where they lie.
    pub async fn fetch(
        engine: &Engine,
        ctx: &CallContext,
        identity: Identity,
        links: Arc<ShardLinks>,
        prefix: &[u32],
    ) -> Result<Self, Error> {
        let mut sequence = Self::with_prefix(engine, identity, links, prefix)?;
        let mut blocks: Vec<(u64, LocalBlock)> = sequence.fetch_all(engine, ctx).await?;
        blocks.sort_by_key(|(block, _)| *block);
        sequence.local = blocks.into_iter().map(|(_, block)| block).collect();
        Ok(sequence)
    }

    fn with_prefix(
        engine: &Engine,
        identity: Identity,
        links: Arc<ShardLinks>,
        prefix: &[u32],
    ) -> Result<Self, Error> {
        let mut sequence = Self::new(engine, identity, links);
        if !prefix.len().is_multiple_of(sequence.shape.block_tokens) {
            let problem =
                format!("has {} tokens, not a multiple of {}", prefix.len(), sequence.shape.block_tokens);
            return Err(Error::Invalid { field: "prefix", problem });
        }
        sequence.chain.push(prefix);
        sequence.done = prefix.len() as u64;
        Ok(sequence)
    }

    /// Hands the next `count` blocks, which their shards acknowledged, over to the views and drops them here. Goes in
    /// order and stops at the first failure: blocks before it are remote then, blocks from it on still local and good.
    /// When nobody can say whether a shard appended a block, its stripes move to other copies; where there are none, the
    /// sequence is broken: counting a block twice would be a wrong answer. No step may be under way.
    pub async fn append_remote(&mut self, ctx: &CallContext, count: u64, lease_ms: u32) -> Result<(), Error> {
        self.lease_ms = lease_ms;
        let end = (self.remote_blocks + count).min(self.full_blocks());
        let mut moves = 0;
        while self.remote_blocks < end {
            let before = self.remote_blocks;
            let stripe = self.geometry.stripe_of(self.remote_blocks);
            let last = ((stripe + 1) * u64::from(self.geometry.stripe_blocks())).min(end);
            let blocks = self.keyed(self.remote_blocks..last);
            match self.views.iter().position(|view| view.uses(stripe)) {
                Some(view) => self.grow(ctx, (view, moves), stripe, blocks).await?,
                None => self.begin_stripe(ctx, stripe, blocks).await?,
            }
            moves = if self.remote_blocks == before { moves + 1 } else { 0 };
        }
        Ok(())
    }

    /// Appends to the view that has the beginning of the stripe; when its shard cannot, the stripe moves as a whole. What was appended to
    /// has moved so many times already, and nothing was appended.
    async fn grow(
        &mut self,
        ctx: &CallContext,
        (view, moves): (usize, u32),
        stripe: u64,
        blocks: ShardBlocks,
    ) -> Result<(), Error> {
        let (shard, count) = (self.views[view].shard, blocks.len() as u64);
        match self.append(ctx, (view, moves), blocks).await {
            Ok(()) => self.views[view].grew(stripe),
            Err(error) if self.links.rule().copies() == 1 => return Err(error),
            // Nobody waits for it any more: its stripes have moved, and the blocks are tried again.
            Err(Error::Late { .. }) if self.broken.is_none() => return Ok(()),
            Err(Error::Missing { .. }) => {
                let upto = self.remote_blocks + count;
                let moved = self.place(ctx, vec![stripe], upto, Some(shard)).await?;
                self.pass_over(view, stripe);
                self.views.extend(moved);
            }
            Err(error) if moves >= MOVES_MAX => return Err(error),
            // Whether it was appended is not known, so the view is given up; the blocks are tried again.
            Err(error) => return self.leave(ctx, &[shard]).await.map_err(|_| error),
        }
        self.handed_over(count);
        Ok(())
    }

    /// Hands over the first blocks of a stripe, to the first shard that holds them. None is asked again that was late to open a view: it is
    /// waited for beside the others.
    async fn begin_stripe(
        &mut self,
        ctx: &CallContext,
        stripe: u64,
        blocks: ShardBlocks,
    ) -> Result<(), Error> {
        let (mut failure, mut late) = (None, Vec::new());
        let readers = ReadOrder::new(&self.links).readers(&self.chain.stripe_seed(self.remote_blocks))?;
        let (alone, mut readers) = (readers.len() == 1, VecDeque::from(readers));
        while let Some(shard) = readers.pop_front() {
            let grows = |view: &View| {
                view.shard == shard && view.parts.last().is_some_and(|last| last.stripe < stripe)
            };
            let opened = match self.views.iter().position(grows) {
                Some(view) => {
                    let appended = self.append(ctx, (view, 0), blocks.clone()).await;
                    appended.map(|()| self.views[view].grew(stripe))
                }
                None => {
                    let patience = (!alone).then(|| within_time(ctx, self.patience));
                    let mut opening = self.open_view(ctx, shard, blocks.clone(), None).boxed();
                    let opened = patiently(&self.links.links()[shard], patience, &mut opening).await;
                    if let Err(Error::Late { .. }) = opened {
                        check(ctx)?;
                        self.note(shard, &opened);
                        readers.extend(late);
                        let begun = (readers, Some((shard, opening)), failure);
                        return self.go_on_with(ctx, stripe, blocks, begun).await;
                    }
                    opened.map(|id| self.views.push(View::of(shard, id, stripe)))
                }
            };
            match opened {
                Ok(()) => {
                    self.handed_over(blocks.len() as u64);
                    return Ok(());
                }
                Err(error) if self.broken.is_some() => {
                    if self.links.rule().copies() == 1 || self.leave(ctx, &[shard]).await.is_err() {
                        return Err(error);
                    }
                    failure = Some(error);
                }
                Err(error @ Error::Missing { .. }) => failure = Some(error),
                Err(error) => {
                    late.extend(matches!(error, Error::Late { .. }).then_some(shard));
                    failure = failure.or(Some(error));
                }
            }
            check(ctx)?;
        }
        if late.is_empty() {
            return Err(failure.unwrap_or(Error::NoShards));
        }
        // Nobody said of those that were late to append that they cannot answer.
        self.go_on_with(ctx, stripe, blocks, (VecDeque::from(late), None, failure)).await
    }

    /// Hands over the first blocks of a stripe, to whoever opens a view of them first.
    async fn go_on_with(
        &mut self,
        ctx: &CallContext,
        stripe: u64,
        blocks: ShardBlocks,
        begun: Begun<'_>,
    ) -> Result<(), Error> {
        let count = blocks.len() as u64;
        let placed = self.place_begun(ctx, (stripe, blocks), begun).await?;
        self.views.extend(placed);
        self.handed_over(count);
        Ok(())
    }

    /// Appends to a view. Unless its shard said clearly whether it did, the sequence is broken. When the shard is late, all that lies
    /// on it moves to other copies, unless it answers sooner: then the error says so, and the sequence is as good as before. Where there
    /// are none it is waited for, since another append might count blocks twice. It is waited for twice as long after each of `moves`:
    /// two copies that are slow and alive would send the sequence to and fro.
    async fn append(
        &mut self,
        ctx: &CallContext,
        (view, moves): (usize, u32),
        blocks: ShardBlocks,
    ) -> Result<(), Error> {
        check(ctx)?;
        let (shard, id) = (self.views[view].shard, self.views[view].id);
        let broken_before = self.broken;
        // Also holds when this future is dropped half-way.
        self.break_off(NO_ANSWER);
        let link = self.links.links()[shard].clone();
        let patience = self.patience.saturating_mul(1 << moves.min(16));
        let patience = (self.links.rule().copies() > 1).then(|| within_time(ctx, patience));
        let mut answer = Box::pin(self.open_view(ctx, shard, blocks, Some(id)));
        let mut opened = patiently(&link, patience, &mut answer).await;
        if let Err(late @ Error::Late { .. }) = opened {
            check(ctx)?;
            self.note(shard, &Err::<(), Error>(late.clone()));
            let away = [shard];
            let sooner = tokio::select! {
                biased;
                opened = &mut answer => Some(opened),
                left = self.leave(ctx, &away) => match left {
                    Ok(()) => return Err(late),
                    Err(_) => None,
                },
            };
            opened = match sooner {
                Some(opened) => opened,
                None => answer.await,
            };
        }
        let opened = opened.and_then(|opened| {
            let problem = || format!("view {opened} to an append to {id}");
            let mismatch =
                || Error::Mismatch { shard: self.links.links()[shard].id.clone(), problem: problem() };
            if opened == id { Ok(()) } else { Err(mismatch()) }
        });
        if matches!(opened, Ok(()) | Err(Error::Missing { .. })) {
            self.broken = broken_before;
        }
        opened
    }

    fn handed_over(&mut self, count: u64) {
        self.local.drain(..count as usize);
        self.remote_blocks += count;
    }

    /// Another shard is asked for `stripe` from now on.
    fn pass_over(&mut self, view: usize, stripe: u64) {
        for part in self.views[view].parts.iter_mut().filter(|part| part.stripe == stripe) {
            part.used = false;
        }
        if self.views[view].used().next().is_none() {
            let view = self.views.swap_remove(view);
            self.links.close_later(view.shard, view.id);
        }
    }

    /// Moves everything that lies on `shards` to other copies. On an error nothing has changed.
    pub(crate) async fn leave(&mut self, ctx: &CallContext, shards: &[usize]) -> Result<(), Error> {
        let away = |view: &View| shards.contains(&view.shard);
        let mut stripes: Vec<u64> =
            self.views.iter().filter(|view| away(view)).flat_map(View::used).collect();
        stripes.sort_unstable();
        let moved = self.place(ctx, stripes, self.remote_blocks, shards.first().copied()).await?;
        tracing::info!(shards = ?self.names(shards), views = moved.len(), "a sequence goes on at other copies");
        let views = mem::take(&mut self.views).into_iter();
        let (left, kept): (Vec<View>, Vec<View>) = views.partition(away);
        self.views = kept;
        self.views.extend(moved);
        left.iter().for_each(|view| self.links.close_later(view.shard, view.id));
        if self.broken == Some(NO_ANSWER) {
            self.broken = None;
        }
        Ok(())
    }

    fn names(&self, shards: &[usize]) -> Vec<&str> {
        shards.iter().map(|&shard| self.links.links()[shard].id.0.as_str()).collect()
    }

    /// Full blocks with their keys.
    fn keyed(&self, blocks: std::ops::Range<u64>) -> ShardBlocks {
        blocks.map(|block| (block, self.key(block).expect("a full block has a key"))).collect()
    }

    /// Opens a view, or appends to one, and takes note of how that ended.
    pub(super) fn open_view<'a>(
        &self,
        ctx: &'a CallContext,
        shard: usize,
        blocks: ShardBlocks,
        append_to: Option<u64>,
    ) -> impl Future<Output = Result<u64, Error>> + Send + use<'a> {
        let open = OpenView { identity: self.identity, blocks, append_to, lease_ms: self.lease_ms };
        open_view(ctx, Arc::clone(&self.links), shard, open)
    }

    /// Takes note of how a call to a shard ended. That somebody with little time did not wait for it says nothing of the shard.
    pub(super) fn note<T>(&self, shard: usize, outcome: &Result<T, Error>) {
        let usual = self.patience.as_millis();
        let hasty = matches!(outcome, Err(Error::Late { waited_ms, .. }) if u128::from(*waited_ms) < usual);
        if !hasty {
            self.links.links()[shard].note(outcome);
        }
    }

    /// Closes all views and waits for the shards, each for a few seconds at most.
    pub async fn close(mut self) {
        let links = Arc::clone(&self.links);
        let ctx = CallContext::new("close-view").with_timeout(Duration::from_secs(5));
        let closing = mem::take(&mut self.views).into_iter().map(|view| {
            let (link, ctx) = (links.links()[view.shard].clone(), &ctx);
            async move { within(ctx, link.shard.close_view(ctx, view.id)).await }
        });
        for closed in join_all(closing).await {
            if let Ok(Err(error)) | Err(error) = closed {
                tracing::debug!(%error, "left a view to its lease");
            }
        }
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        self.views.iter().for_each(|view| self.links.close_later(view.shard, view.id));
    }
}
