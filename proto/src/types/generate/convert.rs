//! Checked conversions of what clients ask for.

use super::{ChatMessage, GenerateStart, PromptChunk, Sampling};
use crate::{WireError, types::check, v1};

/// Most stop strings, and the longest one in bytes.
const STOP_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 256;
/// Longest tenant salt in bytes.
const SALT_BYTES_MAX: usize = 256;
/// Most alternatives whose log-probabilities are reported.
const LOGPROBS_MAX: u32 = 20;
/// Roles of a conversation.
const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];

/// The value of `field` or its default. `range` says in words what `allowed` tests; NaN fails every test.
fn number(
    value: Option<f32>,
    default: f32,
    field: &str,
    range: &str,
    allowed: impl Fn(f32) -> bool,
) -> Result<f32, WireError> {
    let value = value.unwrap_or(default);
    if allowed(value) {
        Ok(value)
    } else {
        Err(WireError::invalid(field, format!("is {value}, must be {range}")))
    }
}

impl Sampling {
    /// Checks every range; the one rule for all front doors.
    pub fn validate(&self) -> Result<(), WireError> {
        Self::try_from(v1::SamplingParams::from(self.clone())).map(drop)
    }
}

impl TryFrom<v1::SamplingParams> for Sampling {
    type Error = WireError;

    fn try_from(wire: v1::SamplingParams) -> Result<Self, WireError> {
        let standard = Self::default();
        let penalty = |value, default, field: &str| {
            number(value, default, field, "from -2 to 2", |value| (-2.0..=2.0).contains(&value))
        };
        if wire.max_tokens == Some(0) {
            return Err(WireError::invalid("max_tokens", "is 0, must be at least 1"));
        }
        if let Some(logprobs) = wire.logprobs.filter(|count| *count > LOGPROBS_MAX) {
            return Err(WireError::invalid(
                "logprobs",
                format!("is {logprobs}, must be from 0 to {LOGPROBS_MAX}"),
            ));
        }
        Ok(Self {
            temperature: number(
                wire.temperature,
                standard.temperature,
                "temperature",
                "from 0 to 100",
                |value| (0.0..=100.0).contains(&value),
            )?,
            top_k: wire.top_k.unwrap_or(standard.top_k),
            top_p: number(wire.top_p, standard.top_p, "top_p", "above 0 and at most 1", |value| {
                value > 0.0 && value <= 1.0
            })?,
            min_p: number(wire.min_p, standard.min_p, "min_p", "from 0 to 1", |value| {
                (0.0..=1.0).contains(&value)
            })?,
            repetition_penalty: number(
                wire.repetition_penalty,
                standard.repetition_penalty,
                "repetition_penalty",
                "above 0 and at most 10",
                |value| value > 0.0 && value <= 10.0,
            )?,
            presence_penalty: penalty(wire.presence_penalty, standard.presence_penalty, "presence_penalty")?,
            frequency_penalty: penalty(
                wire.frequency_penalty,
                standard.frequency_penalty,
                "frequency_penalty",
            )?,
            seed: wire.seed,
            max_tokens: wire.max_tokens,
            logprobs: wire.logprobs,
            ignore_eos: wire.ignore_eos,
        })
    }
}

impl From<Sampling> for v1::SamplingParams {
    fn from(sampling: Sampling) -> Self {
        Self {
            temperature: Some(sampling.temperature),
            top_k: Some(sampling.top_k),
            top_p: Some(sampling.top_p),
            min_p: Some(sampling.min_p),
            repetition_penalty: Some(sampling.repetition_penalty),
            presence_penalty: Some(sampling.presence_penalty),
            frequency_penalty: Some(sampling.frequency_penalty),
            seed: sampling.seed,
            max_tokens: sampling.max_tokens,
            logprobs: sampling.logprobs,
            ignore_eos: sampling.ignore_eos,
        }
    }
}

