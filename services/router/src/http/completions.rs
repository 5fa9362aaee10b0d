//! Answers of `/v1/completions`.

use longshore_proto::types::{FinishReason, Finished, TextTokens, TokenChoice};
use serde_json::{Map, Value, json};

use super::events::{Form, Head, reason_name, usage};

const ID_PREFIX: &str = "cmpl";
const KIND: &str = "text_completion";

/// The form of a completion.
#[derive(Debug)]
pub(crate) struct CompletionsForm {
    head: Head,
    /// Characters of the tokens so far.
    offset: usize,
    text: String,
    logprobs: Vec<TokenChoice>,
}

impl CompletionsForm {
    pub(crate) fn new(head: Head) -> Self {
        Self { head, offset: 0, text: String::new(), logprobs: Vec::new() }
    }

    /// Parallel lists, one entry a token; offsets count characters from the start of the answer.
    fn logprobs(&mut self, choices: &[TokenChoice]) -> Value {
        if !self.head.logprobs {
            return Value::Null;
        }
        let (mut tokens, mut logprobs, mut tops, mut offsets) = (vec![], vec![], vec![], vec![]);
        for choice in choices {
            let top = choice.top.iter().map(|(token, text)| (text.clone(), json!(token.logprob)));
            tokens.push(json!(choice.text));
            logprobs.push(json!(choice.chosen.logprob));
            tops.push(Value::Object(top.collect::<Map<_, _>>()));
            offsets.push(json!(self.offset));
            self.offset += choice.text.chars().count();
        }
        json!({ "tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets })
    }
}

impl Form for CompletionsForm {
    fn head(&self) -> &Head {
        &self.head
    }

    fn opening(&self) -> Option<Value> {
        None
    }

    fn piece(&mut self, tokens: TextTokens) -> Option<Value> {
        if tokens.text.is_empty() && tokens.logprobs.is_empty() {
            return None;
        }
        let logprobs = self.logprobs(&tokens.logprobs);
        let choice = json!({ "index": 0, "text": tokens.text, "logprobs": logprobs, "finish_reason": null });
        Some(self.head.chunk(ID_PREFIX, KIND, json!([choice])))
    }

    fn closing(&self, reason: FinishReason) -> Value {
        let choice =
            json!({ "index": 0, "text": "", "logprobs": null, "finish_reason": reason_name(reason) });
        self.head.chunk(ID_PREFIX, KIND, json!([choice]))
    }

    fn empty(&self) -> Value {
        self.head.object(ID_PREFIX, KIND, json!([]))
    }

    fn collect(&mut self, tokens: TextTokens) {
        self.text.push_str(&tokens.text);
        self.logprobs.extend(tokens.logprobs);
    }

    fn whole(&mut self, finished: &Finished) -> Value {
        let choices = std::mem::take(&mut self.logprobs);
        let logprobs = self.logprobs(&choices);
        let choice = json!({
            "index": 0, "text": self.text, "logprobs": logprobs, "finish_reason": reason_name(finished.reason),
        });
        let mut whole = self.head.object(ID_PREFIX, KIND, json!([choice]));
        whole["usage"] = usage(finished);
        whole
    }
}
