//! Checked conversions of what clients get.

use super::{FinishReason, Finished, GenerateEvent, ShardBytes, TextTokens, TokenChoice, TokenLogprob};
use crate::{WireError, types::check, v1};

impl TryFrom<v1::TokenLogprob> for TokenLogprob {
    type Error = WireError;

    fn try_from(wire: v1::TokenLogprob) -> Result<Self, WireError> {
        Ok(Self { token_id: wire.token_id, logprob: check::logprob(wire.logprob, "logprob")? })
    }
}

impl From<TokenLogprob> for v1::TokenLogprob {
    fn from(token: TokenLogprob) -> Self {
        Self { token_id: token.token_id, logprob: token.logprob }
    }
}

impl TryFrom<v1::TokenChoice> for TokenChoice {
    type Error = WireError;

    fn try_from(wire: v1::TokenChoice) -> Result<Self, WireError> {
        if wire.top.len() != wire.top_text.len() {
            let problem = format!("has {} entries for {} tokens", wire.top_text.len(), wire.top.len());
            return Err(WireError::invalid("top_text", problem));
        }
        let top: Vec<TokenLogprob> = check::each(wire.top, "top")?;
        Ok(Self {
            chosen: check::required(wire.chosen, "chosen")?,
            text: wire.text,
            top: top.into_iter().zip(wire.top_text).collect(),
        })
    }
}

impl From<TokenChoice> for v1::TokenChoice {
    fn from(choice: TokenChoice) -> Self {
        let (top, top_text) =
            choice.top.into_iter().map(|(token, text)| (v1::TokenLogprob::from(token), text)).unzip();
        Self { chosen: Some(choice.chosen.into()), top, text: choice.text, top_text }
    }
}

impl TryFrom<v1::GeneratedTokens> for TextTokens {
    type Error = WireError;

    fn try_from(wire: v1::GeneratedTokens) -> Result<Self, WireError> {
        if !wire.logprobs.is_empty() && wire.logprobs.len() != wire.token_ids.len() {
            let problem = format!("has {} entries for {} tokens", wire.logprobs.len(), wire.token_ids.len());
            return Err(WireError::invalid("logprobs", problem));
        }
        Ok(Self {
            text: wire.text,
            token_ids: wire.token_ids,
            logprobs: check::each(wire.logprobs, "logprobs")?,
        })
    }
}

impl From<TextTokens> for v1::GeneratedTokens {
    fn from(tokens: TextTokens) -> Self {
        Self {
            text: tokens.text,
            token_ids: tokens.token_ids,
            logprobs: tokens.logprobs.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<v1::ShardBytes> for ShardBytes {
    fn from(wire: v1::ShardBytes) -> Self {
        Self { shard_id: wire.shard_id, kv_bytes: wire.kv_bytes }
    }
}

impl From<ShardBytes> for v1::ShardBytes {
    fn from(bytes: ShardBytes) -> Self {
        Self { shard_id: bytes.shard_id, kv_bytes: bytes.kv_bytes }
    }
}

impl TryFrom<v1::GenerateFinished> for Finished {
    type Error = WireError;

    fn try_from(wire: v1::GenerateFinished) -> Result<Self, WireError> {
        let reason = match v1::FinishReason::try_from(wire.reason) {
            Ok(v1::FinishReason::Stop) => FinishReason::Stop,
            Ok(v1::FinishReason::Length) => FinishReason::Length,
            Ok(v1::FinishReason::Unspecified) => return Err(WireError::invalid("reason", "is not set")),
            Err(_) => {
                return Err(WireError::invalid(
                    "reason",
                    format!("is {}, which is no known reason", wire.reason),
                ));
            }
        };
        let millis = wire.time_to_first_token_ms;
        if !(millis.is_finite() && millis >= 0.0) {
            return Err(WireError::invalid(
                "time_to_first_token_ms",
                format!("is {millis}, must be finite and not negative"),
            ));
        }
        Ok(Self {
            reason,
            prompt_tokens: wire.prompt_tokens,
            cached_tokens: wire.cached_tokens,
            completion_tokens: wire.completion_tokens,
            time_to_first_token_ms: millis,
            placement: wire.placement.into_iter().map(Into::into).collect(),
            resumed: wire.resumed,
            visited_blocks: wire.visited_blocks,
            causal_blocks: wire.causal_blocks,
        })
    }
}

impl From<Finished> for v1::GenerateFinished {
    fn from(finished: Finished) -> Self {
        let reason = match finished.reason {
            FinishReason::Stop => v1::FinishReason::Stop,
            FinishReason::Length => v1::FinishReason::Length,
        };
        Self {
            reason: reason.into(),
            prompt_tokens: finished.prompt_tokens,
            cached_tokens: finished.cached_tokens,
            completion_tokens: finished.completion_tokens,
            time_to_first_token_ms: finished.time_to_first_token_ms,
            placement: finished.placement.into_iter().map(Into::into).collect(),
            resumed: finished.resumed,
            visited_blocks: finished.visited_blocks,
            causal_blocks: finished.causal_blocks,
        }
    }
}

impl TryFrom<v1::GenerateResponse> for GenerateEvent {
    type Error = WireError;

    fn try_from(wire: v1::GenerateResponse) -> Result<Self, WireError> {
        use v1::generate_response::Event;
        match wire.event.ok_or_else(|| WireError::invalid("event", "is not set"))? {
            Event::Accepted(accepted) => Ok(Self::Accepted {
                request_id: accepted.request_id,
                prompt_tokens: accepted.prompt_tokens,
                cached_tokens: accepted.cached_tokens,
                model: accepted.model,
                prefill_policy: accepted.prefill_policy,
            }),
            Event::Progress(progress) => {
                Ok(Self::Progress { done_tokens: progress.done_tokens, total_tokens: progress.total_tokens })
            }
            Event::Tokens(tokens) => check::required(Some(tokens), "tokens").map(Self::Tokens),
            Event::Finished(finished) => check::required(Some(finished), "finished").map(Self::Finished),
        }
    }
}

impl From<GenerateEvent> for v1::GenerateResponse {
    fn from(event: GenerateEvent) -> Self {
        use v1::generate_response::Event;
        let event = match event {
            GenerateEvent::Accepted { request_id, prompt_tokens, cached_tokens, model, prefill_policy } => {
                Event::Accepted(v1::GenerateAccepted {
                    request_id,
                    prompt_tokens,
                    cached_tokens,
                    model,
                    prefill_policy,
                })
            }
            GenerateEvent::Progress { done_tokens, total_tokens } => {
                Event::Progress(v1::PrefillProgress { done_tokens, total_tokens })
            }
            GenerateEvent::Tokens(tokens) => Event::Tokens(tokens.into()),
            GenerateEvent::Finished(finished) => Event::Finished(finished.into()),
        };
        Self { event: Some(event) }
    }
}
