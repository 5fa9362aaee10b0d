//! Reads a streamed prompt within bounded memory and turns it into token ids.

use std::time::Duration;

use longshore_model::{ModelInfo, SpecialTokens};
use longshore_proto::types::{ChatMessage, Prompt, PromptChunk};
use tokio::{sync::mpsc, time::Instant};

use crate::Error;

/// What a prompt may be at most.
#[derive(Debug, Clone)]
pub(crate) struct PromptLimits {
    /// Name of the model, for messages.
    pub(crate) model: String,
    /// Positions of the context, prompt and answer together.
    pub(crate) context_tokens: u64,
    /// Bytes of the longest token: more bytes than this times the limit cannot fit.
    pub(crate) longest_token_bytes: u64,
    /// Entries of the vocabulary.
    pub(crate) vocabulary: u32,
}

impl PromptLimits {
    /// Most tokens of a prompt: one position is left for the answer.
    fn tokens(&self) -> u64 {
        self.context_tokens.saturating_sub(1)
    }

    /// The refusal.
    pub(crate) fn too_long(&self) -> Error {
        Error::PromptTooLong {
            model: self.model.clone(),
            limit_tokens: self.tokens(),
            context_tokens: self.context_tokens,
        }
    }

    /// Refuses what no tokenizer could make fit.
    pub(crate) fn check_bytes(&self, bytes: u64) -> Result<(), Error> {
        let limit = self.tokens().saturating_mul(self.longest_token_bytes.max(1));
        if bytes > limit { Err(self.too_long()) } else { Ok(()) }
    }

    /// Refuses prompts without tokens and those beyond the limit.
    pub(crate) fn check_tokens(&self, tokens: u64) -> Result<(), Error> {
        match tokens {
            0 => Err(Error::invalid("prompt", "is empty; hint: send at least one token")),
            tokens if tokens > self.tokens() => Err(self.too_long()),
            _ => Ok(()),
        }
    }
}

/// A prompt as far as it was read.
#[derive(Debug)]
struct Reader<'a> {
    limits: &'a PromptLimits,
    prompt: Option<Prompt>,
    bytes: u64,
}

/// Reads until the stream closes. Refuses a prompt as soon as it exceeds its limits, so that nothing grows with it.
pub(crate) async fn read(
    chunks: &mut mpsc::Receiver<PromptChunk>,
    limits: &PromptLimits,
    idle: Duration,
) -> Result<Prompt, Error> {
    let mut reader = Reader { limits, prompt: None, bytes: 0 };
    let mut until = Instant::now() + idle;
    loop {
        match tokio::time::timeout_at(until, chunks.recv()).await {
            Ok(Some(chunk)) => {
                if !is_empty(&chunk) {
                    until = Instant::now() + idle;
                } else if Instant::now() >= until {
                    // A queue that is never empty would hide the time-out.
                    return Err(Error::PromptStalled { waited: idle });
                }
                reader.accept(chunk)?;
            }
            Ok(None) => {
                let empty = "is empty; hint: send at least one token";
                return reader.prompt.ok_or_else(|| Error::invalid("prompt", empty));
            }
            Err(_) => return Err(Error::PromptStalled { waited: idle }),
        }
    }
}

/// Whether a chunk adds nothing: no limit ever stops such chunks, so they must not keep a request alive. Messages count
/// against the limits even without content.
fn is_empty(chunk: &PromptChunk) -> bool {
    match chunk {
        PromptChunk::Text(text) => text.is_empty(),
        PromptChunk::Tokens(ids) => ids.is_empty(),
        PromptChunk::Message(_) => false,
    }
}

impl Reader<'_> {
    fn accept(&mut self, chunk: PromptChunk) -> Result<(), Error> {
        match (&mut self.prompt, chunk) {
            (None, PromptChunk::Text(text)) => {
                self.count(text.len())?;
                self.prompt = Some(Prompt::Text(text));
            }
            (None, PromptChunk::Tokens(ids)) => {
                self.check_ids(0, &ids)?;
                self.prompt = Some(Prompt::Tokens(ids));
            }
            (None, PromptChunk::Message(message)) => {
                self.count_message(1, &message)?;
                self.prompt = Some(Prompt::Chat(vec![message]));
            }
            (Some(Prompt::Text(_)), PromptChunk::Text(more)) => {
                self.count(more.len())?;
                self.append_text(&more);
            }
            (Some(Prompt::Tokens(all)), PromptChunk::Tokens(more)) => {
                let known = all.len();
                self.check_ids(known, &more)?;
                self.append_ids(&more);
            }
            (Some(Prompt::Chat(all)), PromptChunk::Message(message)) => {
                let known = all.len();
                self.count_message(known + 1, &message)?;
                self.append_message(message);
            }
            _ => {
                return Err(Error::invalid(
                    "prompt",
                    "mixes text, token ids and messages; hint: send one kind only",
                ));
            }
        }
        Ok(())
    }

    fn append_text(&mut self, more: &str) {
        if let Some(Prompt::Text(text)) = &mut self.prompt {
            text.push_str(more);
        }
    }

    fn append_ids(&mut self, more: &[u32]) {
        if let Some(Prompt::Tokens(ids)) = &mut self.prompt {
            ids.extend_from_slice(more);
        }
    }

    fn append_message(&mut self, message: ChatMessage) {
        if let Some(Prompt::Chat(messages)) = &mut self.prompt {
            messages.push(message);
        }
    }

    fn count(&mut self, bytes: usize) -> Result<(), Error> {
        self.bytes += bytes as u64;
        self.limits.check_bytes(self.bytes)
    }

    /// A message costs at least one token even when it is empty.
    fn count_message(&mut self, messages: usize, message: &ChatMessage) -> Result<(), Error> {
        if !matches!(message.role.as_str(), "system" | "user" | "assistant" | "tool") {
            let problem = format!(
                "is `{}`, must be `system`, `user`, `assistant` or `tool`",
                message.role.escape_debug()
            );
            return Err(Error::invalid(format!("messages[{}].role", messages - 1), problem));
        }
        if messages as u64 > self.limits.tokens() {
            return Err(self.limits.too_long());
        }
        self.count(message.content.len())
    }

    fn check_ids(&self, known: usize, ids: &[u32]) -> Result<(), Error> {
        if (known + ids.len()) as u64 > self.limits.tokens() {
            return Err(self.limits.too_long());
        }
        match ids.iter().position(|&id| id >= self.limits.vocabulary) {
            Some(at) => Err(Error::invalid(
                "prompt",
                format!(
                    "has token id {} at position {}, must be below {}, the size of the vocabulary",
                    ids[at],
                    known + at,
                    self.limits.vocabulary
                ),
            )),
            None => Ok(()),
        }
    }
}

/// Token ids of a prompt. Slow for long texts: call it off the reactor.
pub(crate) fn tokenize(model: &ModelInfo, prompt: Prompt, skip_special: bool) -> Result<Vec<u32>, Error> {
    let special = if skip_special { SpecialTokens::Skip } else { SpecialTokens::Add };
    match prompt {
        Prompt::Tokens(ids) => Ok(ids),
        Prompt::Text(text) => Ok(model.tokenizer.encode(&text, special)?),
        Prompt::Chat(messages) => {
            let Some(template) = &model.chat_template else {
                let problem = "cannot be used: this model has no chat template; hint: send a plain prompt";
                return Err(Error::invalid("messages", problem));
            };
            let pairs: Vec<(String, String)> = messages.into_iter().map(|m| (m.role, m.content)).collect();
            let text = template.render(&pairs, true)?;
            Ok(model.tokenizer.encode(&text, special)?)
        }
    }
}
