//! Reads request bodies within limits: of one body, of all bodies together, and of a client's patience.

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{HeaderMap, header},
};
use futures::StreamExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;
use crate::HttpConfig;

/// Bytes that one permit of the budget stands for.
const BUDGET_UNIT_BYTES: u64 = 1_024;
/// What a client is told to wait when the budget is used up.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Room for request bodies.
#[derive(Debug)]
pub(crate) struct Bodies {
    body_max_bytes: u64,
    idle: Duration,
    budget: Arc<Semaphore>,
}

/// A body and its share of the budget.
#[derive(Debug)]
pub(crate) struct ReadBody {
    /// The bytes.
    pub(crate) bytes: Vec<u8>,
    /// Held as long as what was made of the bytes is in memory.
    pub(crate) room: Option<OwnedSemaphorePermit>,
}

impl Bodies {
    pub(crate) fn new(config: &HttpConfig) -> Self {
        let units = (config.bodies_max_bytes / BUDGET_UNIT_BYTES).min(Semaphore::MAX_PERMITS as u64);
        Self {
            body_max_bytes: config.body_max_bytes,
            idle: Duration::from_millis(config.body_idle_ms),
            budget: Arc::new(Semaphore::new(units as usize)),
        }
    }

    /// Reads a whole body. One that is too large is read on for a while and thrown away, because a client that is still
    /// writing would not see the answer.
    pub(crate) async fn read(&self, headers: &HeaderMap, body: Body) -> Result<ReadBody, ApiError> {
        let announced =
            headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let mut stream = body.into_data_stream();
        let mut read = ReadBody { bytes: Vec::new(), room: None };
        if announced.is_some_and(|bytes: u64| bytes > self.body_max_bytes) {
            return self.refuse(stream).await;
        }
        while let Some(chunk) = self.next(&mut stream).await? {
            if (read.bytes.len() + chunk.len()) as u64 > self.body_max_bytes {
                drop(read);
                return self.refuse(stream).await;
            }
            self.reserve(&mut read.room, read.bytes.len() + chunk.len())?;
            read.bytes.extend_from_slice(&chunk);
        }
        Ok(read)
    }

    async fn next<S>(&self, stream: &mut S) -> Result<Option<Bytes>, ApiError>
    where
        S: futures::Stream<Item = Result<Bytes, axum::Error>> + Unpin,
    {
        match tokio::time::timeout(self.idle, stream.next()).await {
            Ok(Some(Ok(chunk))) => Ok(Some(chunk)),
            Ok(Some(Err(error))) => Err(ApiError::body_broken(&error.to_string())),
            Ok(None) => Ok(None),
            Err(_) => Err(ApiError::body_stalled(self.idle)),
        }
    }

    async fn refuse<S>(&self, mut stream: S) -> Result<ReadBody, ApiError>
    where
        S: futures::Stream<Item = Result<Bytes, axum::Error>> + Unpin,
    {
        let mut thrown_away = 0;
        while thrown_away < self.body_max_bytes.saturating_mul(2) {
            match self.next(&mut stream).await {
                Ok(Some(chunk)) => thrown_away += chunk.len() as u64,
                _ => break,
            }
        }
        Err(ApiError::body_too_large(self.body_max_bytes))
    }

    /// Grows the share of the budget to `bytes`.
    fn reserve(&self, room: &mut Option<OwnedSemaphorePermit>, bytes: usize) -> Result<(), ApiError> {
        let needed = (bytes as u64).div_ceil(BUDGET_UNIT_BYTES) as usize;
        let more = needed.saturating_sub(room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits));
        if more == 0 {
            return Ok(());
        }
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        let grown = Arc::clone(&self.budget).try_acquire_many_owned(more);
        let grown = grown.map_err(|_| ApiError::no_room_for_body(RETRY_AFTER))?;
        match room {
            Some(room) => room.merge(grown),
            None => *room = Some(grown),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse as _;

    use super::*;

    fn bodies(body_max_bytes: u64, bodies_max_bytes: u64, body_idle_ms: u64) -> Bodies {
        Bodies::new(&HttpConfig { body_max_bytes, bodies_max_bytes, body_idle_ms, ..HttpConfig::default() })
    }

    async fn status(bodies: &Bodies, body: Body) -> u16 {
        match bodies.read(&HeaderMap::new(), body).await {
            Ok(_) => 200,
            Err(error) => error.into_response().status().as_u16(),
        }
    }

    #[tokio::test]
    async fn counts_bytes_that_no_header_announced() {
        let bodies = bodies(2_000, 10_000, 1_000);
        assert_eq!(status(&bodies, Body::from(vec![b' '; 2_000])).await, 200);
        assert_eq!(status(&bodies, Body::from(vec![b' '; 2_001])).await, 413);
    }

    #[tokio::test]
    async fn all_bodies_share_one_budget() {
        let bodies = bodies(2_048, 3_072, 1_000);
        let first = bodies.read(&HeaderMap::new(), Body::from(vec![b' '; 2_048])).await.unwrap();
        assert_eq!(status(&bodies, Body::from(vec![b' '; 1_025])).await, 429);
        drop(first);
        assert_eq!(status(&bodies, Body::from(vec![b' '; 1_025])).await, 200);
    }

    #[tokio::test]
    async fn gives_up_on_a_body_that_does_not_arrive() {
        let endless = futures::stream::pending::<Result<Bytes, std::io::Error>>();
        assert_eq!(status(&bodies(2_048, 3_072, 5), Body::from_stream(endless)).await, 408);
    }
}
