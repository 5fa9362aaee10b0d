//! MInference's search: the pattern of each head at equal cost, by the error behind the output projection.
//!
//! The executor visits for a KV head what its query heads visit together, so the search chooses a pattern for each KV head and
//! writes it for all of its query heads; cost is counted in the keys that are really visited then.

use anyhow::{Context, Result};
use longshore_attention::{HeadPattern, HeadPlan, PrefillPolicy};
use serde::Serialize;

use super::{
    Found,
    measure::{Measure, Sampled, Samples},
    projection::Projection,
    prompts::Prompt,
    write,
};
use crate::{
    cli::CalibrateArgs,
    eval::{
        report::{Table, percent},
        samples::Quantiles,
        subject::Subject,
    },
};

use HeadPattern::{BlockSparse, Streaming, VerticalSlash};

/// Positions that share an index of vertical-slash heads.
const SPAN: usize = 512;

/// Patterns of a head: A-shape (first, newest keys), vertical-slash (columns, diagonals), block-sparse (blocks).
const CANDIDATES: &[HeadPattern] = &[
    Streaming { sink: 64, recent: 256 },
    Streaming { sink: 100, recent: 800 },
    Streaming { sink: 128, recent: 1500 },
    Streaming { sink: 128, recent: 2500 },
    Streaming { sink: 128, recent: 4000 },
    VerticalSlash { vertical: 30, slash: 100 },
    VerticalSlash { vertical: 30, slash: 400 },
    VerticalSlash { vertical: 30, slash: 800 },
    VerticalSlash { vertical: 100, slash: 200 },
    VerticalSlash { vertical: 100, slash: 800 },
    VerticalSlash { vertical: 500, slash: 100 },
    VerticalSlash { vertical: 500, slash: 300 },
    VerticalSlash { vertical: 500, slash: 700 },
    VerticalSlash { vertical: 1000, slash: 100 },
    VerticalSlash { vertical: 2000, slash: 100 },
    VerticalSlash { vertical: 3500, slash: 100 },
    VerticalSlash { vertical: 1000, slash: 4096 },
    BlockSparse { top: 100 },
];

/// What is known of one candidate in one KV head.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Judged {
    /// Share of the keys of exact attention.
    cost: f64,
    error: Quantiles,
}

/// Measures and chooses.
pub(super) fn search(subject: &Subject, prompts: &[Prompt], args: &CalibrateArgs) -> Result<Found> {
    let heads = subject.node.info.config.heads;
    let policies = CANDIDATES.iter().map(|pattern| {
        let plan = HeadPlan::new(vec![vec![*pattern; heads.kv_heads]; subject.layers()])?;
        PrefillPolicy::parse("heads:min_positions=0", Some(&plan))
    });
    let policies: Vec<PrefillPolicy> = policies.collect::<Result<_, _>>()?;
    let projection = Projection::of(subject)?;
    let distance = |layer: usize, kv_head: usize, ours: &[f32], exact: &[f32]| {
        projection.distance(layer, kv_head, ours, exact)
    };
    let measure = Measure {
        subject,
        candidates: &policies,
        from: u64::from(args.from),
        tiles: u64::from(args.tiles),
        span: SPAN,
        every: 8,
        distance: &distance,
    };
    let judged = judge(&measure.all(prompts)?);
    if let Some(path) = &args.json {
        let names: Vec<String> = CANDIDATES.iter().map(name).collect();
        write(path, &serde_json::to_string(&(names, &judged)).context("figures are JSON")?)?;
    }
    let chosen: Vec<Vec<usize>> =
        judged.iter().map(|layer| layer.iter().map(|head| choose(head, args.budget)).collect()).collect();
    let patterns = chosen.iter().map(|layer| {
        layer.iter().flat_map(|index| vec![CANDIDATES[*index]; heads.group]).collect::<Vec<_>>()
    });
    let plan = HeadPlan::new(patterns.collect())?;
    Ok((plan.to_minference_json(), vec![("Patterns".to_owned(), table(&judged, &chosen))]))
}

/// `[layer][KV head][candidate]`.
fn judge(samples: &Samples) -> Vec<Vec<Vec<Judged>>> {
    let of = |sampled: &Sampled| {
        let errors: Vec<f64> = sampled.errors.iter().map(|error| f64::from(*error)).collect();
        Judged { cost: sampled.visited.density(), error: Quantiles::of(&errors) }
    };
    let head = |candidates: &Vec<Sampled>| candidates.iter().map(of).collect();
    samples.iter().map(|layer| layer.iter().map(head).collect()).collect()
}

/// The candidate with the least mean error of those within the budget; of none, the cheapest.
fn choose(candidates: &[Judged], budget: f64) -> usize {
    let indices = 0..candidates.len();
    let within = indices.clone().filter(|index| candidates[*index].cost <= budget);
    let error = |index: &usize| candidates[*index].error.mean;
    let best = within.min_by(|a, b| error(a).total_cmp(&error(b)));
    let cheapest = || indices.min_by(|a, b| candidates[*a].cost.total_cmp(&candidates[*b].cost));
    best.or_else(cheapest).unwrap_or(0)
}

fn name(pattern: &HeadPattern) -> String {
    match pattern {
        HeadPattern::Dense => "dense".to_owned(),
        Streaming { sink, recent } => format!("A-shape ({sink}, {recent})"),
        VerticalSlash { vertical, slash } => format!("vertical-slash ({vertical}, {slash})"),
        BlockSparse { top } => format!("block-sparse ({top})"),
    }
}

/// How often each pattern was chosen, and what it costs and loses there.
fn table(judged: &[Vec<Vec<Judged>>], chosen: &[Vec<usize>]) -> Table {
    let mut table = Table::new(["pattern", "KV heads", "cost", "error mean", "error p95"]);
    for (candidate, pattern) in CANDIDATES.iter().enumerate() {
        let heads = judged.iter().flatten().zip(chosen.iter().flatten());
        let own: Vec<Judged> =
            heads.filter(|(_, chosen)| **chosen == candidate).map(|(head, _)| head[candidate]).collect();
        let mean = |of: fn(&Judged) -> f64| own.iter().map(of).sum::<f64>() / own.len() as f64;
        if !own.is_empty() {
            table.row([
                name(pattern),
                own.len().to_string(),
                percent(mean(|judged| judged.cost)),
                format!("{:.4}", mean(|judged| judged.error.mean)),
                format!("{:.4}", mean(|judged| judged.error.p95)),
            ]);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_error_within_the_budget_wins() {
        let judged =
            |cost, mean| Judged { cost, error: Quantiles { count: 1, mean, ..Quantiles::default() } };
        let candidates = [judged(0.2, 0.5), judged(0.3, 0.1), judged(0.31, 0.0), judged(0.1, 0.6)];
        assert_eq!(choose(&candidates, 0.3), 1);
        assert_eq!(choose(&candidates, 1.0), 2);
        assert_eq!(choose(&candidates, 0.05), 3);
    }
}
