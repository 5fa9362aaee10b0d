//! Flags of the search for head plans.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::serve::ServeArgs;

/// Flags of `longshore calibrate`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
What it does
  Reads prompts exactly (texts and generated retrieval tasks) and looks, in every layer and KV head, at sampled query tiles from
  `--from` on: how far would the output of attention be from the exact one if the head visited less?

  budgets  tries scorers and selectors of mean-corrected blocks and gives each head the cheapest that keeps `--target-error`,
           or all keys. Writes our own format, with one level for each target. A level named like a preset (`balanced`,
           `faithful`, `fast`) is what that preset means where the plan is given; others are `heads:level=NAME`.
  patterns chooses for each KV head among A-shape, vertical-slash and block-sparse at equal cost (`--budget`, in keys that the
           executor really visits) the pattern with the smallest error behind the output projection: MInference's search.
           Writes MInference's JSON, for the policies `minference` and `heads`.

  The same model, flags and texts give the same plan. Calibrate on other texts than you judge with (`longshore eval`).

Examples:
  longshore calibrate --out plan.json
  longshore calibrate --target-error balanced=0.15 --target-error faithful=0.05 --text manual.txt --out plan.json
  longshore calibrate --search patterns --budget 0.3 --out smollm2-minference.json
  longshore eval fidelity --head-plan plan.json --policy balanced --policy balanced:plan=off
  longshore up --head-plan plan.json --prefill-policy balanced")]
pub(crate) struct CalibrateArgs {
    /// Model and threads, as every server takes them.
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    /// What to search for.
    #[arg(long, value_enum, default_value_t = Search::Budgets)]
    pub(crate) search: Search,
    /// File to write the plan into.
    #[arg(long, short, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// A level of budgets, NAME=ERROR: the 95th percentile of the relative L2 error of a head's output is at most ERROR, the median at
    /// most a third of it; may be repeated.
    #[arg(long = "target-error", value_name = "NAME=ERROR", default_value = "balanced=0.15")]
    pub(crate) targets: Vec<String>,
    /// Share of the keys that exact attention visits which a pattern may cost.
    #[arg(long, value_name = "SHARE", default_value_t = 0.3)]
    pub(crate) budget: f64,
    /// Text to read; may be repeated [default: the project's own sources].
    #[arg(long = "text", value_name = "FILE")]
    pub(crate) texts: Vec<PathBuf>,
    /// Generated retrieval prompts.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub(crate) retrieval: u32,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1024..=1 << 24))]
    pub(crate) tokens: u32,
    /// Position from which on query tiles are looked at, as policies leave earlier rows exact.
    #[arg(long, value_name = "POSITION", default_value_t = 4096)]
    pub(crate) from: u32,
    /// Query tiles that are looked at in each prompt.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) tiles: u32,
    /// Seed of the generated prompts.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Write all that was measured as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

/// What is searched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Search {
    /// Scorer and selector of each KV head, by target error.
    Budgets,
    /// MInference's pattern of each KV head, at equal cost.
    Patterns,
}
