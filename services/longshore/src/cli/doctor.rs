//! Flags of the examination.

use clap::Args;

use super::serve::ServeArgs;

/// Flags of `longshore doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// What a server would be started with.
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    /// Print JSON instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}
