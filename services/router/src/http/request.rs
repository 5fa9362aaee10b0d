//! OpenAI request bodies to what the router understands. One walk over the JSON, nothing kept but known fields: a prompt of
//! token ids takes 4 bytes an id, and every fault names its field.

use std::fmt;

use longshore_chassis::words::plain_numbers;
use longshore_proto::types::{ChatMessage, GenerateStart, PromptChunk, Sampling};
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::{
    answer::Endpoint,
    error::ApiError,
    fields::{
        Content, LogprobsField, Message, Presence, PromptField, ResponseFormat, Seed, StopField,
        StreamOptions,
    },
};
use crate::service::check;

/// Fields that would change the answer and are not offered.
const UNSUPPORTED: [&str; 17] = [
    "audio",
    "bad_words",
    "echo",
    "function_call",
    "functions",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "logit_bias",
    "prompt_logprobs",
    "stop_token_ids",
    "structured_outputs",
    "suffix",
    "tools",
    "truncate_prompt_tokens",
    "use_beam_search",
];

/// A request that was understood.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ApiRequest {
    /// Parameters.
    pub(crate) start: GenerateStart,
    /// The prompt.
    pub(crate) prompt: Vec<PromptChunk>,
    /// Answer with events.
    pub(crate) stream: bool,
    /// Send a last chunk with the usage.
    pub(crate) include_usage: bool,
}

/// Known fields as they were sent.
#[derive(Debug, Default)]
struct Body {
    model: Option<String>,
    prompt: Option<PromptField>,
    messages: Option<Vec<Message>>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    stop: Option<StopField>,
    n: Option<u32>,
    best_of: Option<u32>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    min_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    seed: Option<Seed>,
    logprobs: Option<LogprobsField>,
    top_logprobs: Option<u32>,
    ignore_eos: Option<bool>,
    add_special_tokens: Option<bool>,
    cache_salt: Option<String>,
    prefill_policy: Option<String>,
    response_format: Option<ResponseFormat>,
    /// The first field that is not offered and says something.
    unsupported: Option<&'static str>,
}

/// Reads a body and notes in `at` which field it is in.
struct Walk<'a> {
    at: &'a mut Option<String>,
}

impl Body {
    /// Reads the value of `key`; unknown fields are skipped, as OpenAI's extensions come and go.
    fn accept<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        match key {
            "model" => self.model = map.next_value()?,
            "prompt" => self.prompt = map.next_value()?,
            "messages" => self.messages = map.next_value()?,
            "stream" => self.stream = map.next_value()?,
            "stream_options" => self.stream_options = map.next_value()?,
            "stop" => self.stop = map.next_value()?,
            "n" => self.n = map.next_value()?,
            "best_of" => self.best_of = map.next_value()?,
            "cache_salt" => self.cache_salt = map.next_value()?,
            "prefill_policy" => self.prefill_policy = map.next_value()?,
            "response_format" => self.response_format = map.next_value()?,
            "add_special_tokens" => self.add_special_tokens = map.next_value()?,
            _ => return self.accept_sampling(key, map),
        }
        Ok(())
    }

    fn accept_sampling<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        match key {
            "max_tokens" => self.max_tokens = map.next_value()?,
            "max_completion_tokens" => self.max_completion_tokens = map.next_value()?,
            "min_tokens" => self.min_tokens = map.next_value()?,
            "temperature" => self.temperature = map.next_value()?,
            "top_p" => self.top_p = map.next_value()?,
            "top_k" => self.top_k = map.next_value()?,
            "min_p" => self.min_p = map.next_value()?,
            "repetition_penalty" => self.repetition_penalty = map.next_value()?,
            "presence_penalty" => self.presence_penalty = map.next_value()?,
            "frequency_penalty" => self.frequency_penalty = map.next_value()?,
            "seed" => self.seed = map.next_value()?,
            "logprobs" => self.logprobs = map.next_value()?,
            "top_logprobs" => self.top_logprobs = map.next_value()?,
            "ignore_eos" => self.ignore_eos = map.next_value()?,
            _ => match UNSUPPORTED.iter().find(|name| **name == key) {
                Some(name) => {
                    let Presence(present) = map.next_value()?;
                    self.unsupported = self.unsupported.or(present.then_some(*name));
                }
                None => drop(map.next_value::<IgnoredAny>()?),
            },
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = Body;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Body, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = Body;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Body, A::Error> {
        let mut body = Body::default();
        while let Some(key) = map.next_key::<String>()? {
            let key = &**self.at.insert(key);
            body.accept(key, &mut map)?;
            *self.at = None;
        }
        Ok(body)
    }
}

