//! `longshore cuda selftest`: every kernel against the CPU's results, on the GPU of this machine.

mod model;

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use longshore_cuda::{Device, DeviceInfo, Error, Rate, Rates, capability_name, selftest, selftest::Greedy};
use serde::Serialize;

use crate::{cli::SelftestArgs, console, process};

/// One comparison.
#[derive(Debug, Clone, Serialize)]
struct Row {
    case: String,
    /// Norm of the difference over the norm of the CPU's result, or a count of what differs; `None`: the case could not be run.
    difference: Option<f64>,
    limit: f64,
    passed: bool,
    problem: Option<String>,
}

/// All comparisons.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    device: String,
    capability: String,
    nvrtc: String,
    cases: Vec<Row>,
    /// Cases that were wanted and could not be run here, and why.
    not_run: Vec<String>,
}

/// Runs the command; blocks, so never on a reactor thread.
pub(crate) fn selftest(args: &SelftestArgs) -> Result<()> {
    let Some(config) = process::settings(&args.serve, args.serve.settings())? else { return Ok(()) };
    if process::only_checked(&args.serve) {
        return Ok(());
    }
    let wanted = |name: &str| args.only.as_ref().is_none_or(|only| name.contains(only));
    let mut cases: Vec<Case> = cases().into_iter().filter(|case| wanted(&case.name)).collect();
    let greedy: Vec<&str> = Greedy::NAMES.into_iter().filter(|name| wanted(name)).collect();
    ensure!(
        !cases.is_empty() || !greedy.is_empty(),
        "`--only {}` names no case; hint: `--list`",
        args.only.as_deref().unwrap_or_default()
    );
    if args.list {
        cases.iter().map(|case| &*case.name).chain(greedy).for_each(console::say);
        return Ok(());
    }
    let mut not_run = Vec::new();
    if !greedy.is_empty() {
        match model::greedy(&config)? {
            Ok(found) => cases.extend(compared(found.cases()).filter(|case| wanted(&case.name))),
            Err(reason) => not_run.extend(greedy.iter().map(|name| format!("{name}: {reason}"))),
        }
    }
    let device = super::open(&config)?;
    let (info, nvrtc) = (device.info().clone(), device.compiler().nvrtc().version().to_string());
    let queue: Arc<dyn Device> = device;
    let tables = args.json.as_ref().is_none_or(|path| path.as_os_str() != "-");
    // Last those of a kernel that is off by default: should it lose the context, the others were told before.
    cases.sort_by_key(|case| case.capability.is_some());
    let all = cases.len();
    cases.retain(|case| case.capability.is_none_or(|only| only == info.capability));
    if cases.len() < all {
        let (count, capability) = (all - cases.len(), capability_name(info.capability));
        not_run.push(format!("{count} cases of kernels that compute capability {capability} does not have"));
    }
    let rows = run(&queue, &cases, tables);
    let report = report(&info, nvrtc, (rows, not_run));
    report.not_run.iter().for_each(|case| console::note(format!("NOT RUN: {case}")));
    let json = || serde_json::to_string_pretty(&report).context("a report is JSON");
    match &args.json {
        None => {}
        Some(path) if path.as_os_str() == "-" => console::say(json()?),
        Some(path) => std::fs::write(path, json()? + "\n")
            .with_context(|| format!("cannot write `{}`", path.display()))?,
    }
    let failed = report.cases.iter().filter(|row| !row.passed).count();
    ensure!(failed == 0, "{failed} of {} cases failed on {}", report.cases.len(), report.device);
    Ok(())
}

/// Bytes that the measuring kernels copy here: many times as many as run at once, with a rest.
const COPY_BYTES: usize = (64 << 20) + 48;
const ROUNDS: u32 = 1000;

type Run = dyn Fn(&Arc<dyn Device>) -> Result<f64, Error>;

/// A comparison with its name and its limit.
struct Case {
    name: String,
    limit: f64,
    /// Compute capability of the only devices that it is for; `None`: of all.
    capability: Option<u32>,
    /// Gives the error that was found: a relative L2 distance, or a count of what differs.
    run: Box<Run>,
}

