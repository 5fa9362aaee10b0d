//! Flags of `longshore bench trace`.

use std::path::PathBuf;

use clap::Args;

/// Flags of `longshore bench trace`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  longshore bench trace conversation_trace.jsonl                        every policy at 1 to 100 % of the trace's blocks
  longshore bench trace conversation_trace.jsonl --shards 4 --bound     four shards, and what cannot be exceeded
  longshore bench trace --synthetic 4000 --policy reuse --policy lru    a trace that is made up here")]
pub(crate) struct BenchTraceArgs {
    /// Requests, one JSON object a line, as Mooncake publishes them [default: a trace that is made up].
    pub(crate) file: Option<PathBuf>,
    /// Requests of the trace that is made up.
    #[arg(long, value_name = "REQUESTS", default_value_t = 4000, conflicts_with = "file", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) synthetic: u32,
    /// Seed of the trace that is made up.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Tokens that one id of the trace stands for.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(crate) block_tokens: u32,
    /// Capacities as percentages of the trace's different blocks.
    #[arg(long, value_delimiter = ',', value_name = "PERCENT", default_value = "1,2,5,10,20,50,100", value_parser = percent)]
    pub(crate) percent: Vec<f64>,
    /// Capacities in tokens instead.
    #[arg(long, value_delimiter = ',', value_name = "TOKENS", value_parser = clap::value_parser!(u64).range(1..=1 << 48))]
    pub(crate) tokens: Vec<u64>,
    /// An eviction policy; may be repeated [default: all].
    #[arg(long = "policy", value_name = "POLICY")]
    pub(crate) policies: Vec<String>,
    /// Shards that the capacity and the stripes are dealt to.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub(crate) shards: u64,
    /// Time for which blocks are kept whatever happens; 0: during their own request only.
    #[arg(long, default_value_t = 0, value_name = "MS", value_parser = clap::value_parser!(u64).range(0..=3_600_000))]
    pub(crate) retention_ms: u64,
    /// Also replay the first policy with a disk of so many times the memory below it, by each admission rule.
    #[arg(long, value_name = "TIMES", value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub(crate) disk: Option<u64>,
    /// Also estimate what a policy without foresight cannot exceed.
    #[arg(long)]
    pub(crate) bound: bool,
    /// Write all figures as JSON; `-` is standard output, where the tables are left out then.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Draw hit rates against capacity as SVG.
    #[arg(long, value_name = "FILE")]
    pub(crate) plot: Option<PathBuf>,
}

fn percent(text: &str) -> Result<f64, String> {
    let percent: f64 = text.parse().map_err(|_| "must be a number".to_owned())?;
    let valid = percent > 0.0 && percent <= 100.0;
    valid.then_some(percent).ok_or_else(|| "must be above 0 and at most 100".to_owned())
}