/// Understands a body, or says which field is wrong.
pub(crate) fn parse(bytes: &[u8], endpoint: Endpoint) -> Result<ApiRequest, ApiError> {
    let body = read(bytes)?;
    refuse_unsupported(&body)?;
    let prompt = match endpoint {
        Endpoint::Completions => completion_prompt(body.prompt)?,
        Endpoint::Chat => chat_prompt(body.messages)?,
    };
    let logprobs = logprobs(endpoint, body.logprobs, body.top_logprobs)?;
    let max_tokens = body.max_completion_tokens.or(body.max_tokens);
    let min_tokens = body.min_tokens.unwrap_or(0);
    let ignore_eos = body.ignore_eos.unwrap_or(false);
    if min_tokens > 0 && !ignore_eos {
        return Err(ApiError::unsupported(
            "min_tokens",
            "needs `ignore_eos`; hint: set `ignore_eos` to true",
        ));
    }
    let defaults = Sampling::default();
    let sampling = Sampling {
        temperature: body.temperature.unwrap_or(defaults.temperature),
        top_k: top_k(body.top_k)?,
        top_p: body.top_p.unwrap_or(defaults.top_p),
        min_p: body.min_p.unwrap_or(defaults.min_p),
        repetition_penalty: body.repetition_penalty.unwrap_or(defaults.repetition_penalty),
        presence_penalty: body.presence_penalty.unwrap_or(defaults.presence_penalty),
        frequency_penalty: body.frequency_penalty.unwrap_or(defaults.frequency_penalty),
        seed: body.seed.map(|Seed(seed)| seed),
        max_tokens,
        logprobs,
        ignore_eos,
    };
    let start = GenerateStart {
        model: body.model.unwrap_or_default(),
        sampling,
        stop: body.stop.unwrap_or_default().0,
        cache_salt: body.cache_salt.unwrap_or_default().into_bytes(),
        skip_special_tokens: !body.add_special_tokens.unwrap_or(true),
        prefill_policy: body.prefill_policy.unwrap_or_default(),
        ..GenerateStart::default()
    };
    check::check(&start)?;
    let include_usage = body.stream_options.and_then(|options| options.include_usage).unwrap_or(false);
    Ok(ApiRequest { start, prompt, stream: body.stream.unwrap_or(false), include_usage })
}

fn read(bytes: &[u8]) -> Result<Body, ApiError> {
    let mut at = None;
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let body = Walk { at: &mut at }.deserialize(&mut json).and_then(|body| json.end().map(|()| body));
    body.map_err(|error| match (error.classify(), at) {
        (serde_json::error::Category::Data, Some(field)) => {
            ApiError::invalid(field, format_args!("is wrong: {}", plain_numbers(&error.to_string())))
        }
        (serde_json::error::Category::Data, None) => {
            ApiError::syntax(format!("the request body is wrong: {error}; hint: send a JSON object"))
        }
        _ => ApiError::syntax(format!("the request body is not valid JSON: {error}")),
    })
}

fn refuse_unsupported(body: &Body) -> Result<(), ApiError> {
    if let Some(field) = body.unsupported {
        return Err(ApiError::unsupported(field, "is not supported; hint: leave it out"));
    }
    for (field, count) in [("n", body.n), ("best_of", body.best_of)] {
        match count {
            None | Some(1) => {}
            Some(0) => return Err(ApiError::invalid(field, "is 0, must be 1")),
            Some(count) => {
                let problem = format!("is {count}, only 1 is supported; hint: send several requests");
                return Err(ApiError::unsupported(field, &problem));
            }
        }
    }
    match &body.response_format {
        Some(format) if format.kind != "text" => {
            let problem = format!("is `{}`, only `text` is supported", format.kind.escape_debug());
            Err(ApiError::unsupported("response_format.type", &problem))
        }
        _ => Ok(()),
    }
}

fn completion_prompt(prompt: Option<PromptField>) -> Result<Vec<PromptChunk>, ApiError> {
    match prompt {
        None => Err(ApiError::invalid("prompt", "is missing")),
        Some(PromptField::Text(text)) if text.is_empty() => Err(empty("prompt")),
        Some(PromptField::Tokens(ids)) if ids.is_empty() => Err(empty("prompt")),
        Some(PromptField::Text(text)) => Ok(vec![PromptChunk::Text(text)]),
        Some(PromptField::Tokens(ids)) => Ok(vec![PromptChunk::Tokens(ids)]),
    }
}

