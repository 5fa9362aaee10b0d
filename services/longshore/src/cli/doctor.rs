//! Flags of the examination.

use clap::Args;

use super::serve::UpArgs;

/// Flags of `longshore doctor`.
#[derive(Debug, Args)]
#[command(
    after_help = "Takes the flags of `longshore up` and looks whether it could be started with them; ports that a running Longshore has \
    are told as taken.\nExit code: 0 when no problem was found, 1 otherwise."
)]
pub(crate) struct DoctorArgs {
    /// What `longshore up` would be started with.
    #[command(flatten)]
    pub(crate) up: UpArgs,
    /// Print JSON instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}
