//! `longshore eval recall`: keys and values at any length, with a model that exact attention makes answer every question.

mod prompt;

use std::{ops::Range, time::Instant};

use anyhow::Result;
use indicatif::ProgressBar;
use longshore_engine::Logits;
use serde::Serialize;

use self::prompt::{Prompt, Shape};
use super::{
    candidate::Candidate,
    pairs::Pairs,
    report::{Conditions, Table, percent, picture, tell},
    subject::{Subject, likeliest},
    svg::{Heatmap, Scale},
    watch::Watch,
};
use crate::{cli::RecallArgs, console, machine, model::RecallVocabulary};

/// Rows of the picture.
const DEPTHS: usize = 10;

/// One question and what came of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Outcome {
    /// Where the pair lies, as a share of the prompt.
    depth: f64,
    /// Whether it was asked before the end of the prompt.
    midway: bool,
    /// Whether the likeliest token was its value.
    right: bool,
}

/// All prompts of one length under one policy.
#[derive(Debug, Clone, Serialize)]
struct Point {
    policy: String,
    fingerprint: String,
    tokens: usize,
    pairs: usize,
    outcomes: Vec<Outcome>,
    visited: Pairs,
    density: f64,
    /// Seconds of one prompt, everything together.
    seconds: f64,
    /// Of it, attention, planning included.
    attention_seconds: f64,
    /// Of it, planning.
    planning_seconds: f64,
    peak_rss_bytes: Option<u64>,
}

impl Point {
    /// Right answers and questions, at the end or midway.
    fn score(&self, midway: bool) -> (usize, usize) {
        let asked = self.outcomes.iter().filter(|outcome| outcome.midway == midway);
        asked.fold((0, 0), |(right, all), outcome| (right + usize::from(outcome.right), all + 1))
    }
}

/// Runs the command.
pub(super) fn run(args: &RecallArgs) -> Result<()> {
    let Some(subject) = Subject::of(&args.eval)? else { return Ok(()) };
    let vocabulary = RecallVocabulary::read(&subject.node.info.tokenizer)?;
    subject.check_lengths(&args.lengths)?;
    let candidates = subject.candidates(&args.eval)?;
    let shapes = args.lengths.iter().map(|&tokens| Shape::of(args, tokens as usize, &vocabulary));
    let shapes: Vec<Shape> = shapes.collect::<Result<_>>()?;
    let tokens: u64 = shapes.iter().map(|shape| shape.tokens as u64).sum();
    let bar = console::token_bar("asking", tokens * u64::from(args.samples) * candidates.len() as u64);
    let mut points = Vec::new();
    for shape in &shapes {
        let prompts: Vec<Prompt> =
            (0..u64::from(args.samples)).map(|sample| shape.prompt(&vocabulary, sample)).collect();
        for candidate in &candidates {
            points.push(measure(&subject, candidate, shape, &prompts, &bar)?);
        }
    }
    bar.finish_and_clear();
    draw(args, &candidates, &points)?;
    tell(
        &Conditions::of(&subject),
        &args.eval.output,
        "recall",
        &[("Keys and values".to_owned(), table(&points))],
        &points,
    )
}

fn measure(
    subject: &Subject,
    candidate: &Candidate,
    shape: &Shape,
    prompts: &[Prompt],
    bar: &ProgressBar,
) -> Result<Point> {
    machine::reset_peak_rss();
    let mut watch = Watch::default().telling(bar, subject.layers());
    let (mut outcomes, began) = (Vec::new(), Instant::now());
    for prompt in prompts {
        outcomes.extend(ask(subject, candidate, prompt, &mut watch)?);
    }
    let each = |seconds: f64| seconds / prompts.len() as f64;
    let visited = watch.pairs();
    Ok(Point {
        policy: candidate.name.clone(),
        fingerprint: candidate.policy.fingerprint(),
        tokens: shape.tokens,
        pairs: shape.pairs,
        outcomes,
        visited,
        density: visited.density(),
        seconds: each(began.elapsed().as_secs_f64()),
        attention_seconds: each(watch.attention.as_secs_f64()),
        planning_seconds: each(watch.planning.as_secs_f64()),
        peak_rss_bytes: machine::peak_rss_bytes(),
    })
}

