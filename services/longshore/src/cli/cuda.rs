//! Flags of what checks the GPU half.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::serve::ServeArgs;

/// What to check.
#[derive(Debug, Subcommand)]
pub(crate) enum CudaCommand {
    /// Compare every kernel with the CPU's results on this machine's GPU.
    Selftest(Box<SelftestArgs>),
}

/// Flags of `longshore cuda selftest`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  longshore cuda selftest                        every case, on the first GPU; greedy tokens of the default model where it is there
  longshore cuda selftest --model FILE           greedy tokens of another
  longshore cuda selftest --only prefill         those whose name has it
  longshore cuda selftest --list                 their names; needs no GPU")]
pub(crate) struct SelftestArgs {
    /// Device and libraries, as every server takes them.
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    /// Only cases whose name contains this.
    #[arg(long, value_name = "TEXT")]
    pub(crate) only: Option<String>,
    /// Name the cases and end.
    #[arg(long)]
    pub(crate) list: bool,
    /// Write all results as JSON; `-` is standard output, where the table is left out then.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}
