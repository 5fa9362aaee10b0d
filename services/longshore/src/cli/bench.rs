//! Flags of the measurements.

use clap::{Args, Subcommand};

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Time to first token and inter-token latency of any OpenAI endpoint.
    Serve(BenchServeArgs),
}

/// Flags of `longshore bench serve`.
#[derive(Debug, Args)]
pub(crate) struct BenchServeArgs {
    /// Base address of the endpoint, with or without `/v1`.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub(crate) url: String,
    /// Model name [default: the first that /v1/models lists].
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Requests in all.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) requests: u32,
    /// Requests at the same time.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) concurrency: u32,
    /// Words of each prompt; a word is about one to two tokens, the endpoint's own count is reported.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=4_000_000))]
    pub(crate) prompt_words: u32,
    /// Tokens to generate for each request.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) max_tokens: u32,
    /// Words that all prompts share at the beginning, to measure the prefix cache.
    #[arg(long, default_value_t = 0)]
    pub(crate) shared_words: u32,
    /// Seed of the prompts.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Bearer token, if the endpoint wants one.
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}
