//! A shard whose `attend` does what a test says.

use std::sync::{
    Mutex,
    atomic::{AtomicUsize, Ordering},
};

use async_trait::async_trait;
use longshore_proto::types::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::partial_of;
use crate::{BoxStream, CallContext, Code, Error, Shard};

/// What happens to a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    /// Answered, one message per partial.
    Answer,
    /// Answered with one row too few.
    Misshapen,
    /// Fails alone.
    Fail(Code),
    /// The stream breaks.
    Break,
    /// The stream ends.
    End,
    /// Never answered.
    Ignore,
}

#[derive(Debug, Default)]
pub(super) struct Scripted {
    /// Acts of the next queries; `Answer` after the last one.
    pub(super) script: Mutex<Vec<Act>>,
    pub(super) opened: AtomicUsize,
    pub(super) refuse_to_open: Mutex<Option<Error>>,
    /// Holds answers back until this many queries came.
    pub(super) together: usize,
    pub(super) asked: AtomicUsize,
}

impl Scripted {
    pub(super) fn with(script: &[Act]) -> Self {
        Self { script: Mutex::new(script.iter().rev().copied().collect()), ..Self::default() }
    }

    fn act(&self) -> Act {
        self.script.lock().unwrap().pop().unwrap_or(Act::Answer)
    }
}

fn respond(query: &AttendQuery, act: Act) -> Vec<AttendAnswer> {
    let query_id = query.query_id;
    if let Act::Fail(code) = act {
        let code = crate::status::code_number(code);
        return vec![AttendAnswer::Failed { query_id, code, message: "as scripted".to_owned() }];
    }
    let mut partials = Vec::new();
    for (item, index) in query.items.iter().zip(0..) {
        partials.extend([0, 1].map(|stripe| partial_of(item, index, stripe)));
    }
    if act == Act::Misshapen {
        let values = partials[0].partial.to_f32().unwrap();
        partials[0].partial = Tensor::from_f32(&[values.len() as u64, 1, 1], &values);
    }
    let count = partials.len();
    let messages = partials.into_iter().enumerate();
    messages
        .map(|(index, partial)| AttendAnswer::Partials {
            query_id,
            partials: vec![partial],
            last: index + 1 == count,
        })
        .collect()
}

#[async_trait]
impl Shard for super::scripted::Arced {
    async fn attend(
        &self,
        _: &CallContext,
        mut queries: mpsc::Receiver<AttendQuery>,
    ) -> Result<BoxStream<AttendAnswer>, Error> {
        let this = self.0.clone();
        this.opened.fetch_add(1, Ordering::SeqCst);
        if let Some(error) = this.refuse_to_open.lock().unwrap().clone() {
            return Err(error);
        }
        let (sender, answers) = mpsc::channel(4);
        let feeding = async move {
            let mut held = Vec::new();
            while let Some(query) = queries.recv().await {
                let asked = this.asked.fetch_add(1, Ordering::SeqCst) + 1;
                match this.act() {
                    Act::Break => {
                        let _ = sender.send(Err(Error::new(Code::Internal, "broken"))).await;
                        return;
                    }
                    Act::End => return,
                    Act::Ignore => {}
                    act => held.extend(respond(&query, act)),
                }
                if asked >= this.together {
                    // Newest first: answers may come in any order as long as each query's own stay in order.
                    held.sort_by_key(|answer| match answer {
                        AttendAnswer::Partials { query_id, .. } | AttendAnswer::Failed { query_id, .. } => {
                            std::cmp::Reverse(*query_id)
                        }
                    });
                    for answer in held.drain(..) {
                        if sender.send(Ok(answer)).await.is_err() {
                            return;
                        }
                    }
                }
            }
        };
        self.1.spawn(feeding);
        Ok(Box::pin(ReceiverStream::new(answers)))
    }

    async fn lookup(&self, _: &CallContext, _: Lookup) -> Result<Vec<bool>, Error> {
        unreachable!("links only attend")
    }
    async fn put_blocks(
        &self,
        _: &CallContext,
        _: Identity,
        _: WireTileShape,
        _: mpsc::Receiver<TileMessage>,
    ) -> Result<BoxStream<PutAck>, Error> {
        unreachable!("links only attend")
    }
    async fn get_blocks(
        &self,
        _: &CallContext,
        _: GetBlocks,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        unreachable!("links only attend")
    }
    async fn open_view(&self, _: &CallContext, _: OpenView) -> Result<OpenedView, Error> {
        unreachable!("links only attend")
    }
    async fn close_view(&self, _: &CallContext, _: u64) -> Result<(), Error> {
        unreachable!("links only attend")
    }
    async fn stats(&self, _: &CallContext) -> Result<ShardStats, Error> {
        unreachable!("links only attend")
    }
}

/// A scripted shard and the owner of its tasks.
#[derive(Debug)]
pub(super) struct Arced(pub(super) std::sync::Arc<Scripted>, pub(super) tokio_util::task::TaskTracker);