impl GenerateStart {
    /// Checks every range; the one rule for all front doors. Paths are relative to the start, for example `sampling.top_p`.
    pub fn validate(&self) -> Result<(), WireError> {
        self.sampling.validate().map_err(|fault| fault.within("sampling"))?;
        check::at_most(self.stop.len(), STOP_MAX, "strings", "stop")?;
        for (index, stop) in self.stop.iter().enumerate() {
            if !(1..=STOP_BYTES_MAX).contains(&stop.len()) {
                let problem = format!("has {} bytes, must have 1 to {STOP_BYTES_MAX}", stop.len());
                return Err(WireError::invalid(format!("stop[{index}]"), problem));
            }
        }
        check::at_most(self.cache_salt.len(), SALT_BYTES_MAX, "bytes", "cache_salt")?;
        check::prefill_policy(&self.prefill_policy)?;
        check::request_id(&self.request_id)
    }
}

impl TryFrom<v1::GenerateStart> for GenerateStart {
    type Error = WireError;

    fn try_from(wire: v1::GenerateStart) -> Result<Self, WireError> {
        let sampling = Sampling::try_from(wire.sampling.unwrap_or_default())
            .map_err(|fault| fault.within("sampling"))?;
        let start = Self {
            model: wire.model,
            sampling,
            stop: wire.stop,
            cache_salt: wire.cache_salt.into(),
            request_id: wire.request_id,
            progress: wire.progress,
            skip_special_tokens: wire.skip_special_tokens,
            prefill_policy: wire.prefill_policy,
        };
        start.validate()?;
        Ok(start)
    }
}

impl From<GenerateStart> for v1::GenerateStart {
    fn from(start: GenerateStart) -> Self {
        Self {
            model: start.model,
            sampling: Some(start.sampling.into()),
            stop: start.stop,
            cache_salt: start.cache_salt.into(),
            request_id: start.request_id,
            progress: start.progress,
            skip_special_tokens: start.skip_special_tokens,
            prefill_policy: start.prefill_policy,
        }
    }
}

impl TryFrom<v1::TokenChunk> for Vec<u32> {
    type Error = WireError;

    fn try_from(wire: v1::TokenChunk) -> Result<Self, WireError> {
        check::at_most(wire.token_ids.len(), check::CHUNK_TOKENS_MAX, "token ids", "token_ids")?;
        Ok(wire.token_ids)
    }
}

impl From<Vec<u32>> for v1::TokenChunk {
    fn from(token_ids: Vec<u32>) -> Self {
        Self { token_ids }
    }
}

impl TryFrom<v1::ChatMessage> for ChatMessage {
    type Error = WireError;

    fn try_from(wire: v1::ChatMessage) -> Result<Self, WireError> {
        if !ROLES.contains(&wire.role.as_str()) {
            let shown: String = wire.role.chars().take(32).collect();
            return Err(WireError::invalid(
                "role",
                format!("is {shown:?}, must be one of {}", ROLES.join(", ")),
            ));
        }
        Ok(Self { role: wire.role, content: wire.content })
    }
}

impl From<ChatMessage> for v1::ChatMessage {
    fn from(message: ChatMessage) -> Self {
        Self { role: message.role, content: message.content }
    }
}

impl TryFrom<v1::generate_request::Chunk> for PromptChunk {
    type Error = WireError;

    fn try_from(wire: v1::generate_request::Chunk) -> Result<Self, WireError> {
        use v1::generate_request::Chunk;
        match wire {
            Chunk::Text(text) => Ok(Self::Text(text.text)),
            Chunk::Tokens(tokens) => check::required(Some(tokens), "tokens").map(Self::Tokens),
            Chunk::Message(message) => check::required(Some(message), "message").map(Self::Message),
        }
    }
}

impl From<PromptChunk> for v1::generate_request::Chunk {
    fn from(chunk: PromptChunk) -> Self {
        match chunk {
            PromptChunk::Text(text) => Self::Text(v1::TextChunk { text }),
            PromptChunk::Tokens(tokens) => Self::Tokens(tokens.into()),
            PromptChunk::Message(message) => Self::Message(message.into()),
        }
    }
}
