//! One request from its prompt to its last token: look up, prefill what is missing, decode, and begin again with another
//! worker when one fails. The client sees one stream.

use std::{collections::HashSet, sync::Arc, time::Duration};

use longshore_blocks::Namespace;
use longshore_cluster::{ClusterView, Role};
use longshore_fabric::{CallContext, Code};
use longshore_proto::types::{
    FinishReason, Finished, GenerateEvent, GenerateStart, Identity, PromptChunk, Sampling, ShardBytes,
    TextTokens,
};
use longshore_routing::placement_bytes;
use tokio::{sync::mpsc, time::Instant};

use super::{
    Inner,
    admission::Place,
    answer::{Answer, Decoded},
    attempt::{Attempt, Failure, Fault},
    ended, lookup,
    outlet::Outlet,
    prompt,
    sequence::Sequence,
};
use crate::{Error, PolicyLabel, policies::Chosen};

/// Tokens of an answer when the client does not say.
const DEFAULT_MAX_TOKENS: u64 = 256;
/// Prompts above this size are tokenized and hashed on a blocking thread, in bytes or token ids.
const INLINE_MAX: usize = 4_096;

/// One request on its way.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) inner: &'a Arc<Inner>,
    /// Context of the calls to shards and workers.
    pub(crate) ctx: CallContext,
    pub(crate) start: GenerateStart,
    /// How the prompt is prefilled; later attempts keep it.
    pub(crate) policy: Chosen,
    pub(crate) outlet: &'a Outlet,
}

/// What a request came to, besides its answer.
#[derive(Debug)]
pub(crate) struct Progress {
    /// Prompt and answer so far.
    pub(crate) sequence: Sequence,
    /// Text side of the answer.
    pub(crate) answer: Answer,
    /// Parameters for the decode workers, all defaults filled in.
    pub(crate) sampling: Sampling,
    /// Prompt tokens found in the cluster at the first lookup.
    cached_tokens: u64,
    prompt_read: Instant,
    first_token: Option<Duration>,
    last_token: Option<Instant>,
    resumed: u32,
    /// Blocks that the answer visited, and that exact attention would have, as the last decode worker says.
    pub(crate) visits: (u64, u64),
}

/// Failed attempts since the answer last went on by a block.
#[derive(Debug, Default)]
struct Retries {
    failures: u32,
    generated_at_reset: u64,
    /// Decode workers that failed this request.
    excluded: HashSet<String>,
}

