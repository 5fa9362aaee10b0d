//! From token ids to what the client reads: text, stop strings, log-probabilities.

use std::sync::Arc;

use longshore_model::{ModelInfo, TextStream};
use longshore_proto::types::{TextTokens, TokenChoice, TokenLogprob};

use super::stop::{Released, StopFilter};

/// One decoded token.
#[derive(Debug, Clone)]
pub(crate) struct Decoded {
    /// Vocabulary id.
    pub(crate) token_id: u32,
    /// ln p, when asked for.
    pub(crate) logprob: Option<f32>,
    /// Most likely tokens, best first.
    pub(crate) top: Vec<TokenLogprob>,
}

/// The text side of one answer. It outlives the decode worker: after a takeover the text goes on where it was.
#[derive(Debug)]
pub(crate) struct Answer {
    model: Arc<ModelInfo>,
    text: TextStream,
    filter: StopFilter,
    stopped: bool,
}

impl Answer {
    pub(crate) fn new(model: Arc<ModelInfo>, stops: Vec<String>) -> Self {
        Self { model, text: TextStream::default(), filter: StopFilter::new(stops), stopped: false }
    }

    /// Takes the next token; the bool says that a stop string was completed.
    pub(crate) fn push(&mut self, decoded: Decoded) -> (TextTokens, bool) {
        let text = self.text.push(&self.model.tokenizer, decoded.token_id);
        let released = self.filter.push(&text);
        self.stopped |= released.stopped;
        let logprobs = decoded.logprob.map(|logprob| self.choice(&decoded, logprob)).into_iter().collect();
        let tokens = TextTokens { text: released.text, token_ids: vec![decoded.token_id], logprobs };
        (tokens, released.stopped)
    }

    /// Whether a stop string ended the answer.
    pub(crate) fn stopped(&self) -> bool {
        self.stopped
    }

    /// Text that was held back, now that no more tokens come. A stop string that ends in it still counts.
    pub(crate) fn finish(&mut self) -> Released {
        let rest = std::mem::take(&mut self.text).finish();
        let mut released = self.filter.push(&rest);
        if !released.stopped {
            released.text.push_str(&self.filter.finish());
        }
        released
    }

    fn choice(&self, decoded: &Decoded, logprob: f32) -> TokenChoice {
        let top = decoded.top.iter().map(|choice| (*choice, self.token_text(choice.token_id)));
        TokenChoice {
            chosen: TokenLogprob { token_id: decoded.token_id, logprob },
            text: self.token_text(decoded.token_id),
            top: top.collect(),
        }
    }

    fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(&self.model.tokenizer.decode_piece(id)).into_owned()
    }
}