fn ask(
    subject: &Subject,
    candidate: &Candidate,
    prompt: &Prompt,
    watch: &mut Watch<'_>,
) -> Result<Vec<Outcome>> {
    let vocabulary = subject.vocabulary();
    let asked = |rows: &Range<u64>| prompt.questions.iter().filter(|q| rows.contains(&q.position)).count();
    let wanted = |rows: Range<u64>| if asked(&rows) > 0 { Logits::All } else { Logits::None };
    let mut outcomes = Vec::with_capacity(prompt.questions.len());
    let mut judge = |first: u64, logits: &[f32]| {
        let rows = first..first + (logits.len() / vocabulary) as u64;
        for question in prompt.questions.iter().filter(|question| rows.contains(&question.position)) {
            let row = (question.position - first) as usize;
            let right = likeliest(&logits[row * vocabulary..][..vocabulary]) == question.answer;
            let depth = question.pair as f64 / prompt.tokens.len() as f64;
            outcomes.push(Outcome { depth, midway: question.midway, right });
        }
        Ok(())
    };
    subject.prefill(&prompt.tokens, candidate, &wanted, &mut judge, watch)?;
    Ok(outcomes)
}

fn table(points: &[Point]) -> Table {
    let mut table = Table::new([
        "tokens",
        "pairs",
        "policy",
        "at the end",
        "midway",
        "density",
        "seconds",
        "attention s",
        "planning s",
        "tokens/s",
        "peak memory",
    ]);
    for point in points {
        let score = |midway| match point.score(midway) {
            (_, 0) => "–".to_owned(),
            (right, all) => format!("{} ({right}/{all})", percent(right as f64 / all as f64)),
        };
        table.row([
            console::grouped(point.tokens as u64),
            console::grouped(point.pairs as u64),
            point.policy.clone(),
            score(false),
            score(true),
            percent(point.density),
            format!("{:.2}", point.seconds),
            format!("{:.2}", point.attention_seconds),
            format!("{:.2}", point.planning_seconds),
            format!("{:.0}", point.tokens as f64 / point.seconds),
            point.peak_rss_bytes.map_or_else(|| "unknown".to_owned(), console::bytes),
        ]);
    }
    table
}

/// Share of right answers by depth and length, a picture for each policy.
fn draw(args: &RecallArgs, candidates: &[Candidate], points: &[Point]) -> Result<()> {
    for candidate in candidates {
        let own: Vec<&Point> = points.iter().filter(|point| point.policy == candidate.name).collect();
        let columns: Vec<String> = own.iter().map(|point| console::grouped(point.tokens as u64)).collect();
        let labels: Vec<String> = (0..DEPTHS).map(|i| format!("{} %", i * 100 / DEPTHS)).collect();
        let share = |row: usize, point: &Point| {
            let here = |outcome: &&Outcome| (outcome.depth * DEPTHS as f64) as usize == row;
            let (right, all) = point
                .outcomes
                .iter()
                .filter(here)
                .fold((0, 0), |(right, all), outcome| (right + u32::from(outcome.right), all + 1));
            (all > 0).then(|| f64::from(right) / f64::from(all))
        };
        let cells: Vec<Vec<Option<f64>>> =
            (0..DEPTHS).map(|row| own.iter().map(|point| share(row, point)).collect()).collect();
        let title = format!("recall, {}", candidate.name);
        let axes = ("tokens", "depth of the pair");
        let map = Heatmap {
            title: &title,
            axes,
            columns: &columns,
            rows: &labels,
            cells: &cells,
            scale: Scale::Score,
        };
        picture(&args.eval.output, &title, &map.svg())?;
    }
    Ok(())
}
