//! Checked conversions of what the router asks of workers.

use longshore_blocks::EXACT_PREFILL;

use super::{DecodeEvent, DecodeStart, PrefillEvent, PrefillStart};
use crate::{
    WireError,
    types::{Sampling, check},
    v1,
};

/// Most stop tokens of one sequence.
const STOP_TOKENS_MAX: usize = 1024;

/// Callers that name no policy mean exact attention.
fn policy_or_exact(text: String) -> String {
    if text.is_empty() { EXACT_PREFILL.to_owned() } else { text }
}

impl TryFrom<v1::PrefillStart> for PrefillStart {
    type Error = WireError;

    fn try_from(wire: v1::PrefillStart) -> Result<Self, WireError> {
        check::request_id(&wire.request_id)?;
        check::prefill_policy(&wire.prefill_policy)?;
        Ok(Self {
            request_id: wire.request_id,
            identity: check::required(wire.identity, "identity")?,
            prompt_tokens: check::positive(wire.prompt_tokens, "prompt_tokens")?,
            cached_blocks: wire.cached_blocks,
            prefill_policy: policy_or_exact(wire.prefill_policy),
            dense_from: wire.dense_from,
            generated_tokens: wire.generated_tokens,
        })
    }
}

impl From<PrefillStart> for v1::PrefillStart {
    fn from(start: PrefillStart) -> Self {
        Self {
            request_id: start.request_id,
            identity: Some(start.identity.into()),
            prompt_tokens: start.prompt_tokens,
            cached_blocks: start.cached_blocks,
            prefill_policy: start.prefill_policy,
            dense_from: start.dense_from,
            generated_tokens: start.generated_tokens,
        }
    }
}

impl TryFrom<v1::PrefillResponse> for PrefillEvent {
    type Error = WireError;

    fn try_from(wire: v1::PrefillResponse) -> Result<Self, WireError> {
        use v1::prefill_response::Event;
        match wire.event.ok_or_else(|| WireError::invalid("event", "is not set"))? {
            Event::Progress(progress) => Ok(Self::Progress { done_tokens: progress.done_tokens }),
            Event::Finished(finished) => Ok(Self::Finished {
                computed_blocks: finished.computed_blocks,
                stored_bytes: finished.stored_bytes,
            }),
        }
    }
}

impl From<PrefillEvent> for v1::PrefillResponse {
    fn from(event: PrefillEvent) -> Self {
        use v1::prefill_response::{Event, PrefillFinished, PrefillProgress};
        let event = match event {
            PrefillEvent::Progress { done_tokens } => Event::Progress(PrefillProgress { done_tokens }),
            PrefillEvent::Finished { computed_blocks, stored_bytes } => {
                Event::Finished(PrefillFinished { computed_blocks, stored_bytes })
            }
        };
        Self { event: Some(event) }
    }
}

/// Workers fill in no defaults: two of them would not fill in the same seed.
fn decided(sampling: Option<v1::SamplingParams>) -> Result<Sampling, WireError> {
    let wire = sampling.ok_or_else(|| WireError::invalid("", "is missing"))?;
    let set = [
        ("temperature", wire.temperature.is_some()),
        ("top_k", wire.top_k.is_some()),
        ("top_p", wire.top_p.is_some()),
        ("min_p", wire.min_p.is_some()),
        ("repetition_penalty", wire.repetition_penalty.is_some()),
        ("presence_penalty", wire.presence_penalty.is_some()),
        ("frequency_penalty", wire.frequency_penalty.is_some()),
        ("seed", wire.seed.is_some()),
        ("max_tokens", wire.max_tokens.is_some()),
    ];
    match set.into_iter().find(|(_, is_set)| !is_set) {
        Some((field, _)) => Err(WireError::invalid(field, "is missing")),
        None => Sampling::try_from(wire),
    }
}

impl TryFrom<v1::DecodeStart> for DecodeStart {
    type Error = WireError;

    fn try_from(wire: v1::DecodeStart) -> Result<Self, WireError> {
        check::request_id(&wire.request_id)?;
        check::prefill_policy(&wire.prefill_policy)?;
        check::at_most(wire.stop_token_ids.len(), STOP_TOKENS_MAX, "token ids", "stop_token_ids")?;
        Ok(Self {
            request_id: wire.request_id,
            identity: check::required(wire.identity, "identity")?,
            prompt_tokens: check::positive(wire.prompt_tokens, "prompt_tokens")?,
            generated_tokens: wire.generated_tokens,
            sampling: decided(wire.sampling).map_err(|fault| fault.within("sampling"))?,
            stop_token_ids: wire.stop_token_ids,
            prefill_policy: policy_or_exact(wire.prefill_policy),
        })
    }
}

impl From<DecodeStart> for v1::DecodeStart {
    fn from(start: DecodeStart) -> Self {
        Self {
            request_id: start.request_id,
            identity: Some(start.identity.into()),
            prompt_tokens: start.prompt_tokens,
            generated_tokens: start.generated_tokens,
            sampling: Some(start.sampling.into()),
            stop_token_ids: start.stop_token_ids,
            prefill_policy: start.prefill_policy,
        }
    }
}

impl TryFrom<v1::DecodeResponse> for DecodeEvent {
    type Error = WireError;

    fn try_from(wire: v1::DecodeResponse) -> Result<Self, WireError> {
        use v1::decode_response::Event;
        match wire.event.ok_or_else(|| WireError::invalid("event", "is not set"))? {
            Event::Token(token) => {
                let logprob =
                    token.logprob.map(|value| check::logprob(value, "token.logprob")).transpose()?;
                Ok(Self::Token {
                    token_id: token.token_id,
                    logprob,
                    top: check::each(token.top, "token.top")?,
                })
            }
            Event::Finished(finished) => Ok(Self::Finished { stopped: finished.stopped }),
        }
    }
}

impl From<DecodeEvent> for v1::DecodeResponse {
    fn from(event: DecodeEvent) -> Self {
        use v1::decode_response::{DecodeFinished, DecodedToken, Event};
        let event = match event {
            DecodeEvent::Token { token_id, logprob, top } => Event::Token(DecodedToken {
                token_id,
                logprob,
                top: top.into_iter().map(Into::into).collect(),
            }),
            DecodeEvent::Finished { stopped } => Event::Finished(DecodeFinished { stopped }),
        };
        Self { event: Some(event) }
    }
}
