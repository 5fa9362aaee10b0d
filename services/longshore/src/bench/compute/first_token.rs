//! From the start of a process to its first token: this program starts itself and waits for the line.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    sync::Arc,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use longshore_compute::ComputePool;
use serde::Serialize;

use super::{Bench, model};
use crate::{bench::statistics::Spread, cli::BenchComputeArgs, config::Config, console};

/// Tokens of the prompt.
const PROMPT_TOKENS: usize = 2032;

/// The figure.
#[derive(Debug, Clone, Serialize)]
pub(super) struct FirstToken {
    /// Tokens of the prompt.
    pub(super) prompt_tokens: usize,
    /// Seconds from starting the process until its first token, from a warm file cache.
    pub(super) seconds: Spread,
}

/// Starts a process for each sample; its output is not read further than the line it ends with.
pub(super) fn measure(bench: &Bench, args: &BenchComputeArgs) -> Result<FirstToken> {
    bench.next("first token of a new process");
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut samples = Vec::with_capacity(bench.repeats);
    for _ in 0..bench.repeats {
        let mut command = Command::new(&program);
        command.args(["bench", "compute", "--until-first-token"]);
        if let Some(config) = &args.serve.config {
            command.arg("--config").arg(config);
        }
        for set in args.serve.settings() {
            command.args(["--set", &set.text]);
        }
        samples.push(run(command.stdin(Stdio::null()).stdout(Stdio::piped()))?);
    }
    Ok(FirstToken { prompt_tokens: PROMPT_TOKENS, seconds: Spread::of(samples) })
}

fn run(command: &mut Command) -> Result<f64> {
    let began = Instant::now();
    let mut child = command.spawn().context("cannot start this program again")?;
    let mut line = String::new();
    let output = child.stdout.take().context("the output of the process is piped")?;
    BufReader::new(output).read_line(&mut line).context("cannot read what the process says")?;
    let seconds = began.elapsed().as_secs_f64();
    let status = child.wait().context("cannot wait for the process")?;
    ensure!(status.success() && line.starts_with("token "), "the process ended with {status}");
    Ok(seconds)
}

/// What the process does that is timed.
pub(super) fn reach(config: &Config, pool: &Arc<ComputePool>) -> Result<()> {
    let token = model::first_token(config, pool, PROMPT_TOKENS)?;
    console::say(format!("token {token}"));
    Ok(())
}
