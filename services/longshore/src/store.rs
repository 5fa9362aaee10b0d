//! `longshore store`: what operators look at and do in the store of a running cluster.

mod cluster;
mod drain;
mod file;
mod get;
mod listing;
mod ls;
mod progress;
mod put;
mod scrub;
mod stat;
mod table;
#[cfg(test)]
mod tests;
mod verify;

use anyhow::Result;

use crate::cli::StoreCommand;

/// Runs a command.
pub(crate) async fn store(command: StoreCommand) -> Result<()> {
    match command {
        StoreCommand::Stat(args) => stat::stat(&args).await,
        StoreCommand::Ls(args) => ls::ls(&args).await,
        StoreCommand::Get(args) => get::get(&args).await,
        StoreCommand::Put(args) => put::put(&args).await,
        StoreCommand::Verify(args) => verify::verify(&args).await,
        StoreCommand::Scrub(args) => scrub::scrub(&args).await,
        StoreCommand::Drain(args) => drain::drain(&args).await,
    }
}
