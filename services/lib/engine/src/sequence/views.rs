//! Opening, growing and closing the views of a sequence.

use std::{mem, sync::Arc};

use futures::future::{join_all, try_join_all};
use longshore_blocks::BlockKey;
use longshore_fabric::CallContext;
use longshore_proto::types::{Identity, OpenView, OpenedView};

use super::{LocalBlock, Sequence};
use crate::{Engine, Error, ShardLink, ShardLinks, error::check, fetch_blocks, intake::within};

/// Blocks of one sequence on one shard.
#[derive(Debug)]
pub(super) struct View {
    pub(super) id: u64,
    /// Ascending.
    pub(super) stripes: Vec<u64>,
}

/// Blocks of one shard, ascending by index.
type ShardBlocks = Vec<(u64, BlockKey)>;

impl Sequence {
    /// Opens a sequence whose first tokens, `prefix`, are whole blocks that the shards hold. All shards are asked at once;
    /// when one lacks a block, what was opened is closed again and the error names the keys.
    pub async fn open(
        engine: &Engine,
        ctx: &CallContext,
        identity: Identity,
        links: Arc<ShardLinks>,
        prefix: &[u32],
        lease_ms: u32,
    ) -> Result<Self, Error> {
        let mut sequence = Self::with_prefix(engine, identity, links, prefix)?;
        let by_shard = sequence.blocks_by_shard()?;
        let calls = by_shard.into_iter().enumerate().filter(|(_, blocks)| !blocks.is_empty()).map(
            |(shard, blocks)| {
                let link = sequence.links.links()[shard].clone();
                async move {
                    let stripes =
                        blocks.iter().map(|(block, _)| engine.geometry().stripe_of(*block)).collect();
                    let call = OpenView { identity, blocks, append_to: None, lease_ms };
                    (shard, stripes, open_view(ctx, &link, call).await)
                }
            },
        );
        let mut failure = None;
        for (shard, mut stripes, opened) in join_all(calls).await {
            Vec::dedup(&mut stripes);
            match opened {
                Ok(id) => sequence.views[shard] = Some(View { id, stripes }),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        match failure {
            Some(error) => Err(error),
            None => {
                sequence.remote_blocks = sequence.full_blocks();
                Ok(sequence)
            }
        }
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
        let by_shard = sequence.blocks_by_shard()?;
        let calls = by_shard.into_iter().enumerate().filter(|(_, blocks)| !blocks.is_empty()).map(
            |(shard, blocks)| {
                let link = sequence.links.links()[shard].clone();
                async move {
                    let keys: Vec<BlockKey> = blocks.iter().map(|(_, key)| *key).collect();
                    let fetched = fetch_blocks(engine, ctx, &link, identity, &keys).await?;
                    Ok::<_, Error>(blocks.into_iter().map(|(block, _)| block).zip(fetched))
                }
            },
        );
        let mut blocks: Vec<(u64, LocalBlock)> = try_join_all(calls).await?.into_iter().flatten().collect();
        blocks.sort_by_key(|(block, _)| *block);
        sequence.local = blocks.into_iter().map(|(_, block)| block).collect();
        Ok(sequence)
    }

    /// Its full blocks, by the shard that holds them.
    fn blocks_by_shard(&self) -> Result<Vec<ShardBlocks>, Error> {
        let mut by_shard = vec![ShardBlocks::new(); self.views.len()];
        for block in 0..self.full_blocks() {
            let key = self.key(block).expect("a full block has a key");
            by_shard[self.owner(block)?].push((block, key));
        }
        Ok(by_shard)
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
    /// When nobody can say whether a shard appended a block, the sequence is broken: counting a block twice would be a
    /// wrong answer. No step may be under way.
    pub async fn append_remote(&mut self, ctx: &CallContext, count: u64, lease_ms: u32) -> Result<(), Error> {
        let end = (self.remote_blocks + count).min(self.full_blocks());
        while self.remote_blocks < end {
            let shard = self.owner(self.remote_blocks)?;
            let mut blocks = ShardBlocks::new();
            let mut next = self.remote_blocks;
            while next < end && self.owner(next)? == shard {
                blocks.push((next, self.key(next).expect("a full block has a key")));
                next += 1;
            }
            self.append_to_shard(ctx, shard, blocks, lease_ms).await?;
        }
        Ok(())
    }

    async fn append_to_shard(
        &mut self,
        ctx: &CallContext,
        shard: usize,
        blocks: ShardBlocks,
        lease_ms: u32,
    ) -> Result<(), Error> {
        check(ctx)?;
        let link = self.links.links()[shard].clone();
        let append_to = self.views[shard].as_ref().map(|view| view.id);
        let call = OpenView { identity: self.identity, blocks: blocks.clone(), append_to, lease_ms };
        let broken_before = self.broken;
        if append_to.is_some() {
            // Also holds when this future is dropped half-way.
            self.break_off("an append to a view got no answer");
        }
        let opened = open_view(ctx, &link, call).await.and_then(|id| match append_to {
            Some(view) if view != id => Err(Error::Mismatch {
                shard: link.id.clone(),
                problem: format!("view {id} to an append to {view}"),
            }),
            _ => Ok(id),
        });
        if matches!(opened, Ok(_) | Err(Error::Missing { .. })) {
            self.broken = broken_before;
        }
        let id = opened?;
        let view = self.views[shard].get_or_insert(View { id, stripes: Vec::new() });
        for (block, _) in blocks {
            let stripe = self.geometry.stripe_of(block);
            if view.stripes.last() != Some(&stripe) {
                view.stripes.push(stripe);
            }
            self.local.pop_front();
            self.remote_blocks += 1;
        }
        Ok(())
    }

    /// Closes all views and waits for the shards, each for a few seconds at most.
    pub async fn close(mut self) {
        let links = Arc::clone(&self.links);
        let ctx = CallContext::new("close-view").with_timeout(std::time::Duration::from_secs(5));
        let views = mem::take(&mut self.views);
        let closing = views.into_iter().enumerate().filter_map(|(shard, view)| {
            let (link, view) = (links.links()[shard].clone(), view?);
            let ctx = &ctx;
            Some(async move { within(ctx, link.shard.close_view(ctx, view.id)).await })
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
        for (shard, view) in self.views.iter().enumerate() {
            if let Some(view) = view {
                self.links.close_later(shard, view.id);
            }
        }
    }
}

async fn open_view(ctx: &CallContext, link: &ShardLink, call: OpenView) -> Result<u64, Error> {
    let opened = within(ctx, link.shard.open_view(ctx, call)).await;
    match opened.and_then(|opened| opened).map_err(|source| Error::of_shard(ctx, &link.id, source))? {
        OpenedView::Open { view_id } => Ok(view_id),
        OpenedView::Missing(keys) => Err(Error::Missing { shard: link.id.clone(), keys }),
    }
}
