//! One sequence that generates: from logits to the next token, the event, or the end.

use std::time::Instant;

use longshore_engine::{AnswerVisits, EventSender, Logits, SendOutcome, Sequence};
use longshore_fabric::CallContext;
use longshore_model::{RowLogits, Sampler};
use longshore_proto::types::{DecodeEvent, TokenLogprob};
use tokio_util::sync::CancellationToken;

use crate::{Error, sealing::Sealing, service::Places};

/// When a sequence ends by itself.
#[derive(Debug, Clone)]
pub(crate) struct Ending {
    /// Tokens of the answer, earlier ones included.
    pub(crate) max_tokens: u64,
    /// Positions of the sequence.
    pub(crate) context_tokens: u64,
    /// Tokens that end it; none when it shall go on after them.
    pub(crate) stop_token_ids: Vec<u32>,
}

/// One sequence that generates.
#[derive(Debug)]
pub(crate) struct Active {
    pub(crate) id: u64,
    pub(crate) ctx: CallContext,
    pub(crate) sequence: Sequence,
    /// Tokens whose rows come next; never empty.
    pub(crate) next: Vec<u32>,
    pub(crate) sampler: Sampler,
    /// Tokens of the answer so far.
    pub(crate) generated: u64,
    pub(crate) ending: Ending,
    pub(crate) events: EventSender<DecodeEvent>,
    pub(crate) sealing: Sealing,
    /// Cancels stores under way.
    pub(crate) puts: CancellationToken,
    /// Waits for its reader.
    pub(crate) paused: bool,
    /// What of its visits the counters have.
    pub(crate) counted: AnswerVisits,
    /// When the leases of all of its views were renewed.
    pub(crate) kept: Instant,
    pub(crate) _places: Places,
}

/// What follows a step.
#[derive(Debug)]
pub(crate) enum Next {
    /// Another step.
    Go,
    /// Another step once the reader took this event.
    Pause(DecodeEvent),
    /// The end.
    End(bool),
    /// Nobody reads.
    Gone,
}

impl Active {
    /// Whether it takes part in the next step.
    pub(crate) fn runs(&self) -> bool {
        !self.paused
    }

    /// What the next choice takes of the logits of a row.
    pub(crate) fn wanted(&self, vocabulary: usize) -> Logits {
        self.sampler.candidates(vocabulary).map_or(Logits::Last, Logits::Candidates)
    }

    /// Chooses the next token from the logits of a row, or the likeliest of them, and tells it.
    pub(crate) fn advance(&mut self, row: &RowLogits, vocabulary: usize) -> Result<Next, Error> {
        let sampled = self
            .sampler
            .sample_row(row, vocabulary, self.generated)
            .map_err(|error| Error::Choice { problem: error.to_string() })?;
        if self.ending.stop_token_ids.contains(&sampled.token) {
            return Ok(Next::End(true));
        }
        self.sampler.observe_generated(sampled.token);
        self.generated += 1;
        self.next.clear();
        self.next.push(sampled.token);
        let top = sampled.top.iter().map(|&(token_id, logprob)| TokenLogprob { token_id, logprob }).collect();
        let event = DecodeEvent::Token { token_id: sampled.token, logprob: sampled.logprob, top };
        Ok(match self.events.try_send(event) {
            SendOutcome::Sent => self.after_token(),
            SendOutcome::Full(event) => Next::Pause(event),
            SendOutcome::Gone => Next::Gone,
        })
    }

    /// The last event.
    pub(crate) fn finished(&self, stopped: bool) -> DecodeEvent {
        let AnswerVisits { blocks, of } = self.sequence.answer_visits();
        DecodeEvent::Finished { stopped, visited_blocks: blocks, causal_blocks: of }
    }

    /// What follows once the reader has the last token.
    pub(crate) fn after_token(&self) -> Next {
        let tokens = self.sequence.position() + self.next.len() as u64;
        match self.generated >= self.ending.max_tokens || tokens >= self.ending.context_tokens {
            true => Next::End(false),
            false => Next::Go,
        }
    }
}
