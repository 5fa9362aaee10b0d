//! What the router asks of workers.

use super::{Identity, Sampling, TokenLogprob};

mod convert;

/// Parameters of one prefill; the tokens follow in chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefillStart {
    /// Name of the request in logs.
    pub request_id: String,
    /// What the KV depends on.
    pub identity: Identity,
    /// Tokens that follow.
    pub prompt_tokens: u64,
    /// Leading blocks that the store holds already.
    pub cached_blocks: u64,
    /// Canonical text of the policy that the namespace was made with; printable ASCII, 1 to 256 bytes.
    pub prefill_policy: String,
    /// Position from which on rows are exact whatever the policy.
    pub dense_from: u64,
}

/// One event of a prefill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefillEvent {
    /// The computation moved on.
    Progress {
        /// Tokens whose KV exists, cached ones included.
        done_tokens: u64,
    },
    /// Every full block is stored and acknowledged.
    Finished {
        /// Blocks computed by this call.
        computed_blocks: u64,
        /// Bytes of KV sent.
        stored_bytes: u64,
    },
}

/// Parameters of one decode; the tokens follow in chunks.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodeStart {
    /// Name of the request in logs.
    pub request_id: String,
    /// What the KV depends on.
    pub identity: Identity,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens generated earlier, which follow the prompt.
    pub generated_tokens: u64,
    /// Sampling.
    pub sampling: Sampling,
    /// Tokens that end the sequence.
    pub stop_token_ids: Vec<u32>,
}

/// One event of a decode.
#[derive(Debug, Clone, PartialEq)]
pub enum DecodeEvent {
    /// The next token.
    Token {
        /// Vocabulary id.
        token_id: u32,
        /// ln p, when asked for.
        logprob: Option<f32>,
        /// Most likely tokens, best first, when asked for.
        top: Vec<TokenLogprob>,
    },
    /// The sequence ended.
    Finished {
        /// True: a stop token. False: `max_tokens` or the context limit.
        stopped: bool,
    },
}