impl Request<'_> {
    /// Runs the request; the last event is sent unless it fails.
    pub(crate) async fn run(&self, mut chunks: mpsc::Receiver<PromptChunk>) -> Result<FinishReason, Error> {
        let place = Arc::new(self.inner.admission.admit().await?);
        let idle = Duration::from_millis(self.inner.config.prompt_idle_ms);
        let prompt = prompt::read(&mut chunks, &self.inner.limits, idle).await?;
        let prompt_read = Instant::now();
        let sequence = self.sequence(prompt, &place).await?;
        self.inner.limits.check_tokens(sequence.prompt_tokens())?;
        let mut progress = Progress {
            sampling: self.sampling(sequence.prompt_tokens()),
            sequence,
            answer: Answer::new(Arc::clone(&self.inner.model), self.start.stop.clone()),
            cached_tokens: 0,
            prompt_read,
            first_token: None,
            last_token: None,
            resumed: 0,
            visits: (0, 0),
        };
        let reason = self.attempts(&mut progress).await?;
        let reason = self.flush(&mut progress, reason).await?;
        let finished = self.finished(&progress, reason);
        self.outlet.send(GenerateEvent::Finished(finished)).await?;
        Ok(reason)
    }

    async fn sequence(
        &self,
        prompt: longshore_proto::types::Prompt,
        place: &Arc<Place>,
    ) -> Result<Sequence, Error> {
        let size = match &prompt {
            longshore_proto::types::Prompt::Text(text) => text.len(),
            longshore_proto::types::Prompt::Tokens(ids) => ids.len(),
            longshore_proto::types::Prompt::Chat(messages) => {
                messages.iter().map(|m| m.content.len() + 1).sum()
            }
        };
        let namespace = self.namespace();
        let (geometry, skip) = (self.inner.geometry, self.start.skip_special_tokens);
        let (inner, place) = (Arc::clone(self.inner), Arc::clone(place));
        let work = move || {
            // On a blocking thread this goes on when the request is dropped, and so does its claim to a place.
            let _place = place;
            let tokens = prompt::tokenize(&inner.model, prompt, skip)?;
            inner.limits.check_tokens(tokens.len() as u64)?;
            Ok(Sequence::new(namespace, geometry, tokens))
        };
        if size <= INLINE_MAX {
            return work();
        }
        let joined = self.inner.tasks.tracker().spawn_blocking(work).await;
        joined.map_err(|error| Error::Internal(format!("tokenizing failed: {error}")))?
    }

    /// Fills in what the client left open. An explicit `max_tokens` beyond the context is clipped as well: the answer then
    /// ends with reason `length`, as it would have when the context ended.
    fn sampling(&self, prompt_tokens: u64) -> Sampling {
        let room = self.inner.limits.context_tokens.saturating_sub(prompt_tokens);
        let wanted = self.start.sampling.max_tokens.map_or(DEFAULT_MAX_TOKENS, u64::from);
        let max_tokens = u32::try_from(wanted.min(room)).unwrap_or(u32::MAX);
        let seed = self.start.sampling.seed.unwrap_or_else(|| self.inner.ids.seed());
        Sampling { max_tokens: Some(max_tokens), seed: Some(seed), ..self.start.sampling.clone() }
    }

    async fn attempts(&self, progress: &mut Progress) -> Result<FinishReason, Error> {
        let mut retries = Retries::default();
        let mut accepted = false;
        loop {
            if progress.generated() >= progress.max_tokens() {
                return Ok(FinishReason::Length);
            }
            let view = self.inner.view();
            let failure = match self.attempt(&view, progress, &retries.excluded, &mut accepted).await {
                Ok(reason) => return Ok(reason),
                Err(Fault::Final(error)) => return Err(error),
                Err(Fault::Again(failure)) => failure,
            };
            // A worker that saw the client go before this task did is no failed worker.
            if let Some(ended) = ended(&self.ctx) {
                return Err(ended);
            }
            self.note(&failure, progress, &mut retries)?;
            tokio::time::sleep(self.pause(&view, &failure, progress, &mut retries)).await;
        }
    }

    /// How long to wait before the next attempt. When an answer is under way and nobody has room for it, as long as the
    /// workers ask for; then all of them are asked again.
    fn pause(
        &self,
        view: &ClusterView,
        failure: &Failure,
        progress: &Progress,
        retries: &mut Retries,
    ) -> Duration {
        let pause = self.inner.config.retry_backoff_ms << (retries.failures - 1).min(10);
        let pause = Duration::from_millis(pause);
        if failure.error.code != Code::ResourceExhausted || progress.generated() == 0 {
            return pause;
        }
        let others = view.with_role(Role::Decode).any(|member| !retries.excluded.contains(&member.id));
        if failure.exclude.is_some() && others {
            return pause;
        }
        retries.excluded.clear();
        pause.max(failure.error.retry_after.unwrap_or_default())
    }

    async fn attempt(
        &self,
        view: &ClusterView,
        progress: &mut Progress,
        excluded: &HashSet<String>,
        accepted: &mut bool,
    ) -> Result<FinishReason, Fault> {
        let inner = self.inner;
        let identity = self.identity(view);
        let cached = lookup::cached_blocks(&self.ctx, inner, view, identity, &progress.sequence);
        let cached = cached.await.map_err(Fault::Final)?;
        if !*accepted {
            self.accept(progress, cached).await.map_err(Fault::Final)?;
            *accepted = true;
        }
        let attempt = Attempt { request: self, view, identity };
        attempt.prefill(&progress.sequence, cached).await?;
        attempt.decode(progress, excluded).await
    }

    /// Root of the block keys of this request: lookups, placement and later attempts follow from it.
    fn namespace(&self) -> Namespace {
        self.inner.deployment.namespace(&self.policy.fingerprint, &self.start.cache_salt)
    }

    fn identity(&self, view: &ClusterView) -> Identity {
        Identity {
            deployment: self.inner.deployment,
            namespace: self.namespace(),
            shard_map_epoch: view.epoch(),
        }
    }

    async fn accept(&self, progress: &mut Progress, cached_blocks: u64) -> Result<(), Error> {
        let metrics = &self.inner.metrics;
        progress.cached_tokens = progress.sequence.tokens_of(cached_blocks);
        metrics.prefill_policy.get_or_create(&PolicyLabel { policy: self.policy.name.clone() }).inc();
        metrics.prompt_tokens.inc_by(progress.sequence.prompt_tokens());
        metrics.cached_tokens.inc_by(progress.cached_tokens);
        let accepted = GenerateEvent::Accepted {
            request_id: self.ctx.request_id.clone(),
            prompt_tokens: progress.sequence.prompt_tokens(),
            cached_tokens: progress.cached_tokens,
            model: self.inner.limits.model.clone(),
            prefill_policy: self.policy.fingerprint.clone(),
        };
        self.outlet.send(accepted).await
    }

    /// Counts a failed attempt; the last allowed one becomes the client's error.
    fn note(&self, failure: &Failure, progress: &mut Progress, retries: &mut Retries) -> Result<(), Error> {
        let generated = progress.generated();
        if generated - retries.generated_at_reset >= u64::from(self.inner.geometry.block_tokens()) {
            *retries = Retries { generated_at_reset: generated, ..Retries::default() };
        }
        retries.failures += 1;
        if failure.takeover {
            progress.resumed += 1;
            self.inner.metrics.resumes.inc();
        }
        retries.excluded.extend(failure.exclude.clone());
        tracing::warn!(
            request = %self.ctx.request_id, generated, failures = retries.failures, error = %failure.error,
            "attempt failed"
        );
        if retries.failures <= self.inner.config.retries_max {
            return Ok(());
        }
        let retry_after = self.inner.config.retry_after();
        Err(match failure.error.code {
            // No worker was asked.
            Code::ResourceExhausted if failure.exclude.is_none() => Error::Worker(failure.error.clone()),
            Code::ResourceExhausted => {
                Error::WorkersBusy { role: "decode", last: Some(failure.error.to_string()), retry_after }
            }
            _ => Error::GaveUp { attempts: retries.failures, last: failure.error.to_string(), retry_after },
        })
    }

    /// Sends the text that was held back.
    async fn flush(&self, progress: &mut Progress, reason: FinishReason) -> Result<FinishReason, Error> {
        if progress.answer.stopped() {
            return Ok(reason);
        }
        let rest = progress.answer.finish();
        if !rest.text.is_empty() {
            let tokens = TextTokens { text: rest.text, token_ids: Vec::new(), logprobs: Vec::new() };
            self.outlet.send(GenerateEvent::Tokens(tokens)).await?;
        }
        Ok(if rest.stopped { FinishReason::Stop } else { reason })
    }

    /// Takes a decoded token; true when it completed a stop string.
    pub(crate) async fn token(&self, progress: &mut Progress, decoded: Decoded) -> Result<bool, Error> {
        let (now, metrics) = (Instant::now(), &self.inner.metrics);
        match progress.last_token.replace(now) {
            Some(last) => metrics.inter_token_seconds.observe((now - last).as_secs_f64()),
            None => {
                let took = now - progress.prompt_read;
                metrics.first_token_seconds.observe(took.as_secs_f64());
                progress.first_token = Some(took);
            }
        }
        metrics.generated_tokens.inc();
        progress.sequence.push(decoded.token_id);
        let (tokens, stopped) = progress.answer.push(decoded);
        self.outlet.send(GenerateEvent::Tokens(tokens)).await?;
        Ok(stopped)
    }

    fn finished(&self, progress: &Progress, reason: FinishReason) -> Finished {
        let map = self.inner.view().shard_map();
        let blocks = progress.sequence.stored_blocks();
        let placement = placement_bytes(progress.sequence.chain(), &map, blocks, self.inner.block_bytes);
        Finished {
            reason,
            prompt_tokens: progress.sequence.prompt_tokens(),
            cached_tokens: progress.cached_tokens,
            completion_tokens: progress.generated(),
            time_to_first_token_ms: progress.first_token.map_or(0.0, |took| took.as_secs_f64() * 1e3),
            placement: placement
                .into_iter()
                .map(|(shard, kv_bytes)| ShardBytes { shard_id: shard.0, kv_bytes })
                .collect(),
            resumed: progress.resumed,
            visited_blocks: progress.visits.0,
            causal_blocks: progress.visits.1,
        }
    }
}

impl Progress {
    /// Tokens of the answer so far.
    pub(crate) fn generated(&self) -> u64 {
        self.sequence.generated_tokens()
    }

    /// Tokens that the answer may have.
    pub(crate) fn max_tokens(&self) -> u64 {
        u64::from(self.sampling.max_tokens.expect("filled in when the prompt was read"))
    }
}
