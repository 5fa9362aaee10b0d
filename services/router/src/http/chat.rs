//! Answers of `/v1/chat/completions`.

use longshore_proto::types::{FinishReason, Finished, TextTokens, TokenChoice};
use serde_json::{Value, json};

use super::events::{Form, Head, reason_name, usage};

const ID_PREFIX: &str = "chatcmpl";
const CHUNK: &str = "chat.completion.chunk";
const WHOLE: &str = "chat.completion";

/// The form of a chat answer.
#[derive(Debug)]
pub(crate) struct ChatForm {
    head: Head,
    text: String,
    logprobs: Vec<Value>,
}

impl ChatForm {
    pub(crate) fn new(head: Head) -> Self {
        Self { head, text: String::new(), logprobs: Vec::new() }
    }

    fn chunk(&self, delta: Value, logprobs: Value, reason: Option<FinishReason>) -> Value {
        let reason = reason.map(reason_name);
        let choice = json!({ "index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason });
        self.head.chunk(ID_PREFIX, CHUNK, json!([choice]))
    }

    /// One token with its raw bytes, from which clients put together characters that span tokens.
    fn logprob(&self, choice: &TokenChoice) -> Value {
        let entry = |id: u32, text: &str, logprob: f32| json!({ "token": text, "logprob": logprob, "bytes": self.head.router.token_bytes(id) });
        let top = choice.top.iter().map(|(token, text)| entry(token.token_id, text, token.logprob));
        let top: Vec<Value> = top.collect();
        let mut value = entry(choice.chosen.token_id, &choice.text, choice.chosen.logprob);
        value["top_logprobs"] = Value::Array(top);
        value
    }

    fn logprobs(&self, choices: &[TokenChoice]) -> Vec<Value> {
        choices.iter().map(|choice| self.logprob(choice)).collect()
    }
}

impl Form for ChatForm {
    fn head(&self) -> &Head {
        &self.head
    }

    fn opening(&self) -> Option<Value> {
        Some(self.chunk(json!({ "role": "assistant", "content": "" }), Value::Null, None))
    }

    fn piece(&mut self, tokens: TextTokens) -> Option<Value> {
        if tokens.text.is_empty() && tokens.logprobs.is_empty() {
            return None;
        }
        let logprobs = match self.head.logprobs {
            true => json!({ "content": self.logprobs(&tokens.logprobs) }),
            false => Value::Null,
        };
        Some(self.chunk(json!({ "content": tokens.text }), logprobs, None))
    }

    fn closing(&self, reason: FinishReason) -> Value {
        self.chunk(json!({}), Value::Null, Some(reason))
    }

    fn empty(&self) -> Value {
        self.head.object(ID_PREFIX, CHUNK, json!([]))
    }

    fn collect(&mut self, tokens: TextTokens) {
        self.text.push_str(&tokens.text);
        let logprobs = self.logprobs(&tokens.logprobs);
        self.logprobs.extend(logprobs);
    }

    fn whole(&mut self, finished: &Finished) -> Value {
        let logprobs = match self.head.logprobs {
            true => json!({ "content": self.logprobs }),
            false => Value::Null,
        };
        let choice = json!({
            "index": 0, "message": { "role": "assistant", "content": self.text, "refusal": null },
            "logprobs": logprobs, "finish_reason": reason_name(finished.reason),
        });
        let mut whole = self.head.object(ID_PREFIX, WHOLE, json!([choice]));
        whole["usage"] = usage(finished);
        whole
    }
}
