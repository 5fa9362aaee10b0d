//! All blocks of a cluster in one order: the pages of its shards, merged.

use std::{collections::VecDeque, time::Duration};

use futures::future::join_all;
use longshore_blocks::{BlockKey, Namespace};
use longshore_fabric::{CallContext, Code, Error};
use longshore_proto::types::{BlockEntry, ListBlocks};

use super::cluster::{CALL_TIMEOUT, Cluster, ShardAt};

/// Longest time for a page that is checked.
const CHECK_TIMEOUT: Duration = Duration::from_secs(300);

/// A block and its copies.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) namespace: Namespace,
    pub(super) key: BlockKey,
    /// Position of a shard and what it says of its copy; at least one.
    pub(super) copies: Vec<(usize, BlockEntry)>,
}

/// A walk over the blocks of all shards, in the order of namespace and key.
#[derive(Debug)]
pub(super) struct Listing<'a> {
    cluster: &'a Cluster,
    list: ListBlocks,
    sources: Vec<Source>,
}

/// The blocks of one shard.
#[derive(Debug)]
struct Source {
    ahead: VecDeque<BlockEntry>,
    after: Option<(Namespace, BlockKey)>,
    is_over: bool,
    failure: Option<Error>,
}

/// What is compared: namespace, key.
type Name = ([u8; 32], [u8; 16]);

fn name(namespace: &Namespace, key: &BlockKey) -> Name {
    (*namespace.as_bytes(), key.0)
}

impl<'a> Listing<'a> {
    /// The blocks that `list` names; its limit is that of a page.
    pub(super) fn new(cluster: &'a Cluster, list: ListBlocks) -> Self {
        let source = |_| Source { ahead: VecDeque::new(), after: list.after, is_over: false, failure: None };
        let sources = cluster.shards.iter().map(source).collect();
        Self { cluster, list, sources }
    }

    /// The next block; `None` at the end. Shards that fail are left out from then on ([`Self::failures`]).
    pub(super) async fn next(&mut self) -> Option<Row> {
        let (cluster, list) = (self.cluster, &self.list);
        let hungry =
            self.sources.iter_mut().zip(&cluster.shards).filter(|(source, _)| source.ahead.is_empty());
        join_all(hungry.map(|(source, shard)| source.fill(shard, list))).await;
        let first = |source: &Source| source.ahead.front().map(|entry| name(&entry.namespace, &entry.key));
        let next = self.sources.iter().filter_map(first).min()?;
        let mut copies = Vec::new();
        for (at, source) in self.sources.iter_mut().enumerate() {
            if first(source) == Some(next) {
                copies.extend(source.ahead.pop_front().map(|entry| (at, entry)));
            }
        }
        let (namespace, key) = (Namespace::from_bytes(next.0), BlockKey(next.1));
        Some(Row { namespace, key, copies })
    }

    /// Shards whose blocks are not all listed, by position, and why.
    pub(super) fn failures(&self) -> impl Iterator<Item = (&ShardAt, &Error)> {
        let failed = self.cluster.shards.iter().zip(&self.sources);
        failed.filter_map(|(shard, source)| Some((shard, source.failure.as_ref()?)))
    }
}

impl Source {
    /// Asks for pages until one has a block or there are no more.
    async fn fill(&mut self, shard: &ShardAt, list: &ListBlocks) {
        while self.ahead.is_empty() && !self.is_over {
            let timeout = if list.check { CHECK_TIMEOUT } else { CALL_TIMEOUT };
            let ctx = CallContext::new("store").with_timeout(timeout);
            let asked = ListBlocks { after: self.after, ..list.clone() };
            match shard.client.list_blocks(&ctx, asked).await {
                Ok(page) => {
                    self.is_over = page.next.is_none();
                    let last = page.blocks.last().map(|entry| (entry.namespace, entry.key));
                    if let Err(error) = self.ascends(page.blocks.iter(), page.next.as_ref()) {
                        return self.fail(error);
                    }
                    self.after = page.next.or(last);
                    self.ahead.extend(page.blocks);
                }
                Err(error) => self.fail(error),
            }
        }
    }

    /// A list that does not ascend would never end.
    fn ascends<'b>(
        &self,
        entries: impl Iterator<Item = &'b BlockEntry>,
        next: Option<&(Namespace, BlockKey)>,
    ) -> Result<(), Error> {
        let before = self.after.as_ref().map(|(namespace, key)| name(namespace, key));
        let entries: Vec<Name> = entries.map(|entry| name(&entry.namespace, &entry.key)).collect();
        let next = next.map(|(namespace, key)| name(namespace, key));
        let is_sorted = before.iter().chain(&entries).is_sorted_by(|a, b| a < b);
        let goes_on = next.is_none_or(|next| {
            before.is_none_or(|before| before < next) && entries.last().is_none_or(|last| *last <= next)
        });
        match is_sorted && goes_on {
            true => Ok(()),
            false => Err(Error::new(Code::DataLoss, "the shard lists its blocks out of order")),
        }
    }

    fn fail(&mut self, error: Error) {
        (self.is_over, self.failure) = (true, Some(error));
    }
}
