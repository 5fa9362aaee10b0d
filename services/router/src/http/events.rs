//! The stream of an answer as server-sent events, whatever its form.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
};

use futures::Stream;
use longshore_fabric::BoxStream;
use longshore_proto::types::{FinishReason, Finished, GenerateEvent, TextTokens};
use serde_json::{Value, json};

use super::error::ApiError;
use crate::Router;

/// What all parts of an answer repeat.
#[derive(Debug)]
pub(crate) struct Head {
    /// Name of the request.
    pub(crate) id: String,
    /// Seconds since the epoch.
    pub(crate) created: u64,
    /// Model that answers.
    pub(crate) model: String,
    /// What answers.
    pub(crate) fingerprint: String,
    /// Send a last chunk with the usage, and a null in all others.
    pub(crate) include_usage: bool,
    /// Log-probabilities were asked for.
    pub(crate) logprobs: bool,
    /// Knows the bytes of tokens.
    pub(crate) router: Router,
}

impl Head {
    /// An object of `kind` with these choices.
    pub(crate) fn object(&self, id_prefix: &str, kind: &str, choices: Value) -> Value {
        json!({
            "id": format!("{id_prefix}-{}", self.id), "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "choices": choices,
        })
    }

    /// A chunk, with the null usage that clients expect when they asked for the usage.
    pub(crate) fn chunk(&self, id_prefix: &str, kind: &str, choices: Value) -> Value {
        let mut chunk = self.object(id_prefix, kind, choices);
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

/// One of OpenAI's two forms of an answer.
pub(crate) trait Form: Send + Unpin + 'static {
    /// What all parts repeat.
    fn head(&self) -> &Head;
    /// A chunk before any token.
    fn opening(&self) -> Option<Value>;
    /// A chunk for tokens, or nothing when there is nothing to say yet.
    fn piece(&mut self, tokens: TextTokens) -> Option<Value>;
    /// The chunk with the reason of the end.
    fn closing(&self, reason: FinishReason) -> Value;
    /// A chunk without choices.
    fn empty(&self) -> Value;
    /// Keeps tokens for [`Form::whole`].
    fn collect(&mut self, tokens: TextTokens);
    /// The whole answer.
    fn whole(&mut self, finished: &Finished) -> Value;
}

/// Name of a reason.
pub(crate) fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// Token counts as OpenAI reports them.
pub(crate) fn usage(finished: &Finished) -> Value {
    json!({
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        "prompt_tokens_details": { "cached_tokens": finished.cached_tokens },
    })
}

/// Data of the events of one answer, `[DONE]` included.
pub(crate) struct Events<F> {
    form: F,
    answer: Option<BoxStream<GenerateEvent>>,
    ready: VecDeque<String>,
}

impl<F: Form> Events<F> {
    pub(crate) fn new(form: F, answer: BoxStream<GenerateEvent>) -> Self {
        let ready = form.opening().iter().map(Value::to_string).collect();
        Self { form, answer: Some(answer), ready }
    }

    fn take(&mut self, event: GenerateEvent) {
        match event {
            GenerateEvent::Tokens(tokens) => {
                let piece = self.form.piece(tokens);
                self.ready.extend(piece.iter().map(Value::to_string));
            }
            GenerateEvent::Finished(finished) => {
                self.ready.push_back(self.form.closing(finished.reason).to_string());
                if self.form.head().include_usage {
                    let mut last = self.form.empty();
                    last["usage"] = usage(&finished);
                    self.ready.push_back(last.to_string());
                }
                self.end();
            }
            GenerateEvent::Accepted { .. } | GenerateEvent::Progress { .. } => {}
        }
    }

    fn end(&mut self) {
        self.answer = None;
        self.ready.push_back("[DONE]".to_owned());
    }
}

impl<F: Form> Stream for Events<F> {
    type Item = String;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<String>> {
        let this = &mut *self;
        loop {
            if let Some(data) = this.ready.pop_front() {
                return Poll::Ready(Some(data));
            }
            let Some(answer) = this.answer.as_mut() else { return Poll::Ready(None) };
            match std::task::ready!(answer.as_mut().poll_next(cx)) {
                Some(Ok(event)) => this.take(event),
                Some(Err(error)) => {
                    // The status is long sent; clients read the error from the stream.
                    this.ready.push_back(ApiError::from(error).body().to_string());
                    this.end();
                }
                None => this.end(),
            }
        }
    }
}
