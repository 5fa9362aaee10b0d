//! What clients ask for and get.

mod convert;
mod events;

/// How the next token is chosen, with every default filled in and every range checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy; at most 100.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 0 < p <= 1.
    pub top_p: f32,
    /// 0 to 1.
    pub min_p: f32,
    /// > 0, at most 10.
    pub repetition_penalty: f32,
    /// -2 to 2.
    pub presence_penalty: f32,
    /// -2 to 2.
    pub frequency_penalty: f32,
    /// `None`: the router draws one.
    pub seed: Option<u64>,
    /// `None`: 256, or less where the context ends sooner. Never 0.
    pub max_tokens: Option<u32>,
    /// Alternatives to report, 0 to 20; `None`: no log-probabilities.
    pub logprobs: Option<u32>,
    /// Go on after an end-of-sequence token.
    pub ignore_eos: bool,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
            max_tokens: None,
            logprobs: None,
            ignore_eos: false,
        }
    }
}

/// Natural-log probability of one token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// Vocabulary id.
    pub token_id: u32,
    /// ln p.
    pub logprob: f32,
}

/// Parameters of one generation.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerateStart {
    /// Model; empty means the only one.
    pub model: String,
    /// Sampling.
    pub sampling: Sampling,
    /// Strings that end the answer; at most 16 of 1 to 256 bytes.
    pub stop: Vec<String>,
    /// Tenant secret, at most 256 bytes.
    pub cache_salt: Vec<u8>,
    /// Name in logs; empty: the router makes one.
    pub request_id: String,
    /// Send progress events.
    pub progress: bool,
    /// Do not add the beginning-of-sequence token to text.
    pub skip_special_tokens: bool,
    /// How the prompt's attention visits its prefix; printable ASCII, at most 256 bytes. Empty: the deployment's default.
    pub prefill_policy: String,
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Text.
    pub content: String,
}

/// A piece of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptChunk {
    /// Text, joined before it is tokenized.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
    /// A message of a conversation.
    Message(ChatMessage),
}

/// A whole prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Text.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
    /// A conversation.
    Chat(Vec<ChatMessage>),
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct TextTokens {
    /// Text that became certain.
    pub text: String,
    /// Vocabulary ids.
    pub token_ids: Vec<u32>,
    /// One per id when asked for, else empty.
    pub logprobs: Vec<TokenChoice>,
}

/// Log-probabilities at one step.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenChoice {
    /// The token that was taken.
    pub chosen: TokenLogprob,
    /// Its text.
    pub text: String,
    /// Most likely tokens with their texts, best first.
    pub top: Vec<(TokenLogprob, String)>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// End-of-sequence token or stop string.
    Stop,
    /// `max_tokens` or the context limit.
    Length,
}

/// KV bytes of one sequence on one shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardBytes {
    /// Shard id.
    pub shard_id: String,
    /// Bytes.
    pub kv_bytes: u64,
}

/// Totals of one answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// Why it ended.
    pub reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Prompt tokens found in the cluster.
    pub cached_tokens: u64,
    /// Tokens of the answer.
    pub completion_tokens: u64,
    /// Milliseconds from the end of the prompt stream to the first token.
    pub time_to_first_token_ms: f64,
    /// KV bytes by shard.
    pub placement: Vec<ShardBytes>,
    /// How often another worker had to take over.
    pub resumed: u32,
    /// Blocks that rows of the answer visited under a policy with streaming heads, as far as the last decode worker tells; else 0.
    pub visited_blocks: u64,
    /// Blocks that exact attention would have visited for them.
    pub causal_blocks: u64,
}

/// One event of an answer stream.
#[derive(Debug, Clone, PartialEq)]
pub enum GenerateEvent {
    /// The prompt was read and placed.
    Accepted {
        /// Name in logs.
        request_id: String,
        /// Tokens of the prompt.
        prompt_tokens: u64,
        /// Prompt tokens found in the cluster.
        cached_tokens: u64,
        /// Model that answers.
        model: String,
        /// Canonical text of the prefill policy in use.
        prefill_policy: String,
    },
    /// The prefill moved on.
    Progress {
        /// Prompt tokens whose KV exists.
        done_tokens: u64,
        /// Prompt tokens in all.
        total_tokens: u64,
    },
    /// Tokens.
    Tokens(TextTokens),
    /// The end.
    Finished(Finished),
}
