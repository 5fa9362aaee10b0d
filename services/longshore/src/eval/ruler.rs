//! `longshore eval ruler`: generated tasks by length.

use anyhow::Result;
use clap::ValueEnum;

use super::{
    report::{Conditions, picture, tell},
    subject::Subject,
    svg::{Heatmap, Scale},
    tasks::Kind,
    text::{Asker, Wanted, mean_score, table},
};
use crate::{
    cli::{RulerArgs, RulerTask},
    console,
};

/// Runs the command.
pub(super) fn run(args: &RulerArgs) -> Result<()> {
    let Some(subject) = Subject::of(&args.eval)? else { return Ok(()) };
    subject.check_lengths(&args.lengths)?;
    let candidates = subject.candidates(&args.eval)?;
    let tasks = if args.only.is_empty() { RulerTask::value_variants() } else { &args.only };
    let mut wanted = Vec::new();
    for &task in tasks {
        let kind = Kind::Ruler(task);
        for &length in &args.lengths {
            wanted.extend((0..u64::from(args.samples)).map(|sample| Wanted { kind, length, sample }));
        }
    }
    let answered = Asker::new(&subject, !args.no_chat).ask_all(&wanted, &candidates)?;
    let columns: Vec<String> =
        args.lengths.iter().map(|length| console::grouped(u64::from(*length))).collect();
    let rows: Vec<String> = tasks.iter().map(|task| Kind::Ruler(*task).name().to_owned()).collect();
    for candidate in &candidates {
        let cell = |task: RulerTask, length: u32| {
            let name = Kind::Ruler(task).name();
            mean_score(answered.iter().filter(|answer| {
                answer.policy == candidate.name && answer.length == length && answer.task == name
            }))
        };
        let cells: Vec<Vec<Option<f64>>> = tasks
            .iter()
            .map(|&task| args.lengths.iter().map(|&length| cell(task, length)).collect())
            .collect();
        let title = format!("ruler, {}", candidate.name);
        let axes = ("tokens", "task");
        let map = Heatmap {
            title: &title,
            axes,
            columns: &columns,
            rows: &rows,
            cells: &cells,
            scale: Scale::Score,
        };
        picture(&args.eval.output, &title, &map.svg())?;
    }
    let tables = [("Tasks".to_owned(), table(&answered, &candidates))];
    tell(&Conditions::of(&subject), &args.eval.output, "ruler", &tables, &answered)
}
