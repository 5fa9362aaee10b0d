//! `longshore eval`: what sparse prefill keeps, against exact attention on the same prompts. Deterministic and offline: prompts are
//! generated from the task, its length and the number of the sample.

mod calibrate;
mod candidate;
mod corpus;
mod fidelity;
mod needle;
mod pairs;
mod perplexity;
mod recall;
mod report;
mod rows;
mod ruler;
mod samples;
mod score;
mod scorers;
mod subject;
mod svg;
mod tasks;
mod text;
mod watch;

use anyhow::Result;

pub(crate) use self::calibrate::run as calibrate;

use crate::cli::EvalCommand;

/// Runs the command; blocks, so never on a reactor thread.
pub(crate) fn eval(command: &EvalCommand) -> Result<()> {
    match command {
        EvalCommand::Needle(args) => needle::run(args),
        EvalCommand::Ruler(args) => ruler::run(args),
        EvalCommand::Recall(args) => recall::run(args),
        EvalCommand::Fidelity(args) => fidelity::run(args),
        EvalCommand::Ppl(args) => perplexity::run(args),
        EvalCommand::Scorers(args) => scorers::run(args),
    }
}

#[cfg(test)]
mod tests;
