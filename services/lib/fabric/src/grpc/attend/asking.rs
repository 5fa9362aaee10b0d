//! What the two halves of an attend stream know of its queries: the one sends them, by numbers of its own, the other matches answers to
//! them and says which to ask again.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::{Stream, stream};
use longshore_proto::{
    types::{AttendAnswer, AttendQuery},
    v1,
};
use tokio::sync::{Notify, mpsc};

use super::super::epochs::Pulse;

/// Queries that were sent and not answered, at most: more wait with their caller.
const UNDER_WAY_MAX: usize = 4096;
/// Bytes of query rows that are kept to be asked again; queries beyond them name no epoch.
const KEPT_BYTES_MAX: usize = 64 << 20;

/// The queries of a call.
#[derive(Debug, Default)]
pub(super) struct Asking {
    state: Mutex<State>,
    /// Something is to be asked again, or a place is free, or nothing is under way any more.
    changed: Notify,
}

/// An epoch that queries name.
#[derive(Debug, Clone)]
pub(super) struct Epoch {
    /// Among those of the call.
    pub(super) number: u64,
    pub(super) wire: v1::NcclLease,
    pub(super) pulse: Pulse,
}

#[derive(Debug, Default)]
struct State {
    /// By their numbers on the wire.
    under_way: HashMap<u64, UnderWay>,
    /// Numbers that were given out: an answer to a query that was asked again is none to what it became.
    numbers: u64,
    kept_bytes: usize,
    again: VecDeque<Again>,
    epoch: Option<Epoch>,
}

#[derive(Debug)]
struct UnderWay {
    /// As its caller numbered it.
    query_id: u64,
    /// Where it named an epoch: that one, and what to ask again.
    kept: Option<(u64, AttendQuery)>,
    /// The partials up to this one, by item and stripe, were handed on before it was asked again.
    skip_to: Option<(u32, u64)>,
    /// The last one that was handed on.
    handed_on: Option<(u32, u64)>,
}

#[derive(Debug)]
struct Again {
    query: AttendQuery,
    handed_on: Option<(u32, u64)>,
}

/// Bytes of query rows.
fn bytes(query: &AttendQuery) -> usize {
    query.items.iter().map(|item| item.queries.data.len()).sum()
}

impl State {
    fn is_full(&self) -> bool {
        self.under_way.len() >= UNDER_WAY_MAX
    }

    /// The message of a query; it names the epoch of the call if it `may` and there is room to keep it.
    fn ask(&mut self, query: AttendQuery, may: bool, handed_on: Option<(u32, u64)>) -> v1::AttendRequest {
        let room = self.kept_bytes + bytes(&query) <= KEPT_BYTES_MAX;
        let epoch = self.epoch.clone().filter(|epoch| may && room && epoch.pulse.is_joined());
        self.numbers += 1;
        let kept = epoch.as_ref().map(|epoch| (epoch.number, query.clone()));
        self.kept_bytes += kept.as_ref().map_or(0, |(_, query)| bytes(query));
        let under_way = UnderWay { query_id: query.query_id, kept, skip_to: handed_on, handed_on };
        self.under_way.insert(self.numbers, under_way);
        let message = v1::AttendRequest::from(AttendQuery { query_id: self.numbers, ..query });
        v1::AttendRequest { nccl: epoch.map(|epoch| epoch.wire), ..message }
    }

    fn remove(&mut self, number: u64) -> Option<UnderWay> {
        let removed = self.under_way.remove(&number)?;
        self.kept_bytes -= removed.kept.as_ref().map_or(0, |(_, query)| bytes(query));
        Some(removed)
    }
}

impl Asking {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The epoch that queries name from now on.
    pub(super) fn name(&self, epoch: Option<Epoch>) {
        self.state().epoch = epoch;
    }

