//! `longshore eval needle`: one fact in noise, by depth and length.

use anyhow::Result;

use super::{
    candidate::Candidate,
    report::{Conditions, picture, tell},
    subject::Subject,
    svg::{Heatmap, Scale},
    tasks::Kind,
    text::{Answered, Asker, Wanted, mean_score, table},
};
use crate::{cli::TaskArgs, console};

/// Runs the command.
pub(super) fn run(args: &TaskArgs) -> Result<()> {
    let Some(subject) = Subject::of(&args.eval)? else { return Ok(()) };
    subject.check_lengths(&args.lengths)?;
    let candidates = subject.candidates(&args.eval)?;
    let depths = depths(args.depths);
    let mut wanted = Vec::new();
    for &length in &args.lengths {
        for &depth in &depths {
            let kind = Kind::Needle(depth);
            wanted.extend((0..u64::from(args.samples)).map(|sample| Wanted { kind, length, sample }));
        }
    }
    let answered = Asker::new(&subject, !args.no_chat).ask_all(&wanted, &candidates)?;
    for candidate in &candidates {
        draw(args, &depths, candidate, &answered)?;
    }
    let tables = [("Needle".to_owned(), table(&answered, &candidates))];
    tell(&Conditions::of(&subject), &args.eval.output, "needle", &tables, &answered)
}

/// Evenly spaced from 0 to 1; a single one lies in the middle.
fn depths(count: u32) -> Vec<f64> {
    match count {
        1 => vec![0.5],
        count => (0..count).map(|i| f64::from(i) / f64::from(count - 1)).collect(),
    }
}

fn draw(args: &TaskArgs, depths: &[f64], candidate: &Candidate, answered: &[Answered]) -> Result<()> {
    let columns: Vec<String> =
        args.lengths.iter().map(|length| console::grouped(u64::from(*length))).collect();
    let rows: Vec<String> = depths.iter().map(|depth| format!("{:.0} %", depth * 100.0)).collect();
    let cell = |depth: f64, length: u32| {
        mean_score(answered.iter().filter(|answer| {
            answer.policy == candidate.name && answer.length == length && answer.depth == Some(depth)
        }))
    };
    let cells: Vec<Vec<Option<f64>>> = depths
        .iter()
        .map(|&depth| args.lengths.iter().map(|&length| cell(depth, length)).collect())
        .collect();
    let title = format!("needle, {}", candidate.name);
    let axes = ("tokens", "depth of the needle");
    let map =
        Heatmap { title: &title, axes, columns: &columns, rows: &rows, cells: &cells, scale: Scale::Score };
    picture(&args.eval.output, &title, &map.svg())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depths_reach_both_ends() {
        assert_eq!(depths(1), [0.5]);
        assert_eq!(depths(5), [0.0, 0.25, 0.5, 0.75, 1.0]);
    }
}
