//! `longshore eval ppl`: how well a model predicts a long natural text whose prefix it read under a policy.

use std::time::Instant;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use longshore_engine::Logits;
use serde::Serialize;

use super::{
    candidate::Candidate,
    corpus,
    fidelity::log_sum,
    report::{Conditions, Table, percent, tell},
    subject::Subject,
    watch::Watch,
};
use crate::{cli::PerplexityArgs, console};

/// One policy.
#[derive(Debug, Clone, Serialize)]
struct Report {
    policy: String,
    fingerprint: String,
    tokens: usize,
    /// e to the mean loss of all tokens but the first.
    perplexity: f64,
    /// The same of the second half, where prompts are long.
    second_half: f64,
    density: f64,
    seconds: f64,
    attention_seconds: f64,
    planning_seconds: f64,
}

/// Runs the command.
pub(super) fn run(args: &PerplexityArgs) -> Result<()> {
    let Some(subject) = Subject::of(&args.eval)? else { return Ok(()) };
    let tokens = corpus::read(&subject, args.text.as_deref(), args.tokens)?;
    let candidates = subject.candidates(&args.eval)?;
    let bar = console::token_bar("reading", (tokens.len() * candidates.len()) as u64);
    let reports = candidates.iter().map(|candidate| measure(&subject, candidate, &tokens, &bar));
    let reports: Vec<Report> = reports.collect::<Result<_>>()?;
    bar.finish_and_clear();
    let title = format!("Perplexity, {} tokens", console::grouped(tokens.len() as u64));
    tell(
        &Conditions::of(&subject),
        &args.eval.output,
        "ppl",
        &[(title, table(&reports, !args.eval.skip_exact))],
        &reports,
    )
}

fn measure(subject: &Subject, candidate: &Candidate, tokens: &[u32], bar: &ProgressBar) -> Result<Report> {
    let mut watch = Watch::default().telling(bar, subject.layers());
    let mut losses = Vec::with_capacity(tokens.len());
    let mut judge = |first: u64, logits: &[f32]| {
        for (position, row) in (first as usize..).zip(logits.chunks_exact(subject.vocabulary())) {
            if let Some(next) = tokens.get(position + 1) {
                let logit = row.get(*next as usize).context("a token of the text is in the vocabulary")?;
                losses.push(log_sum(row) - f64::from(*logit));
            }
        }
        Ok(())
    };
    let began = Instant::now();
    subject.prefill(tokens, candidate, &|_| Logits::All, &mut judge, &mut watch)?;
    let seconds = began.elapsed().as_secs_f64();
    Ok(Report {
        policy: candidate.name.clone(),
        fingerprint: candidate.policy.fingerprint(),
        tokens: tokens.len(),
        perplexity: perplexity(&losses),
        second_half: perplexity(&losses[losses.len() / 2..]),
        density: watch.pairs().density(),
        seconds,
        attention_seconds: watch.attention.as_secs_f64(),
        planning_seconds: watch.planning.as_secs_f64(),
    })
}

fn perplexity(losses: &[f64]) -> f64 {
    (losses.iter().sum::<f64>() / losses.len().max(1) as f64).exp()
}

fn table(reports: &[Report], has_exact: bool) -> Table {
    let mut table = Table::new([
        "policy",
        "perplexity",
        "against exact",
        "second half",
        "against exact",
        "density",
        "seconds",
        "attention s",
        "planning s",
    ]);
    let exact = reports.first().filter(|_| has_exact);
    for report in reports {
        let against = |of: fn(&Report) -> f64| {
            exact.map_or_else(
                || "–".to_owned(),
                |exact| format!("{:+.2} %", (of(report) / of(exact) - 1.0) * 100.0),
            )
        };
        table.row([
            report.policy.clone(),
            format!("{:.4}", report.perplexity),
            against(|report| report.perplexity),
            format!("{:.4}", report.second_half),
            against(|report| report.second_half),
            percent(report.density),
            format!("{:.1}", report.seconds),
            format!("{:.1}", report.attention_seconds),
            format!("{:.1}", report.planning_seconds),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perplexity_is_e_to_the_mean_loss() {
        assert!((perplexity(&[2.0f64.ln(), 8.0f64.ln()]) - 4.0).abs() < 1e-12);
        assert_eq!(perplexity(&[]), 1.0);
    }
}