/// Every case: those of the tests on the emulator, and the kernels that everything is measured against.
fn cases() -> Vec<Case> {
    let rates =
        [(Rate::Copy, "rates copy"), (Rate::Read, "rates read"), (Rate::MatrixBf16, "rates mma bf16")];
    let rates = rates.map(|(rate, name)| {
        let run: Box<Run> = Box::new(move |device| measures(device, rate));
        Case { name: name.to_owned(), limit: 0.0, capability: None, run }
    });
    let parts = [
        selftest::recorded_cases(),
        selftest::cases(),
        selftest::large_cases(),
        selftest::executor_cases(),
        selftest::wgmma_cases(),
    ];
    rates.into_iter().chain(compared(parts.into_iter().flatten())).collect()
}

fn compared(cases: impl IntoIterator<Item = selftest::Case>) -> impl Iterator<Item = Case> {
    cases.into_iter().map(|case| Case {
        name: case.name.clone(),
        limit: case.limit,
        capability: case.capability,
        run: Box::new(move |device| case.run(device)),
    })
}

/// 0 when a measuring kernel does all that it is measured for, else 1.
fn measures(device: &Arc<dyn Device>, rate: Rate) -> Result<f64, Error> {
    let rates = Rates::new(device, COPY_BYTES, ROUNDS)?;
    let content: Vec<u8> = (0..COPY_BYTES as u64 / 8)
        .flat_map(|index| (index.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes())
        .collect();
    rates.fill(&content)?;
    rates.launch(rate)?;
    Ok(if rates.is_right(rate)? { 0.0 } else { 1.0 })
}

/// Runs the cases one by one, and prints each row as it comes. What a fault of one leaves of the device is the next one's
/// problem: a lost context fails them all, which is the truth.
fn run(device: &Arc<dyn Device>, cases: &[Case], tables: bool) -> Vec<Row> {
    if tables {
        console::say("| case | relative L2, or count | limit | |\n| --- | --- | --- | --- |");
    }
    let outcome = |case: &Case| {
        let (difference, problem) = match (case.run)(device) {
            Ok(difference) => (Some(difference), None),
            Err(error) => (None, Some(error.to_string())),
        };
        // A difference that is no number is no agreement.
        let passed = difference.is_some_and(|difference| difference <= case.limit);
        let row = Row { case: case.name.clone(), difference, limit: case.limit, passed, problem };
        if tables {
            console::say(line(&row));
        }
        row
    };
    cases.iter().map(outcome).collect()
}

fn line(row: &Row) -> String {
    let difference = match (&row.problem, row.difference) {
        (Some(problem), _) => problem.lines().next().unwrap_or_default().to_owned(),
        (None, Some(difference)) => format!("{difference:.2e}"),
        (None, None) => String::new(),
    };
    format!(
        "| {} | {difference} | {:.0e} | {} |",
        row.case,
        row.limit,
        if row.passed { "ok" } else { "**failed**" }
    )
}

fn report(info: &DeviceInfo, nvrtc: String, (cases, not_run): (Vec<Row>, Vec<String>)) -> Report {
    Report {
        version: env!("CARGO_PKG_VERSION"),
        device: info.name.clone(),
        capability: capability_name(info.capability),
        nvrtc,
        cases,
        not_run,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_have_names_of_their_own() {
        let mut names: Vec<String> = cases().into_iter().map(|case| case.name).collect();
        names.extend(Greedy::NAMES.map(str::to_owned));
        let all = names.len();
        names.sort();
        names.dedup();
        assert!(names.len() == all && all > 0, "{names:?}");
    }

    #[test]
    fn rows_tell_what_happened() {
        let row = |difference, problem: Option<&str>, passed| Row {
            case: "c".to_owned(),
            difference,
            limit: 1e-5,
            passed,
            problem: problem.map(str::to_owned),
        };
        assert_eq!(line(&row(Some(2e-6), None, true)), "| c | 2.00e-6 | 1e-5 | ok |");
        assert_eq!(line(&row(Some(f64::NAN), None, false)), "| c | NaN | 1e-5 | **failed** |");
        assert_eq!(line(&row(None, Some("no\nroom"), false)), "| c | no | 1e-5 | **failed** |");
    }
}
