//! What a worker checks before it takes a request: identity, limits, and the tokens as they arrive.

use std::sync::Arc;

use longshore_blocks::Deployment;
use longshore_fabric::{CallContext, Code, Error};
use longshore_proto::types::Identity;
use tokio::sync::mpsc::{self, error::TryRecvError};

use crate::{Engine, ShardDirectory};

/// Token ids that one chunk may carry.
const CHUNK_TOKENS_MAX: usize = 65_536;

/// Closes the queue of a worker that stops and takes all that is in it, also what somebody is about to put there, who has a place already: it
/// would go without a last word. For threads that may wait.
pub fn close_queue<T>(queue: &mut mpsc::Receiver<T>, mut take: impl FnMut(T)) {
    queue.close();
    loop {
        match queue.try_recv() {
            Ok(work) => take(work),
            Err(TryRecvError::Empty) => std::thread::yield_now(),
            Err(TryRecvError::Disconnected) => return,
        }
    }
}

/// What a worker works with.
#[derive(Debug, Clone)]
pub struct WorkerParts {
    /// Model and shapes.
    pub engine: Arc<Engine>,
    /// The shards.
    pub shards: Arc<ShardDirectory>,
    /// What the deployment accepts.
    pub limits: Limits,
}

/// What a deployment accepts.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// What the KV of this process depends on.
    pub deployment: Deployment,
    /// Positions of a sequence, prompt and answer together.
    pub context_tokens: u64,
    /// Entries of the vocabulary.
    pub vocabulary: u32,
}

impl Limits {
    /// Refuses a caller of another deployment or epoch.
    pub fn check_identity(&self, identity: &Identity, epoch: u64) -> Result<(), Error> {
        let mismatch = |field: &str, message: String| {
            Err(Error::new(Code::FailedPrecondition, format!("`{field}` {message}")).with_field(field))
        };
        if identity.deployment != self.deployment {
            let message = format!(
                "is {:?}, this process serves {:?}; hint: start all processes with the same model and KV settings",
                identity.deployment, self.deployment
            );
            return mismatch("identity.deployment", message);
        }
        if identity.shard_map_epoch != epoch {
            let message = format!("is {}, this process sees {epoch}; hint: retry", identity.shard_map_epoch);
            return mismatch("identity.shard_map_epoch", message);
        }
        Ok(())
    }

    /// Refuses an empty sequence and one beyond the context.
    pub fn check_length(&self, field: &str, tokens: u64) -> Result<(), Error> {
        if tokens == 0 {
            return Err(Error::invalid(field, "is 0, must be at least 1"));
        }
        if tokens > self.context_tokens {
            let message = format!(
                "`{field}` is {tokens}, the limit is {}; hint: raise `max_context_tokens`",
                self.context_tokens
            );
            return Err(Error::new(Code::OutOfRange, message).with_field(field));
        }
        Ok(())
    }
}

/// Collects the tokens of one request.
#[derive(Debug)]
pub struct TokenIntake {
    limits: Limits,
    expected: usize,
    tokens: Vec<u32>,
}

impl TokenIntake {
    /// An intake of `expected` tokens, whose length was checked.
    pub fn new(limits: Limits, expected: u64) -> Self {
        Self { limits, expected: expected as usize, tokens: Vec::new() }
    }

    /// Reads `chunks` until they end and checks every id and the count.
    pub async fn collect(
        mut self,
        ctx: &CallContext,
        mut chunks: mpsc::Receiver<Vec<u32>>,
    ) -> Result<Vec<u32>, Error> {
        while self.tokens.len() < self.expected {
            let chunk = within(ctx, chunks.recv()).await?;
            let Some(chunk) = chunk else { break };
            self.push(&chunk)?;
        }
        // A caller need not close its side to get its answer; what came already is held against the count.
        while let Ok(chunk) = chunks.try_recv() {
            self.push(&chunk)?;
        }
        if self.tokens.len() < self.expected {
            let problem = format!("ended after {} of {} tokens", self.tokens.len(), self.expected);
            return Err(Error::invalid("tokens", problem));
        }
        Ok(self.tokens)
    }

    fn push(&mut self, chunk: &[u32]) -> Result<(), Error> {
        if chunk.len() > CHUNK_TOKENS_MAX {
            let problem = format!("has {} ids, at most {CHUNK_TOKENS_MAX} fit one chunk", chunk.len());
            return Err(Error::invalid("tokens.token_ids", problem));
        }
        if self.tokens.len() + chunk.len() > self.expected {
            return Err(Error::invalid("tokens", format!("are more than the {} announced", self.expected)));
        }
        if let Some(id) = chunk.iter().find(|&&id| id >= self.limits.vocabulary) {
            let problem = format!("contains `{id}`, the vocabulary ends before {}", self.limits.vocabulary);
            return Err(Error::invalid("tokens.token_ids", problem));
        }
        self.tokens.extend_from_slice(chunk);
        Ok(())
    }
}

/// Runs `future` until the caller goes away or the deadline passes.
pub async fn within<F: Future>(ctx: &CallContext, future: F) -> Result<F::Output, Error> {
    let deadline = async {
        match ctx.deadline {
            Some(deadline) => tokio::time::sleep_until(deadline).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        () = ctx.cancel.cancelled() => Err(Error::new(Code::Cancelled, "the caller went away")),
        output = future => Ok(output),
        () = deadline => Err(Error::new(Code::DeadlineExceeded, "the deadline passed")),
    }
}
