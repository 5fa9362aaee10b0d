//! `longshore eval`: what sparse prefill keeps, against exact attention on the same prompts. Deterministic and offline: prompts are
//! generated from the task, its length and the number of the sample.

mod candidate;
mod pairs;
mod recall;
mod report;
mod subject;
mod svg;
mod watch;

use anyhow::Result;

use crate::cli::EvalCommand;

/// Runs the command; blocks, so never on a reactor thread.
pub(crate) fn eval(command: &EvalCommand) -> Result<()> {
    match command {
        EvalCommand::Recall(args) => recall::run(args),
        _ => anyhow::bail!("wait"),
    }
}

#[cfg(test)]
mod tests;
