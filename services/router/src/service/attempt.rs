//! One attempt to go on with a sequence: prefill what the store lacks, then decode on one worker.

use std::collections::HashSet;

use futures::StreamExt as _;
use longshore_cluster::{ClusterView, Member};
use longshore_fabric::{Code, Error as CallError};
use longshore_proto::types::{
    DecodeEvent, DecodeStart, FinishReason, GenerateEvent, Identity, PrefillEvent, PrefillStart,
};
use longshore_routing::{Cost, Phase};

use super::{
    answer::Decoded,
    ended,
    request::{Progress, Request},
    sequence::Sequence,
    workers::Picked,
};
use crate::Error;

/// One attempt at one view of the cluster.
#[derive(Debug)]
pub(crate) struct Attempt<'a> {
    pub(crate) request: &'a Request<'a>,
    pub(crate) view: &'a ClusterView,
    pub(crate) identity: Identity,
}

/// Why an attempt ended without an answer.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The client gets this error.
    Final(Error),
    /// Another attempt can mend it.
    Again(Failure),
}

/// A fault that another attempt can mend.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What happened, naming the worker.
    pub(crate) error: CallError,
    /// A worker that the next attempt should not use.
    pub(crate) exclude: Option<String>,
    /// A decode worker failed, so that another one takes over.
    pub(crate) takeover: bool,
}

