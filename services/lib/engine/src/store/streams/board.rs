//! Acknowledgements as the streams brought them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use longshore_blocks::BlockKey;
use longshore_proto::types::{PutAck, PutOutcome};

use crate::Error;

/// What the shards acknowledged so far. It holds an entry per copy of each block of one request, so that taking an
/// acknowledgement never waits for the engine, which may itself be waiting to send.
#[derive(Debug, Clone, Default)]
pub(super) struct AckBoard {
    state: Arc<Mutex<Board>>,
}

#[derive(Debug, Default)]
struct Board {
    outcomes: HashMap<(usize, BlockKey), PutOutcome>,
    /// By shard: why it will acknowledge nothing more.
    failures: HashMap<usize, Error>,
    /// The first block that found no room, and its shard.
    refused: Option<(usize, BlockKey)>,
}

impl AckBoard {
    /// Outcome of a block on a shard, `None` while it is under way; the failure of the shard's stream when there was one.
    pub(super) fn outcome(&self, shard: usize, key: &BlockKey) -> Result<Option<PutOutcome>, Error> {
        let board = self.lock();
        match (board.outcomes.get(&(shard, *key)), board.failures.get(&shard)) {
            (Some(&outcome), _) => Ok(Some(outcome)),
            (None, Some(failure)) => Err(failure.clone()),
            (None, None) => Ok(None),
        }
    }

    /// The first (shard, block) that found no room.
    pub(super) fn refused(&self) -> Option<(usize, BlockKey)> {
        self.lock().refused
    }

    pub(super) fn note(&self, shard: usize, ack: &PutAck) {
        let mut board = self.lock();
        board.outcomes.insert((shard, ack.key), ack.outcome);
        if ack.outcome == PutOutcome::NoSpace {
            board.refused.get_or_insert((shard, ack.key));
        }
    }

    pub(super) fn fail(&self, shard: usize, error: Error) {
        self.lock().failures.entry(shard).or_insert(error);
    }

    fn lock(&self) -> MutexGuard<'_, Board> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