fn empty(param: &str) -> ApiError {
    ApiError::invalid(param, "is empty; hint: send at least one token")
}

fn chat_prompt(messages: Option<Vec<Message>>) -> Result<Vec<PromptChunk>, ApiError> {
    let messages = messages.ok_or_else(|| ApiError::invalid("messages", "is missing"))?;
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "is empty; hint: send at least one message"));
    }
    let chunks = messages.into_iter().enumerate().map(|(index, message)| {
        let role = role(index, &message.role)?.to_owned();
        if message.tool_calls.0 {
            return Err(ApiError::unsupported(&format!("messages[{index}].tool_calls"), "is not supported"));
        }
        let content = content(index, &role, message.content)?;
        Ok(PromptChunk::Message(ChatMessage { role, content }))
    });
    chunks.collect()
}

/// `developer` is OpenAI's newer name for `system`; templates know the old one.
fn role(index: usize, role: &str) -> Result<&str, ApiError> {
    match role {
        "developer" => Ok("system"),
        "system" | "user" | "assistant" | "tool" => Ok(role),
        other => {
            let problem =
                format!("is `{}`, must be `system`, `user`, `assistant` or `tool`", other.escape_debug());
            Err(ApiError::invalid(format!("messages[{index}].role"), problem))
        }
    }
}

fn content(index: usize, role: &str, content: Option<Content>) -> Result<String, ApiError> {
    match content {
        Some(Content::Text(text)) => Ok(text),
        None if role == "assistant" => Ok(String::new()),
        None => Err(ApiError::invalid(format!("messages[{index}].content"), "is missing")),
        Some(Content::Parts(parts)) => {
            let mut all = String::new();
            for (at, part) in parts.into_iter().enumerate() {
                let path = format!("messages[{index}].content[{at}]");
                match part.text {
                    _ if part.kind != "text" => {
                        let problem = format!("is `{}`, only `text` is supported", part.kind.escape_debug());
                        return Err(ApiError::unsupported(&format!("{path}.type"), &problem));
                    }
                    Some(text) => all.push_str(&text),
                    None => return Err(ApiError::invalid(format!("{path}.text"), "is missing")),
                }
            }
            Ok(all)
        }
    }
}

fn logprobs(
    endpoint: Endpoint,
    logprobs: Option<LogprobsField>,
    top: Option<u32>,
) -> Result<Option<u32>, ApiError> {
    let limit = check::LOGPROBS_MAX;
    let in_range = |field: &str, count: u32| {
        if count > limit {
            return Err(ApiError::invalid(field, format_args!("is {count}, must be from 0 to {limit}")));
        }
        Ok(Some(count))
    };
    match (endpoint, logprobs, top) {
        (Endpoint::Completions, _, Some(_)) => {
            Err(ApiError::invalid("top_logprobs", "is for chat; hint: send the count as `logprobs`"))
        }
        (Endpoint::Completions, Some(LogprobsField::Flag(true)), None) => {
            Err(ApiError::invalid("logprobs", "is true, must be a count here"))
        }
        (Endpoint::Completions, Some(LogprobsField::Count(count)), None) => in_range("logprobs", count),
        (Endpoint::Chat, Some(LogprobsField::Count(count)), _) => {
            let problem =
                format!("is {count}, must be true or false here; hint: send the count as `top_logprobs`");
            Err(ApiError::invalid("logprobs", problem))
        }
        (Endpoint::Chat, Some(LogprobsField::Flag(true)), count) => {
            in_range("top_logprobs", count.unwrap_or(0))
        }
        (Endpoint::Chat, _, Some(count)) if count > 0 => {
            Err(ApiError::invalid("top_logprobs", "needs `logprobs`; hint: set `logprobs` to true"))
        }
        _ => Ok(None),
    }
}

/// vLLM's −1 means all, as our 0 does.
fn top_k(top_k: Option<i64>) -> Result<u32, ApiError> {
    match top_k {
        None | Some(-1 | 0) => Ok(0),
        Some(k) => u32::try_from(k)
            .map_err(|_| ApiError::invalid("top_k", format_args!("is {k}, must be 1 or more, or -1"))),
    }
}