impl Attempt<'_> {
    /// Lets prefill workers store every block that is missing; a worker that is away is replaced by the next one.
    pub(crate) async fn prefill(&self, sequence: &Sequence, cached_blocks: u64) -> Result<(), Fault> {
        let missing = sequence.stored_blocks() - cached_blocks;
        if missing == 0 {
            return Ok(());
        }
        let cost = Cost { prefill_tokens: sequence.tokens_of(missing), decode_sequences: 0 };
        let workers = &self.request.inner.workers;
        let mut excluded = HashSet::new();
        let mut last: Option<CallError> = None;
        loop {
            let picked = workers.pick(&self.request.ctx, self.view, Phase::Prefill, &excluded, cost).await;
            let picked = picked.map_err(|error| {
                unplaced(self.no_prefill(error, last.take()), sequence.generated_tokens())
            })?;
            let member = picked.member.clone();
            let Err(error) = self.prefill_on(&picked, sequence, cached_blocks).await? else {
                workers.succeeded(&member);
                return Ok(());
            };
            if let Some(ended) = ended(&self.request.ctx) {
                return Err(Fault::Final(ended));
            }
            match error.code {
                Code::Unavailable | Code::Cancelled | Code::ResourceExhausted => {
                    self.note_failure(&member, &error);
                    tracing::warn!(request = %self.request.ctx.request_id, worker = %member.id, %error, "prefill failed");
                    excluded.insert(member.id);
                    last = Some(error);
                }
                // Cached blocks were evicted meanwhile, or the cluster changed: look again.
                Code::NotFound | Code::DataLoss | Code::FailedPrecondition => {
                    workers.forget(&member);
                    return Err(again(&member, error, false, false));
                }
                _ => return Err(Fault::Final(worker_error(&member, error))),
            }
        }
    }

    /// The outer error is the client's side, the inner one the worker's.
    async fn prefill_on(
        &self,
        picked: &Picked,
        sequence: &Sequence,
        cached_blocks: u64,
    ) -> Result<Result<(), CallError>, Fault> {
        let request = self.request;
        let prompt_tokens = sequence.prompt_tokens();
        let stored_tokens = sequence.tokens_of(request.inner.geometry.stored_blocks(prompt_tokens));
        let start = PrefillStart {
            request_id: request.ctx.request_id.clone(),
            identity: self.identity,
            prompt_tokens: sequence.total_tokens(),
            cached_blocks,
            prefill_policy: request.policy.fingerprint.clone(),
            dense_from: request.policy.dense_from(prompt_tokens, stored_tokens),
            generated_tokens: sequence.generated_tokens(),
        };
        let stream = async {
            let client = request.inner.connector.prefiller(&picked.member.address)?;
            client.prefill(&request.ctx.child(), start, sequence.chunks()).await
        };
        let mut stream = match stream.await {
            Ok(stream) => stream,
            Err(error) => return Ok(Err(error)),
        };
        let mut done = sequence.tokens_of(cached_blocks);
        while let Some(event) = stream.next().await {
            match event {
                Err(error) => return Ok(Err(error)),
                Ok(PrefillEvent::Finished { .. }) => return Ok(Ok(())),
                Ok(PrefillEvent::Progress { done_tokens }) => {
                    let now = done_tokens.clamp(done, sequence.total_tokens());
                    picked.prefilled(now - done);
                    done = now;
                    self.report(sequence, done).await.map_err(Fault::Final)?;
                }
            }
        }
        Ok(Err(CallError::new(Code::Unavailable, "the prefill ended without a result")))
    }

    /// Progress is for the prompt; what a takeover computes again is nobody's progress.
    async fn report(&self, sequence: &Sequence, done_tokens: u64) -> Result<(), Error> {
        if !self.request.start.progress || sequence.generated_tokens() > 0 {
            return Ok(());
        }
        let total_tokens = sequence.prompt_tokens();
        self.request.outlet.send(GenerateEvent::Progress { done_tokens, total_tokens }).await
    }

    /// Generates on one decode worker until the answer ends or the worker fails.
    pub(crate) async fn decode(
        &self,
        progress: &mut Progress,
        excluded: &HashSet<String>,
    ) -> Result<FinishReason, Fault> {
        let picked = self.pick_decode(excluded, progress.generated()).await?;
        let member = picked.member.clone();
        match self.decode_on(&picked, progress).await? {
            Ok(reason) => {
                self.request.inner.workers.succeeded(&member);
                Ok(reason)
            }
            Err(error) => Err(self.decode_fault(&member, error)),
        }
    }

    async fn pick_decode(&self, excluded: &HashSet<String>, generated: u64) -> Result<Picked, Fault> {
        let workers = &self.request.inner.workers;
        let cost = Cost { prefill_tokens: 0, decode_sequences: 1 };
        let first = workers.pick(&self.request.ctx, self.view, Phase::Decode, excluded, cost).await;
        match first {
            // Nobody else is left: a worker that failed may be back, and its handshake tells.
            Err(Error::NoWorker { .. }) if !excluded.is_empty() => {
                let again =
                    workers.pick(&self.request.ctx, self.view, Phase::Decode, &HashSet::new(), cost).await;
                again.map_err(|error| match error {
                    Error::NoWorker { .. } => {
                        Fault::Again(Failure { error: error.into(), exclude: None, takeover: false })
                    }
                    other => unplaced(other, generated),
                })
            }
            other => other.map_err(|error| unplaced(error, generated)),
        }
    }

    async fn decode_on(
        &self,
        picked: &Picked,
        progress: &mut Progress,
    ) -> Result<Result<FinishReason, CallError>, Fault> {
        let request = self.request;
        let start = self.decode_start(progress);
        let stream = async {
            let client = request.inner.connector.decoder(&picked.member.address)?;
            client.decode(&request.ctx.child(), start, progress.sequence.chunks()).await
        };
        let mut stream = match stream.await {
            Ok(stream) => stream,
            Err(error) => return Ok(Err(error)),
        };
        while let Some(event) = stream.next().await {
            let (token_id, logprob, top) = match event {
                Err(error) => return Ok(Err(error)),
                Ok(DecodeEvent::Finished { stopped, visited_blocks, causal_blocks }) => {
                    progress.visits = (visited_blocks, causal_blocks);
                    return Ok(Ok(if stopped { FinishReason::Stop } else { FinishReason::Length }));
                }
                Ok(DecodeEvent::Token { token_id, logprob, top }) => (token_id, logprob, top),
            };
            if progress.generated() >= progress.max_tokens() {
                return Ok(Ok(FinishReason::Length));
            }
            if token_id >= request.inner.limits.vocabulary {
                return Ok(Err(CallError::new(Code::Internal, format!("token id {token_id} is no token"))));
            }
            let decoded = Decoded { token_id, logprob, top };
            if request.token(progress, decoded).await.map_err(Fault::Final)? {
                return Ok(Ok(FinishReason::Stop));
            }
        }
        Ok(Err(CallError::new(Code::Unavailable, "the decode ended without a result")))
    }

    fn decode_start(&self, progress: &Progress) -> DecodeStart {
        let request = self.request;
        let ends = request.inner.model.tokenizer.eos_ids();
        DecodeStart {
            request_id: request.ctx.request_id.clone(),
            identity: self.identity,
            prompt_tokens: progress.sequence.prompt_tokens(),
            generated_tokens: progress.generated(),
            sampling: progress.sampling.clone(),
            stop_token_ids: if progress.sampling.ignore_eos { Vec::new() } else { ends.to_vec() },
            prefill_policy: request.policy.in_answers().to_owned(),
        }
    }

    fn decode_fault(&self, member: &Member, error: CallError) -> Fault {
        if let Some(ended) = ended(&self.request.ctx) {
            return Fault::Final(ended);
        }
        match error.code {
            // A worker that cancels by itself stops.
            Code::Unavailable | Code::Cancelled => {
                self.note_failure(member, &error);
                again(member, error, true, true)
            }
            // It is alive and has no room, so that nothing fell over.
            Code::ResourceExhausted => again(member, error, true, false),
            Code::FailedPrecondition => {
                self.request.inner.workers.forget(member);
                again(member, error, true, true)
            }
            // Blocks are missing or damaged, which is not the worker's fault.
            Code::NotFound | Code::DataLoss => again(member, error, false, false),
            _ => Fault::Final(worker_error(member, error)),
        }
    }

    /// A worker that is full is alive; only one that is away is avoided.
    fn note_failure(&self, member: &Member, error: &CallError) {
        if error.code != Code::ResourceExhausted {
            self.request.inner.workers.failed(member);
        }
    }

    /// The error of a prefill that nobody is left to do.
    fn no_prefill(&self, error: Error, last: Option<CallError>) -> Error {
        match (error, last) {
            (Error::NoWorker { role, retry_after, .. }, Some(last))
                if last.code == Code::ResourceExhausted =>
            {
                let retry_after = last.retry_after.unwrap_or(retry_after);
                Error::WorkersBusy { role, last: Some(last.to_string()), retry_after }
            }
            (Error::WorkersBusy { role, last: None, retry_after }, Some(last)) => {
                Error::WorkersBusy { role, last: Some(last.to_string()), retry_after }
            }
            (Error::NoWorker { role, retry_after, why }, Some(last)) => {
                Error::NoWorker { role, retry_after, why: format!("{why}, the last with: {last}") }
            }
            (error, _) => error,
        }
    }
}

