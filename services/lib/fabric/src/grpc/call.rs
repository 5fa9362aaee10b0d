//! One outgoing call: metadata out, deadline and cancellation around it, errors and answers checked on the way back.

use std::future::Future;

use futures::{Stream, StreamExt};
use longshore_proto::{WireError, types::CHUNK_TOKENS_MAX};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, metadata::MetadataValue};

use super::over::until;
use crate::{
    BoxStream, CallContext, Code, Error,
    lane::{self, Hop},
    server::{REQUEST_ID, TRACEPARENT},
    status::from_status,
};

/// A request that carries deadline, name and trace of `context`.
pub(super) fn request<M>(context: &CallContext, message: M) -> Result<Request<M>, Error> {
    let mut request = Request::new(message);
    if let Some(left) = context.time_left() {
        request.set_timeout(left);
    }
    let texts =
        [(REQUEST_ID, Some(context.request_id.as_str())), (TRACEPARENT, context.traceparent.as_deref())];
    for (key, text) in texts {
        if let Some(text) = text.filter(|text| !text.is_empty()) {
            let value =
                MetadataValue::try_from(text).map_err(|_| Error::invalid(key, "must be printable ASCII"))?;
            request.metadata_mut().insert(key, value);
        }
    }
    Ok(request)
}

/// Makes a call with a single answer. Dropping or cancelling it resets its stream, which the server notices.
pub(super) async fn unary<T>(
    context: &CallContext,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Error> {
    let call = async { call.await.map_err(|status| fault(context, &status)) };
    Ok(lane::within(context, call).await?.into_inner())
}

/// Makes a call with a stream of answers; `convert` checks each.
pub(super) async fn streaming<M, T>(
    hop: Hop,
    call: impl Future<Output = Result<Response<Streaming<M>>, Status>>,
    convert: impl Fn(M) -> Result<T, WireError> + Send + 'static,
) -> Result<BoxStream<T>, Error>
where
    M: Send + 'static,
    T: Send + 'static,
{
    let answers = unary(&hop.context, call).await?;
    let context = hop.context.clone();
    let answers = answers.map(move |answer| {
        let message = answer.map_err(|status| fault(&context, &status))?;
        convert(message).map_err(|fault| Error::bad_answer(&fault))
    });
    Ok(hop.bound(Box::pin(answers)))
}

/// The transport calls its own timer a cancellation; it is the deadline that we sent along.
pub(super) fn fault(context: &CallContext, status: &Status) -> Error {
    let error = from_status(status);
    let late = context.time_left().is_some_and(|left| left.is_zero());
    let reset = matches!(error.code, Code::Cancelled | Code::Unavailable);
    if late && reset && !context.cancel.is_cancelled() { lane::deadline_exceeded() } else { error }
}

/// The messages of a request stream: `start`, then what comes out of `items`. Ends with the call.
pub(super) fn messages<T, M>(
    context: &CallContext,
    start: Option<M>,
    items: mpsc::Receiver<T>,
    convert: impl Fn(T) -> Vec<M> + Send + 'static,
) -> impl Stream<Item = M> + Send + 'static
where
    T: Send + 'static,
    M: Send + 'static,
{
    let items = ReceiverStream::new(items).flat_map(move |item| futures::stream::iter(convert(item)));
    until(context.cancel.clone(), futures::stream::iter(start).chain(items))
}

/// Cuts token ids into chunks that a message may carry.
pub(super) fn token_chunks(token_ids: Vec<u32>) -> Vec<Vec<u32>> {
    if token_ids.len() <= CHUNK_TOKENS_MAX {
        return vec![token_ids];
    }
    token_ids.chunks(CHUNK_TOKENS_MAX).map(<[u32]>::to_vec).collect()
}

/// Cuts text into pieces of at most `limit` bytes, never inside a character.
pub(super) fn text_pieces(text: String, limit: usize) -> Vec<String> {
    if text.len() <= limit {
        return vec![text];
    }
    let mut pieces = Vec::with_capacity(text.len() / limit + 1);
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (piece, later) = rest.split_at(rest.floor_char_boundary(limit).max(1));
        pieces.push(piece.to_owned());
        rest = later;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_never_cut_inside_a_character() {
        let text = "aé漢🙂".repeat(50);
        for limit in 4..40 {
            let pieces = text_pieces(text.clone(), limit);
            assert!(pieces.iter().all(|piece| !piece.is_empty() && piece.len() <= limit), "limit {limit}");
            assert_eq!(pieces.concat(), text);
        }
        assert_eq!(text_pieces(String::new(), 4), [""]);
    }

    #[test]
    fn tokens_are_cut_at_the_limit() {
        let lengths = |count| token_chunks(vec![7; count]).iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(lengths(0), [0]);
        assert_eq!(lengths(65_536), [65_536]);
        assert_eq!(lengths(65_537), [65_536, 1]);
        assert_eq!(lengths(1_000_000).iter().sum::<usize>(), 1_000_000);
    }

    #[test]
    fn metadata_that_cannot_travel_is_refused_by_name() {
        let context = CallContext::new("line\nbreak");
        let error = request(&context, ()).unwrap_err();
        assert_eq!(error.field.as_deref(), Some("x-request-id"));
    }
}
