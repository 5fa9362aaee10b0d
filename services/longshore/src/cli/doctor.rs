//! Flags of the examination.

use clap::Args;

use super::serve::ServeArgs;

/// Flags of `longshore doctor`.
#[derive(Debug, Args)]
#[command(after_help = "Exit code: 0 when no problem was found, 1 otherwise.")]
pub(crate) struct DoctorArgs {
    /// What a server would be started with.
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    /// KV-store shards that `longshore up` would be started with; a member list says it by itself.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) shards: u16,
    /// Print JSON instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}
