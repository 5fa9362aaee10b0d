//! `longshore eval fidelity`: attention of a policy beside exact attention on the same queries, keys and values, and what is left
//! of the difference in the logits of a wholly sparse prompt.

mod heads;
mod logits;
mod map;

use std::time::Instant;

use anyhow::{Result, ensure};
use serde::Serialize;

use self::{
    heads::{HeadReport, Heads},
    logits::{Drift, LogitRows},
    map::Drawn,
};
use super::{
    candidate::Candidate,
    corpus,
    report::{Conditions, Table, percent, picture, tell},
    samples::Quantiles,
    subject::Subject,
    svg::{Heatmap, Scale},
    watch::Watch,
};
use crate::{cli::FidelityArgs, console};

pub(super) use self::logits::log_sum;

/// One policy.
#[derive(Debug, Clone, Serialize)]
struct Report {
    policy: String,
    fingerprint: String,
    tokens: usize,
    /// First position with a row that was sparse in some head; `None` when all were exact.
    first_sparse: Option<u64>,
    density: f64,
    /// Of rows and heads that were sparse; 1 when none was.
    sparse_density: f64,
    /// Means that were visited, as a share of the keys of exact attention.
    means: f64,
    /// Share of the attention mass that lies on visited keys, of sampled rows that were sparse.
    mass: Quantiles,
    /// Relative L2 distance of the output of attention, of a KV head's group, of the same rows.
    output: Quantiles,
    drift: Drift,
    seconds: f64,
    attention_seconds: f64,
    planning_seconds: f64,
    heads: Vec<HeadReport>,
}

/// Runs the command.
pub(super) fn run(args: &FidelityArgs) -> Result<()> {
    let Some(subject) = Subject::of(&args.eval)? else { return Ok(()) };
    let tokens = corpus::read(&subject, args.text.as_deref(), args.tokens)?;
    let candidates = subject.candidates(&args.eval)?;
    ensure!(!args.eval.skip_exact, "`--skip-exact` leaves nothing to compare with");
    let drawn = map::parse(&args.draw, &subject)?;
    let rows = sampled(tokens.len(), args.rows as usize);
    let total = (tokens.len() * candidates.len()) as u64;
    let bar = console::token_bar("comparing", total);
    let mut exact = LogitRows::new(&rows);
    let mut watch = Watch::default().telling(&bar, subject.layers()).keeping(&rows);
    exact.read(&subject, &tokens, &Candidate::exact(), &mut watch)?;
    let mut reports = Vec::new();
    for candidate in candidates.iter().filter(|candidate| !candidate.is_exact()) {
        let compared = Compared { subject: &subject, tokens: &tokens, rows: &rows, exact: &exact, bar: &bar };
        let (report, maps) =
            compared.run(candidate, if args.eval.output.out.is_some() { &drawn } else { &[] })?;
        for (title, svg) in maps {
            picture(&args.eval.output, &title, &svg)?;
        }
        draw_density(args, &report)?;
        reports.push(report);
    }
    bar.finish_and_clear();
    let tables = [
        (format!("Fidelity, {} tokens", console::grouped(tokens.len() as u64)), overview(&reports)),
        ("By layer".to_owned(), by_layer(&reports)),
    ];
    tell(&Conditions::of(&subject), &args.eval.output, "fidelity", &tables, &reports)
}

/// Evenly spaced positions, the last row among them.
fn sampled(tokens: usize, rows: usize) -> Vec<u64> {
    let rows = rows.min(tokens);
    (1..=rows).map(|i| (i * tokens / rows) as u64 - 1).collect()
}

/// What one policy is compared on.
struct Compared<'a> {
    subject: &'a Subject,
    tokens: &'a [u32],
    rows: &'a [u64],
    exact: &'a LogitRows<'a>,
    bar: &'a indicatif::ProgressBar,
}

