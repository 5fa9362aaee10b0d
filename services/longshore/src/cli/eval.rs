//! Flags of the evaluation.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::serve::ServeArgs;

/// What to look at.
#[derive(Debug, Subcommand)]
pub(crate) enum EvalCommand {
    /// One fact hidden in noise, by depth and length.
    Needle(Box<TaskArgs>),
    /// Generated tasks of RULER, needle threading and ancestral trace.
    Ruler(Box<RulerArgs>),
    /// Keys and values with a recall model (`longshore model make-recall`), at any length.
    Recall(Box<RecallArgs>),
    /// Attention, logits and answers of a policy beside those of exact attention, layer by layer.
    Fidelity(Box<FidelityArgs>),
    /// Perplexity of a long natural text.
    Ppl(Box<PerplexityArgs>),
    /// Scorers and selectors at equal density, with and without mean correction, on planted attention or a model's own.
    Scorers(Box<ScorersArgs>),
}

/// Flags of every evaluation.
#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// Model and threads, as every server takes them.
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    /// A prefill policy to compare with `exact`; may be repeated.
    #[arg(long = "policy", value_name = "POLICY", default_value = "balanced")]
    pub(crate) policies: Vec<String>,
    /// Leave `exact` out, where it would take too long.
    #[arg(long)]
    pub(crate) skip_exact: bool,
    /// Where the results go besides standard output.
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Where results go.
#[derive(Debug, Args)]
pub(crate) struct OutputArgs {
    /// Write everything measured as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write the tables (Markdown), everything measured (JSON) and pictures (SVG) into a folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
}

/// Flags of generated tasks.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  longshore eval needle --lengths 4096,8192 --policy balanced --policy streaming
  longshore eval needle --lengths 32768 --rope-scaling yarn:4 --max-context-tokens 32768 --out pictures")]
pub(crate) struct TaskArgs {
    /// What every evaluation takes.
    #[command(flatten)]
    pub(crate) eval: EvalArgs,
    /// Tokens of a prompt and its answer.
    #[arg(long, value_delimiter = ',', value_name = "TOKENS", default_value = "4096,8192", value_parser = clap::value_parser!(u32).range(256..=1 << 24))]
    pub(crate) lengths: Vec<u32>,
    /// Depths of the needle, evenly spaced from the beginning to the end.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) depths: u32,
    /// Prompts of each point.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) samples: u32,
    /// Give the prompt as bare text, even if the model has a chat template.
    #[arg(long)]
    pub(crate) no_chat: bool,
}

/// Flags of `longshore eval ruler`.
#[derive(Debug, Args)]
pub(crate) struct RulerArgs {
    /// What every evaluation takes.
    #[command(flatten)]
    pub(crate) eval: EvalArgs,
    /// Tasks [default: all].
    #[arg(long, value_delimiter = ',', value_name = "TASKS")]
    pub(crate) only: Vec<RulerTask>,
    /// Tokens of a prompt and its answer.
    #[arg(long, value_delimiter = ',', value_name = "TOKENS", default_value = "4096,8192", value_parser = clap::value_parser!(u32).range(1024..=1 << 24))]
    pub(crate) lengths: Vec<u32>,
    /// Prompts of each task and length.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) samples: u32,
    /// Give the prompt as bare text, even if the model has a chat template.
    #[arg(long)]
    pub(crate) no_chat: bool,
}

/// Generated tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RulerTask {
    /// One key, one value, noise.
    NiahSingle,
    /// One key among many others.
    NiahMultikey,
    /// All values of a key that has four.
    NiahMultivalue,
    /// The values of four keys.
    NiahMultiquery,
    /// Variables that were assigned to each other.
    Vt,
    /// The ten most common words of a list.
    Cwe,
    /// The three most frequent coded words.
    Fwe,
    /// A chain of keys through a JSON object.
    Threading,
    /// An ancestor, over several relations.
    Ancestry,
    /// The label of a text, by many examples whose labels are codes: the score is the share of right labels.
    ManyShot,
}

/// Flags of `longshore eval recall`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  longshore model make-recall recall && longshore eval recall --model recall --lengths 32768
  longshore eval recall --model recall --lengths 1000000 --policy balanced:dense_layers=0 --skip-exact")]
pub(crate) struct RecallArgs {
    /// What every evaluation takes.
    #[command(flatten)]
    pub(crate) eval: EvalArgs,
    /// Tokens of a prompt.
    #[arg(long, value_delimiter = ',', value_name = "TOKENS", default_value = "8192,32768", value_parser = clap::value_parser!(u32).range(64..=1 << 21))]
    pub(crate) lengths: Vec<u32>,
    /// Pairs of key and value in a prompt [default: one in 256 tokens, at most what the vocabulary has].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(crate) pairs: Option<u32>,
    /// Keys that are asked at the end of the prompt.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) asked: u32,
    /// Keys that are asked in the middle of the prompt, where rows are sparse.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(0..=4096))]
    pub(crate) asked_midway: u32,
    /// Put the pairs side by side instead of apart in filler: means of blocks then hide each of them behind others.
    #[arg(long)]
    pub(crate) crowded: bool,
    /// Prompts of each length.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) samples: u32,
}

/// Flags of `longshore eval fidelity`.
#[derive(Debug, Args)]
pub(crate) struct FidelityArgs {
    /// What every evaluation takes.
    #[command(flatten)]
    pub(crate) eval: EvalArgs,
    /// Text to read [default: the project's own documents and licence].
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,
    /// Tokens of it.
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u32).range(128..=1 << 24))]
    pub(crate) tokens: u32,
    /// Rows whose attention is compared, in each layer.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) rows: u32,
    /// Heads whose attention is drawn, as `layer.head` of KV heads, with `--out`.
    #[arg(long, value_delimiter = ',', value_name = "LAYER.HEAD", default_value = "0.0")]
    pub(crate) draw: Vec<String>,
}

/// Flags of `longshore eval ppl`.
#[derive(Debug, Args)]
pub(crate) struct PerplexityArgs {
    /// What every evaluation takes.
    #[command(flatten)]
    pub(crate) eval: EvalArgs,
    /// Text to read [default: the project's own documents and licence].
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,
    /// Tokens of it.
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u32).range(128..=1 << 24))]
    pub(crate) tokens: u32,
}

/// Flags of `longshore eval scorers`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  longshore eval scorers                                          planted heads, 32,768 positions
  longshore eval scorers --layers all --tokens 8192               heads of the model that read a text
  longshore eval scorers --layers 4,6,9 --density 10 --out found")]
pub(crate) struct ScorersArgs {
    /// Model and threads, as every server takes them; planted heads need no model.
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    /// Where the results go besides standard output.
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Take the queries, keys and values of these layers of the model instead of planted ones; `all` of them.
    #[arg(long, value_delimiter = ',', value_name = "LAYERS")]
    pub(crate) layers: Vec<String>,
    /// Text that the model reads [default: the project's own documents and licence].
    #[arg(long, value_name = "FILE", requires = "layers")]
    pub(crate) text: Option<PathBuf>,
    /// Positions [default: 32,768 planted, 8,192 of a model].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1024..=1 << 18))]
    pub(crate) tokens: Option<u32>,
    /// Percent of the keys of exact attention that each rule is made to visit, means counted as keys.
    #[arg(long, value_delimiter = ',', value_name = "PERCENT", default_value = "5,10,20,40")]
    pub(crate) density: Vec<f64>,
    /// Query tiles of each layer whose attention is compared, evenly spaced over the second half.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) tiles: u32,
}
