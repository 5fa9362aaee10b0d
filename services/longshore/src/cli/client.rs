//! Flags of the clients.

use std::path::PathBuf;

use clap::Args;

use super::serve::policy_names;

/// Flags of `longshore generate`.
#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    /// The prompt; read from standard input when neither this nor --file is given.
    pub(crate) prompt: Option<String>,
    /// Read the prompt from a UTF-8 file.
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    pub(crate) file: Option<PathBuf>,
    /// Read the prompt as token ids (decimal, separated by white space) from a file.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "file"])]
    pub(crate) token_file: Option<PathBuf>,
    /// gRPC address of a router.
    #[arg(long, default_value = "http://127.0.0.1:9000", env = "LONGSHORE_URL")]
    pub(crate) url: String,
    /// Do not add the beginning-of-sequence token.
    #[arg(long)]
    pub(crate) no_bos: bool,
    /// Sampling.
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

/// Flags of `longshore chat`.
#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    /// System message.
    #[arg(long)]
    pub(crate) system: Option<String>,
    /// gRPC address of a router.
    #[arg(long, default_value = "http://127.0.0.1:9000", env = "LONGSHORE_URL")]
    pub(crate) url: String,
    /// Sampling.
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

/// How the answer is drawn.
#[derive(Debug, Args)]
pub(crate) struct SamplingArgs {
    /// Model name, when the cluster serves several.
    #[arg(long = "model", value_name = "NAME")]
    pub(crate) model_name: Option<String>,
    /// Softmax temperature; 0 always takes the most likely token.
    #[arg(short, long, default_value_t = 0.0, allow_hyphen_values = true)]
    pub(crate) temperature: f32,
    /// Most tokens to generate [default: 256].
    #[arg(short = 'n', long)]
    pub(crate) max_tokens: Option<u32>,
    /// Seed of the random choice; equal seeds give equal answers.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Keep the K most likely tokens.
    #[arg(long)]
    pub(crate) top_k: Option<u32>,
    /// Keep the smallest set of tokens whose probability reaches P.
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) top_p: Option<f32>,
    /// Drop tokens less likely than this share of the most likely one.
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) min_p: Option<f32>,
    /// Divides the logits of tokens seen already.
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) repetition_penalty: Option<f32>,
    /// Subtracted from the logits of tokens in the answer.
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) presence_penalty: Option<f32>,
    /// Subtracted once per occurrence in the answer.
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) frequency_penalty: Option<f32>,
    /// A string that ends the answer; may be given up to 16 times.
    #[arg(long)]
    pub(crate) stop: Vec<String>,
    #[arg(long, value_name = "POLICY", help = policy_help())]
    pub(crate) prefill_policy: Option<String>,
    /// Secret that keeps your cached blocks apart from everybody else's.
    #[arg(long)]
    pub(crate) cache_salt: Option<String>,
}

fn policy_help() -> String {
    format!("How the prompt's attention visits its prefix: {} [default: the router's]", policy_names())
}