impl Compared<'_> {
    fn run(&self, candidate: &Candidate, drawn: &[Drawn]) -> Result<(Report, Vec<(String, String)>)> {
        let mut heads = Heads::new(&self.subject.pool, self.rows);
        let mut maps = map::Maps::new(&self.subject.pool, drawn, self.tokens.len());
        let mut failure = None;
        let mut look = |probe: &longshore_engine::AttentionProbe<'_>| {
            let looked = heads.look(probe).and_then(|()| maps.look(probe));
            failure = failure.take().or(looked.err());
        };
        let mut watch = Watch::looking(&mut look).telling(self.bar, self.subject.layers()).keeping(self.rows);
        let mut sparse = LogitRows::new(self.rows);
        let began = Instant::now();
        sparse.read(self.subject, self.tokens, candidate, &mut watch)?;
        let seconds = began.elapsed().as_secs_f64();
        let (attention, planning) = (watch.attention.as_secs_f64(), watch.planning.as_secs_f64());
        let (pairs, by_head) = (watch.pairs(), std::mem::take(&mut watch.heads));
        drop(watch);
        if let Some(error) = failure {
            return Err(error);
        }
        let drift = sparse.drift(self.exact, heads.first_sparse);
        let report = Report {
            policy: candidate.name.clone(),
            fingerprint: candidate.policy.fingerprint(),
            tokens: self.tokens.len(),
            first_sparse: heads.first_sparse,
            density: pairs.density(),
            sparse_density: heads.sparse.density(),
            means: if pairs.causal == 0 { 0.0 } else { pairs.means as f64 / pairs.causal as f64 },
            mass: heads.mass(),
            output: heads.output(),
            drift,
            seconds,
            attention_seconds: attention,
            planning_seconds: planning,
            heads: heads.reports(&by_head),
        };
        Ok((report, maps.drawings(&candidate.name)))
    }
}

fn overview(reports: &[Report]) -> Table {
    let mut table = Table::new([
        "policy",
        "density",
        "of sparse rows",
        "means",
        "mass mean",
        "mass p10",
        "output median",
        "output p95",
        "hidden median",
        "hidden p95",
        "logits median",
        "KL mean",
        "KL p95",
        "top-1 of sparse rows",
        "top-1 of all",
        "planning of attention",
    ]);
    for r in reports {
        table.row([
            r.policy.clone(),
            percent(r.density),
            percent(r.sparse_density),
            percent(r.means),
            percent(r.mass.mean),
            percent(r.mass.p10),
            format!("{:.4}", r.output.median),
            format!("{:.4}", r.output.p95),
            format!("{:.4}", r.drift.hidden.median),
            format!("{:.4}", r.drift.hidden.p95),
            format!("{:.4}", r.drift.logits.median),
            format!("{:.5}", r.drift.kl.mean),
            format!("{:.5}", r.drift.kl.p95),
            percent(r.drift.top1_agreement),
            percent(r.drift.top1_of_all),
            percent(r.planning_seconds / r.attention_seconds.max(f64::MIN_POSITIVE)),
        ]);
    }
    table
}

fn by_layer(reports: &[Report]) -> Table {
    let mut table = Table::new([
        "policy",
        "layer",
        "KV head",
        "density",
        "mass mean",
        "mass p10",
        "output median",
        "output p95",
    ]);
    for report in reports {
        for head in &report.heads {
            let known = |text: String| if head.mass.count > 0 { text } else { "–".to_owned() };
            table.row([
                report.policy.clone(),
                head.layer.to_string(),
                head.kv_head.to_string(),
                percent(head.density),
                known(percent(head.mass.mean)),
                known(percent(head.mass.p10)),
                known(format!("{:.4}", head.output.median)),
                known(format!("{:.4}", head.output.p95)),
            ]);
        }
    }
    table
}

/// Density by layer and KV head.
fn draw_density(args: &FidelityArgs, report: &Report) -> Result<()> {
    let kv_heads = report.heads.iter().map(|head| head.kv_head + 1).max().unwrap_or(0);
    let columns: Vec<String> = (0..kv_heads).map(|head| head.to_string()).collect();
    let layers: Vec<&[HeadReport]> = report.heads.chunks(kv_heads.max(1)).collect();
    let rows: Vec<String> = layers.iter().map(|heads| heads[0].layer.to_string()).collect();
    let cells: Vec<Vec<Option<f64>>> =
        layers.iter().map(|heads| heads.iter().map(|head| Some(head.density)).collect()).collect();
    let title = format!("density, {}", report.policy);
    let axes = ("KV head", "layer");
    let map =
        Heatmap { title: &title, axes, columns: &columns, rows: &rows, cells: &cells, scale: Scale::Share };
    picture(&args.eval.output, &title, &map.svg())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampled_rows_reach_the_end() {
        assert_eq!(sampled(100, 4), [24, 49, 74, 99]);
        assert_eq!(sampled(3, 10), [0, 1, 2]);
    }
}
