//! Opening a view on a shard, or appending to one. Whoever stops waiting for an open leaves nothing behind: the shard may be stopped,
//! or slow, and open the view long after its caller went to another copy; then it is closed.

use std::{
    collections::HashSet,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::{FutureExt, future::BoxFuture};
use longshore_blocks::BlockKey;
use longshore_fabric::CallContext;
use longshore_proto::types::{OpenView, OpenedView};

use crate::{Error, ShardLink, ShardLinks, patience::answer};

/// Opens a view on the shard at `shard`, or appends to one, and takes note of how that ended; returns the view's name.
pub(super) async fn open_view(
    ctx: &CallContext,
    links: Arc<ShardLinks>,
    shard: usize,
    open: OpenView,
) -> Result<u64, Error> {
    let link = links.links()[shard].clone();
    let asked: HashSet<BlockKey> = open.blocks.iter().map(|(_, key)| *key).collect();
    let opening = Opening::new(ctx, links, shard, open);
    let opened = match answer(ctx, &link, None, opening).await {
        Ok(OpenedView::Open { view_id }) => Ok(view_id),
        Ok(OpenedView::Missing(keys)) => Err(missing(&link, keys, &asked)),
        Err(error) => Err(error),
    };
    link.note(&opened);
    opened
}

/// What it means that a shard lacks `keys`. What it was not asked for tells nobody where to look next: whoever believed it would ask the
/// same shard for the same blocks for ever.
fn missing(link: &ShardLink, keys: Vec<BlockKey>, asked: &HashSet<BlockKey>) -> Error {
    let shard = link.id.clone();
    let problem = match keys.iter().find(|key| !asked.contains(key)) {
        Some(key) => format!("that it lacks block `{key}`, which it was not asked for"),
        None if keys.is_empty() => "neither a view nor what it lacks".to_owned(),
        None => return Error::Missing { shard, keys },
    };
    Error::Mismatch { shard, problem }
}

type Call = BoxFuture<'static, Result<OpenedView, longshore_fabric::Error>>;

/// A call under way.
struct Opening {
    /// `None` once it ended.
    call: Option<Call>,
    /// Whether anything was sent.
    begun: bool,
    /// Whether what it opens is to be closed when nobody waits for it.
    closes: bool,
    links: Arc<ShardLinks>,
    shard: usize,
}

impl Opening {
    fn new(ctx: &CallContext, links: Arc<ShardLinks>, shard: usize, open: OpenView) -> Self {
        let closes = open.append_to.is_none();
        let client = Arc::clone(&links.links()[shard].shard);
        // An append ends with its caller, who gives up the view that he has. An open must be heard of whoever still waits: cancelled
        // half-way, it would leave a view to its lease.
        let own = match closes {
            false => ctx.child(),
            true => CallContext { deadline: None, cancel: Default::default(), ..ctx.clone() },
        };
        let call = async move { client.open_view(&own, open).await }.boxed();
        Self { call: Some(call), begun: false, closes, links, shard }
    }
}

impl Future for Opening {
    type Output = Result<OpenedView, longshore_fabric::Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.begun = true;
        let call = self.call.as_mut().expect("nobody polls a future that ended");
        let polled = call.poll_unpin(cx);
        if polled.is_ready() {
            self.call = None;
        }
        polled
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if let Some(call) = self.call.take().filter(|_| self.begun && self.closes) {
            self.links.close_when_opened(self.shard, call);
        }
    }
}
