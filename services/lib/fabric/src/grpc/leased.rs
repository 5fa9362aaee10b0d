//! What store and read streams have in common that lease something for their tiles: a connection (lane `tcp`), an epoch (lane `nccl`). It
//! serves the next call where this one ended well at both sides; what failed is told to the lane; the reason of the server goes before
//! what this side found out by itself.

use std::{future::Future, sync::Arc, time::Duration};

use futures::{Stream, stream};
use longshore_proto::types::{PutAck, TileMessage};
use tonic::Status;

use super::{
    call::fault,
    tiles::{Failure, acknowledgement},
};
use crate::{
    CallContext, Code, Error,
    tcp::{KEPT, KEPT_VALUE},
    tiles::Messages,
};

/// How long the status of a call may come after what it leased broke: it says why. And how long frames may come after the status.
pub(super) const REST_PATIENCE: Duration = Duration::from_secs(1);

/// A lane to one peer.
pub(super) trait Way: Send + Sync + 'static {
    /// It failed: it is left alone for a while.
    fn failed(&self);
    /// The peer does not know any more what calls leased of it.
    fn forget(&self);
    /// Whether a peer says with it that what a call leased is over, or not known to it.
    fn is_at_fault(error: &Error) -> bool;

    /// What a call that did not begin says of the lane. That a shard cannot serve it now says nothing.
    fn note(&self, failure: &Failure) {
        match failure {
            Failure::Unanswered(error) if error.code == Code::Unavailable => self.failed(),
            // A shard that knows what was leased no more, after a restart for instance, has forgotten the rest too.
            Failure::Refused(error) if Self::is_at_fault(error) => self.forget(),
            Failure::Unanswered(_) | Failure::Refused(_) => {}
        }
    }

    /// How a call ended, as the server says.
    fn told<T>(&self, ended: Result<T, Error>) -> Result<T, Error> {
        ended.inspect_err(|error| {
            if Self::is_at_fault(error) {
                self.failed();
            }
        })
    }
}

/// What a call has for itself.
pub(super) trait Leased: Send + Sized + 'static {
    /// The lane that it is of.
    type Way: Way;

    /// For whoever has to tell of a failure after this is gone.
    fn way(&self) -> Arc<Self::Way>;
    /// For the next call: this one ended well, and the peer said that it keeps it.
    fn give_back(self);

    /// For the next call if the server keeps it too.
    fn keep(self, messages: &Messages) {
        if is_kept(messages) {
            self.give_back();
        }
    }
}

/// Whether the server said that it keeps what the call leased.
pub(super) fn is_kept(messages: &Messages) -> bool {
    let kept = messages.trailers().and_then(|trailers| trailers.get(KEPT));
    kept.is_some_and(|kept| kept == KEPT_VALUE)
}

/// Why a call ended that this side reset: for the reason for which it did, unless its caller ended it. `blamed` is the lane, where that
/// reason lies in it.
pub(super) fn instead_of<W: Way>(
    why: Error,
    error: Error,
    blamed: Option<&W>,
    context: &CallContext,
) -> Error {
    if context.cancel.is_cancelled() || error.code == Code::DeadlineExceeded {
        return error;
    }
    if let Some(way) = blamed {
        way.failed();
    }
    why
}

/// Whether the server said how the call ended. Its reason then is the reason, whatever became of what was leased.
pub(super) fn is_told(messages: &Messages) -> bool {
    messages.trailers().is_some_and(|trailers| Status::from_header_map(trailers).is_some())
}

/// The status that ended a call.
pub(super) fn status(context: &CallContext, messages: &Messages) -> Result<(), Error> {
    match messages.trailers().map(Status::from_header_map) {
        Some(Some(status)) if status.code() == tonic::Code::Ok => Ok(()),
        Some(Some(status)) => Err(fault(context, &status)),
        _ => Err(fault(context, &Status::unavailable("the answer ended without a status"))),
    }
}

/// The half of a store stream that ends it.
pub(super) trait Ending: Send + 'static {
    /// Gives back or closes what the call leased, and tells what its caller is told then: nothing after a good end. The next call may begin
    /// when this is done, and is to find what was given back.
    fn end(
        self,
        context: CallContext,
        messages: Messages,
        ended: Result<(), Error>,
    ) -> impl Future<Output = Option<Error>> + Send;
}

/// The acknowledgements of a store stream; then what `ending` makes of how it ended.
pub(super) fn acks<E: Ending>(
    context: CallContext,
    messages: Messages,
    ending: E,
) -> impl Stream<Item = Result<PutAck, Error>> + Send + 'static {
    stream::unfold(Some((context, messages, ending)), |state| async move {
        let (context, mut messages, ending) = state?;
        let ended = match messages.next().await {
            Ok(Some(message)) => {
                let ack = acknowledgement(message);
                let rest = ack.is_ok().then_some((context, messages, ending));
                return Some((ack, rest));
            }
            Ok(None) => status(&context, &messages),
            Err(status) => Err(fault(&context, &status)),
        };
        ending.end(context, messages, ended).await.map(|error| (Err(error), None))
    })
}

/// A read stream under way.
pub(super) trait Reading: Send + Sized + 'static {
    /// What it leased.
    type Lease: Leased;

    /// A tile, or that a block is not held; `None` at the good end.
    fn next(&mut self) -> impl Future<Output = Result<Option<Option<TileMessage>>, Error>> + Send;
    /// After a good end.
    fn into_lease(self) -> (Self::Lease, Messages);
}

/// What a read stream brings, up to its end or the first error.
pub(super) fn answers<R: Reading>(
    reading: R,
) -> impl Stream<Item = Result<Option<TileMessage>, Error>> + Send + 'static {
    stream::unfold(Some(reading), |reading| async move {
        let mut reading = reading?;
        match reading.next().await {
            Ok(Some(answer)) => Some((Ok(answer), Some(reading))),
            Ok(None) => {
                let (lease, messages) = reading.into_lease();
                lease.keep(&messages);
                None
            }
            Err(error) => Some((Err(error), None)),
        }
    })
}