/// No worker may be used. Before the first token a busy cluster refuses at once; an answer under way waits for room.
fn unplaced(error: Error, generated: u64) -> Fault {
    match error {
        Error::WorkersBusy { .. } if generated > 0 => {
            Fault::Again(Failure { error: error.into(), exclude: None, takeover: false })
        }
        other => Fault::Final(other),
    }
}

fn again(member: &Member, error: CallError, exclude: bool, takeover: bool) -> Fault {
    Fault::Again(Failure {
        error: named(member, error),
        exclude: exclude.then(|| member.id.clone()),
        takeover,
    })
}

/// A fault that no other worker would mend.
fn worker_error(member: &Member, error: CallError) -> Error {
    match error.code {
        // The deadline is the request's own.
        Code::DeadlineExceeded => Error::Deadline,
        _ => {
            let field = error.field.as_deref().map(client_field).map(str::to_owned);
            Error::Worker(named(member, CallError { field, ..error }))
        }
    }
}

/// What clients call a field of a prefill.
fn client_field(field: &str) -> &str {
    match field {
        "start.prefill_policy" => "prefill_policy",
        "start.prompt_tokens" => "prompt",
        other => other,
    }
}

/// The same error naming the worker.
fn named(member: &Member, error: CallError) -> CallError {
    CallError { message: format!("{} worker `{}`: {}", member.role, member.id, error.message), ..error }
}