    /// The messages of `queries`, and of those that are asked again. They end when there are no more and all are answered.
    pub(super) fn requests(
        self: Arc<Self>,
        queries: mpsc::Receiver<AttendQuery>,
    ) -> impl Stream<Item = v1::AttendRequest> + Send + 'static {
        stream::unfold((self, queries, true), |(asking, mut queries, mut are_more)| async move {
            loop {
                let (message, is_full, is_done) = {
                    let mut state = asking.state();
                    let again = state.again.pop_front();
                    let message = again.map(|Again { query, handed_on }| state.ask(query, false, handed_on));
                    (message, state.is_full(), state.under_way.is_empty())
                };
                if let Some(message) = message {
                    return Some((message, (asking, queries, are_more)));
                }
                if !are_more && is_done {
                    return None;
                }
                tokio::select! {
                    () = asking.changed.notified() => {}
                    query = queries.recv(), if are_more && !is_full => match query {
                        Some(query) => {
                            let message = asking.state().ask(query, true, None);
                            return Some((message, (asking, queries, are_more)));
                        }
                        None => are_more = false,
                    },
                }
            }
        })
    }

    /// The epoch that a query named, if it named one; `None` where it is not under way.
    pub(super) fn named_by(&self, number: u64) -> Option<Option<u64>> {
        let state = self.state();
        let under_way = state.under_way.get(&number)?;
        Some(under_way.kept.as_ref().map(|(epoch, _)| *epoch))
    }

    /// Asks a query again that named an epoch. What comes of it under its old number is none of it any more.
    pub(super) fn ask_again(&self, number: u64) {
        let mut state = self.state();
        let is_kept = state.under_way.get(&number).is_some_and(|under_way| under_way.kept.is_some());
        let Some(lost) = is_kept.then(|| state.remove(number)).flatten() else { return };
        let query = lost.kept.map(|(_, query)| query);
        state.again.extend(query.map(|query| Again { query, handed_on: lost.handed_on }));
        self.changed.notify_one();
    }

    /// An answer as its caller knows it, without what came of it before; `None` where nobody waits for it.
    pub(super) fn hand_on(&self, answer: AttendAnswer) -> Option<AttendAnswer> {
        match answer {
            AttendAnswer::Failed { query_id, code, message } => {
                let query_id = self.answered(query_id)?.query_id;
                Some(AttendAnswer::Failed { query_id, code, message })
            }
            AttendAnswer::Partials { query_id: number, mut partials, last } => {
                let query_id = {
                    let mut state = self.state();
                    let under_way = state.under_way.get_mut(&number)?;
                    partials.retain(|partial| Some((partial.item, partial.stripe)) > under_way.skip_to);
                    let newest = partials.last().map(|partial| (partial.item, partial.stripe));
                    under_way.handed_on = newest.max(under_way.handed_on);
                    under_way.query_id
                };
                if last {
                    self.answered(number);
                }
                Some(AttendAnswer::Partials { query_id, partials, last })
            }
        }
    }

    fn answered(&self, number: u64) -> Option<UnderWay> {
        let mut state = self.state();
        let was_full = state.is_full();
        let answered = state.remove(number);
        if was_full || state.under_way.is_empty() {
            self.changed.notify_one();
        }
        answered
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt, StreamExt};
    use longshore_blocks::{Deployment, Namespace};
    use longshore_proto::types::{AttendItem, AttendPartial, Identity, Tensor};

    use super::*;

    fn query(query_id: u64) -> AttendQuery {
        let deployment = Deployment::from_bytes([1; 32]);
        let identity = Identity { deployment, namespace: Namespace::from_bytes([2; 32]), shard_map_epoch: 0 };
        let queries = Tensor::from_f32(&[1, 1, 2], &[1.0, 2.0]);
        let item = AttendItem { view_id: 1, first_position: 0, queries, scale: 1.0, sparse: None };
        AttendQuery { query_id, identity, layer: 0, items: vec![item] }
    }

    fn stripes(number: u64, stripes: std::ops::Range<u64>, last: bool) -> AttendAnswer {
        let partial = Tensor::from_f32(&[1, 1, 4], &[0.0; 4]);
        let partials = stripes.map(|stripe| AttendPartial { item: 0, stripe, partial: partial.clone() });
        AttendAnswer::Partials { query_id: number, partials: partials.collect(), last }
    }

    /// As if the query had named an epoch.
    fn keep(asking: &Asking, number: u64) {
        let mut state = asking.state();
        let kept = query(state.under_way[&number].query_id);
        state.kept_bytes += bytes(&kept);
        state.under_way.get_mut(&number).unwrap().kept = Some((1, kept));
    }

    #[tokio::test]
    async fn a_query_that_is_asked_again_is_another_and_what_came_is_not_handed_on_twice() {
        let asking = Arc::<Asking>::default();
        let (sender, queries) = mpsc::channel(4);
        let mut requests = Box::pin(Arc::clone(&asking).requests(queries));
        sender.send(query(70)).await.unwrap();
        sender.send(query(71)).await.unwrap();
        let numbers = [requests.next().await.unwrap(), requests.next().await.unwrap()];
        assert_eq!(numbers.map(|message| message.query_id), [1, 2]);
        assert_eq!((asking.named_by(1), asking.named_by(3)), (Some(None), None));
        keep(&asking, 1);
        assert_eq!(asking.named_by(1), Some(Some(1)));
        assert_eq!(asking.hand_on(stripes(1, 0..2, false)), Some(stripes(70, 0..2, false)));
        asking.ask_again(1);
        asking.ask_again(2);
        let again = requests.next().await.unwrap();
        assert_eq!((again.query_id, again.nccl, again.items.len()), (3, None, 1));
        assert!(requests.next().now_or_never().is_none(), "the other one named no epoch: it is not lost");
        // What comes of the first attempt is none of the second.
        assert_eq!(asking.hand_on(stripes(1, 5..9, true)), None);
        assert_eq!(asking.hand_on(stripes(3, 0..1, false)), Some(stripes(70, 0..0, false)));
        assert_eq!(asking.hand_on(stripes(3, 1..4, true)), Some(stripes(70, 2..4, true)));
        assert_eq!(asking.hand_on(stripes(3, 0..4, true)), None, "it was answered");
        // It ends when there are no more, and all are answered.
        drop(sender);
        assert!(requests.next().now_or_never().is_none());
        let failed = |query_id| AttendAnswer::Failed { query_id, code: 5, message: "gone".to_owned() };
        assert_eq!(asking.hand_on(failed(2)), Some(failed(71)));
        assert!(requests.next().await.is_none());
        assert_eq!(asking.state().kept_bytes, 0);
    }

    #[tokio::test]
    async fn queries_under_way_are_bounded() {
        let asking = Arc::<Asking>::default();
        let (sender, queries) = mpsc::channel(1);
        let mut requests = Box::pin(Arc::clone(&asking).requests(queries));
        for id in 1..=UNDER_WAY_MAX as u64 {
            sender.send(query(id)).await.unwrap();
            requests.next().await.unwrap();
        }
        sender.send(query(1)).await.unwrap();
        assert!(requests.next().now_or_never().is_none());
        asking.hand_on(stripes(9, 0..1, true)).unwrap();
        assert_eq!(requests.next().await.unwrap().query_id, UNDER_WAY_MAX as u64 + 1);
    }
}
