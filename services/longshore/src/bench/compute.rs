//! `longshore bench compute`: kernels and the whole model on this machine, beside the machine's own peaks of the same run.

mod attention;
mod first_token;
mod linear;
mod model;
mod plan;
mod report;
mod timing;

use std::sync::Arc;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use longshore_compute::{ComputePool, InstructionSet};

use self::{
    plan::Plan,
    report::{Conditions, Report},
};
use crate::{
    cli::{BenchComputeArgs, ComputePart},
    config::Config,
    console, device,
    machine::{Machine, Peaks},
    process,
};

/// What every part needs.
struct Bench {
    config: Config,
    pool: Arc<ComputePool>,
    peaks: Peaks,
    machine: Machine,
    repeats: usize,
    bar: ProgressBar,
}

impl Bench {
    /// Says what is being measured.
    fn next(&self, point: &str) {
        self.bar.inc(1);
        self.bar.set_message(point.to_owned());
    }
}

/// Runs the command; blocks, so never on a reactor thread.
pub(crate) fn compute(args: &BenchComputeArgs) -> Result<()> {
    let Some(config) = process::configuration(&args.serve, args.serve.settings())? else { return Ok(()) };
    if process::only_checked(&args.serve) {
        return Ok(());
    }
    device::ensure_cpu(&config, "longshore bench compute")?;
    let pool = process::compute_pool(&config)?;
    if args.until_first_token {
        return first_token::reach(&config, &pool);
    }
    let plan = Plan::of(args);
    let bar = console::point_bar("measuring", plan.points() as u64 + 1);
    bar.set_message("peaks of the machine");
    let machine = Machine::read();
    let peaks = Peaks::measure(&pool, plan.array_bytes(&machine), plan.bursts());
    let conditions = Conditions::of(&config, &machine, &pool, InstructionSet::detect(), peaks);
    let bench = Bench { config, pool, peaks, machine, repeats: args.repeats as usize, bar };
    let tables = args.json.as_ref().is_none_or(|path| path.as_os_str() != "-");
    let mut report = Report::new(conditions, tables);
    run(&bench, args, &plan, &mut report)?;
    bench.bar.finish_and_clear();
    match &args.json {
        None => Ok(()),
        Some(path) if path.as_os_str() == "-" => {
            console::say(report.json()?);
            Ok(())
        }
        Some(path) => std::fs::write(path, report.json()? + "\n")
            .with_context(|| format!("cannot write `{}`", path.display())),
    }
}

fn run(bench: &Bench, args: &BenchComputeArgs, plan: &Plan, report: &mut Report) -> Result<()> {
    if plan.has(ComputePart::Attention) {
        report.attention(attention::measure(bench, plan)?);
    }
    if plan.has(ComputePart::Linear) {
        report.linear(linear::measure(bench, plan)?);
    }
    if plan.has(ComputePart::Prefill) || plan.has(ComputePart::Decode) {
        report.model(model::measure(bench, plan)?);
    }
    if plan.has(ComputePart::FirstToken) {
        report.first_token(first_token::measure(bench, args)?);
    }
    Ok(())
}
