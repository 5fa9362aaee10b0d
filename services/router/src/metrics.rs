//! Counters of the front door.

mod index;

use std::time::Duration;

use longshore_chassis::Metrics;
use longshore_fabric::Code;
use longshore_proto::types::FinishReason;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
};

pub use index::IndexMetrics;

/// Buckets of the time to first token, in seconds; those of vLLM, so that dashboards compare.
const FIRST_TOKEN_BUCKETS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// Buckets of the time between two tokens, in seconds; those of vLLM.
const INTER_TOKEN_BUCKETS: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// Buckets of the time of whole requests, in seconds; those of vLLM.
const REQUEST_BUCKETS: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The answer is complete: end-of-sequence token or stop string.
    Stop,
    /// The answer is complete: `max_tokens` or the context limit.
    Length,
    /// It failed.
    Failed(Code),
}

impl From<FinishReason> for Outcome {
    fn from(reason: FinishReason) -> Self {
        match reason {
            FinishReason::Stop => Self::Stop,
            FinishReason::Length => Self::Length,
        }
    }
}

/// Label of [`RouterMetrics::requests`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OutcomeLabel {
    /// How the request ended.
    pub outcome: Outcome,
}

/// Label of [`RouterMetrics::prefill_policy`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PolicyLabel {
    /// Name of the policy without its parameters, or `other`.
    pub policy: String,
}

impl EncodeLabelValue for Outcome {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        let name = match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Failed(code) => code_name(*code),
        };
        name.encode(encoder)
    }
}

/// Name of a code in labels and logs.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Cancelled => "cancelled",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
    }
}

/// Counters of one router. Clones share them.
#[derive(Debug, Clone)]
pub struct RouterMetrics {
    /// Requests that ended, by outcome.
    pub requests: Family<OutcomeLabel, Counter>,
    /// Requests that run.
    pub in_flight: Gauge,
    /// Requests that wait for a place.
    pub queued: Gauge,
    /// Requests refused because the queue was full or the wait too long.
    pub rejected: Counter,
    /// Accepted requests, by prefill policy.
    pub prefill_policy: Family<PolicyLabel, Counter>,
    /// Tokens of accepted prompts.
    pub prompt_tokens: Counter,
    /// Prompt tokens whose KV was found.
    pub cached_tokens: Counter,
    /// Generated tokens.
    pub generated_tokens: Counter,
    /// Answers that another worker took over.
    pub resumes: Counter,
    /// Lookups that failed and counted as a miss.
    pub lookup_failures: Counter,
    /// What the shards' inventories told.
    pub index: IndexMetrics,
    /// Workers refused because they do not fit.
    pub mismatches: Counter,
    /// Time from the end of the prompt to the first token.
    pub first_token_seconds: Histogram,
    /// Time between two tokens.
    pub inter_token_seconds: Histogram,
    /// Time of whole requests, waiting included.
    pub request_seconds: Histogram,
}

impl Default for RouterMetrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            in_flight: Gauge::default(),
            queued: Gauge::default(),
            rejected: Counter::default(),
            prefill_policy: Family::default(),
            prompt_tokens: Counter::default(),
            cached_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            resumes: Counter::default(),
            lookup_failures: Counter::default(),
            index: IndexMetrics::default(),
            mismatches: Counter::default(),
            first_token_seconds: Histogram::new(FIRST_TOKEN_BUCKETS),
            inter_token_seconds: Histogram::new(INTER_TOKEN_BUCKETS),
            request_seconds: Histogram::new(REQUEST_BUCKETS),
        }
    }
}

impl RouterMetrics {
    /// New counters, registered as `longshore_router_…`.
    pub fn register(metrics: &Metrics) -> Self {
        let own = Self::default();
        let to = metrics.sub("longshore_router");
        to.register("requests", "Requests that ended, by outcome", own.requests.clone());
        to.register("requests_in_flight", "Requests that run", own.in_flight.clone());
        to.register("requests_queued", "Requests that wait for a place", own.queued.clone());
        to.register("requests_rejected", "Requests refused for lack of room", own.rejected.clone());
        to.register("prefill_policy", "Accepted requests, by prefill policy", own.prefill_policy.clone());
        to.register("prompt_tokens", "Tokens of accepted prompts", own.prompt_tokens.clone());
        to.register("cached_tokens", "Prompt tokens whose KV was found", own.cached_tokens.clone());
        to.register("generated_tokens", "Tokens generated", own.generated_tokens.clone());
        to.register("resumes", "Answers that another worker took over", own.resumes.clone());
        to.register(
            "lookup_failures",
            "Shard lookups that failed and counted as a miss",
            own.lookup_failures.clone(),
        );
        own.index.register(&to);
        to.register("worker_mismatches", "Workers refused because they do not fit", own.mismatches.clone());
        let first = own.first_token_seconds.clone();
        to.register("time_to_first_token_seconds", "Time from the end of a prompt to its first token", first);
        let inter = own.inter_token_seconds.clone();
        to.register("inter_token_latency_seconds", "Time between two tokens of one answer", inter);
        let whole = own.request_seconds.clone();
        to.register("request_seconds", "Time of whole requests, waiting included", whole);
        own
    }

    /// Counts a request that ended.
    pub(crate) fn ended(&self, outcome: Outcome, took: Duration) {
        self.requests.get_or_create(&OutcomeLabel { outcome }).inc();
        self.request_seconds.observe(took.as_secs_f64());
    }
}
