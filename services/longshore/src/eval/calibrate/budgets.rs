//! The cheapest scorer and selector of each KV head that keeps a target error; all keys where none does.

use anyhow::{Context, Result, ensure};
use longshore_attention::{BudgetLevel, HeadBudgets, PrefillPolicy, QUERY_TILE};
use serde::Serialize;

use super::{
    Found,
    measure::{Measure, Sampled, Samples, relative_distance},
    names,
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

/// What all heads of a level share.
const SHARED: &str = "selector=mass,peak=0.25";

/// What a head may have, with what choosing costs it: keys whose scores are taken, as a share of all, at half the price of a
/// visit (no values are read). None scores keys (`antidiagonal`): one such head, and prefixes on shards would have to travel to
/// the worker, for every head.
const CANDIDATES: &[(&str, f64)] = &[
    ("scorer=row-normalised,gamma=0,peak=off", MEANS),
    ("scorer=row-normalised,gamma=0.3", MEANS),
    ("scorer=row-normalised,gamma=0.5", MEANS),
    ("scorer=row-normalised,gamma=0.7", MEANS),
    ("scorer=row-normalised,gamma=0.8", MEANS),
    ("scorer=row-normalised,gamma=0.9", MEANS),
    ("scorer=row-normalised,gamma=0.95", MEANS),
    ("scorer=row-normalised,gamma=0.97", MEANS),
    ("scorer=row-normalised,gamma=0.985", MEANS),
    ("scorer=row-normalised,gamma=0.993", MEANS),
    ("scorer=row-normalised,gamma=0.5,peak=0.05", MEANS),
    ("scorer=row-normalised,gamma=0.8,peak=0.05", MEANS),
    ("scorer=row-normalised,gamma=0.9,peak=0.05", MEANS),
    ("scorer=row-normalised,gamma=0.95,peak=0.02", MEANS),
    ("scorer=second-order,gamma=0.7", 2.0 * MEANS),
    ("scorer=second-order,gamma=0.9", 2.0 * MEANS),
    ("scorer=second-order,gamma=0.97", 2.0 * MEANS),
    ("scorer=second-order,gamma=0.99", 2.0 * MEANS),
    ("scorer=pooled,selector=alpha,alpha=0.1", MEANS),
    ("scorer=pooled,selector=alpha,alpha=0.01", MEANS),
    ("scorer=pooled,selector=alpha,alpha=0.001", MEANS),
    // Without means, which some layers are better off without (docs/fidelity.md).
    ("scorer=row-normalised,gamma=0,peak=off,correction=off", MEANS),
    ("scorer=row-normalised,gamma=0.7,correction=off", MEANS),
    ("scorer=row-normalised,gamma=0.9,correction=off", MEANS),
    ("scorer=row-normalised,gamma=0.97,correction=off", MEANS),
    ("scorer=second-order,gamma=0.9,correction=off", 2.0 * MEANS),
    // By count: best at the 95th percentile where all heads have one budget.
    ("scorer=second-order,selector=top-k,k=6,correction=off", 2.0 * MEANS),
    ("scorer=second-order,selector=top-k,k=12,correction=off", 2.0 * MEANS),
    ("scorer=second-order,selector=top-k,k=24,correction=off", 2.0 * MEANS),
    ("scorer=second-order,selector=top-k,k=48,correction=off", 2.0 * MEANS),
    ("scorer=second-order,selector=top-k,k=24", 2.0 * MEANS),
    ("scorer=row-normalised,selector=top-k,k=24,correction=off", MEANS),
];
/// A mean of 64 keys each.
const MEANS: f64 = 0.5 / 64.0;
/// A head that would visit more than this is dense: choosing costs as well.
const DENSE_FROM: f64 = 0.9;
/// The median may be so much of the 95th percentile.
const MEDIAN_SHARE: f64 = 1.0 / 3.0;

/// A level that is asked for.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Target {
    name: String,
    /// Limit of the 95th percentile.
    error: f64,
}

/// Reads `NAME=ERROR`.
pub(super) fn targets(texts: &[String]) -> Result<Vec<Target>> {
    let read = |text: &String| {
        let (name, error) = text.split_once('=')?;
        let error: f64 = error.parse().ok()?;
        (error > 0.0 && error <= 10.0).then(|| Target { name: name.to_owned(), error })
    };
    let all = texts.iter().map(|text| {
        read(text).with_context(|| {
            format!("`--target-error` is `{text}`, must be NAME=ERROR with an error above 0 and at most 10")
        })
    });
    all.collect()
}

/// What is known of one candidate in one head.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Judged {
    /// Share of the keys of exact attention, choosing included.
    cost: f64,
    error: Quantiles,
}

impl Judged {
    fn of(sampled: &Sampled, choosing: f64) -> Self {
        let errors: Vec<f64> = sampled.errors.iter().map(|error| f64::from(*error)).collect();
        let visited = sampled.visited;
        let means = visited.means as f64 / (visited.causal as f64).max(1.0);
        Self { cost: visited.density() + means + choosing, error: Quantiles::of(&errors) }
    }

    fn meets(&self, target: &Target) -> bool {
        self.error.count > 0
            && self.error.p95 <= target.error
            && self.error.median <= target.error * MEDIAN_SHARE
    }
}

/// Measures and chooses.
pub(super) fn search(
    subject: &Subject,
    prompts: &[Prompt],
    args: &CalibrateArgs,
    targets: &[Target],
) -> Result<Found> {
    let policies = CANDIDATES.iter().map(|(text, _)| {
        PrefillPolicy::parse(&format!("blocks:{},dense_layers=0,min_positions=0", over(text)), None)
    });
    let policies: Vec<PrefillPolicy> = policies.collect::<Result<_, _>>()?;
    let shape = subject.node.info.config.heads;
    let (group, dim) = (shape.group, shape.head_dim);
    let distance = |_: usize, kv_head: usize, ours: &[f32], exact: &[f32]| {
        let heads = kv_head * group * dim..(kv_head + 1) * group * dim;
        relative_distance(&ours[heads.clone()], &exact[heads])
    };
    let measure = Measure {
        subject,
        candidates: &policies,
        from: u64::from(args.from),
        tiles: u64::from(args.tiles),
        span: QUERY_TILE,
        every: 1,
        distance: &distance,
    };
    let judged = judge(&measure.all(prompts)?)?;
    if let Some(path) = &args.json {
        let text = serde_json::to_string(&(CANDIDATES, &judged)).context("figures are JSON")?;
        write(path, &text)?;
    }
    let mut summary = Table::new(["level", "target p95", "dense heads", "cost", "median of heads' p95"]);
    let levels = targets.iter().map(|target| {
        let chosen = choose(&judged, target);
        summary.row(told(target, &judged, &chosen));
        let (from, tokens, seed) = (args.from, args.tokens, args.seed);
        let note = format!("prompts: {}; positions {from} to {tokens}; seed {seed}", names(prompts));
        level(target, &chosen, &note)
    });
    let levels: Vec<BudgetLevel> = levels.collect();
    let plan = HeadBudgets::new(&subject.node.name, levels, subject.layers(), shape.kv_heads)?;
    Ok((plan.to_json(), vec![("Budgets".to_owned(), summary)]))
}

/// `[layer][KV head][candidate]`.
fn judge(samples: &Samples) -> Result<Vec<Vec<Vec<Judged>>>> {
    let rows = samples.iter().flatten().flatten().map(|sampled| sampled.errors.len()).min();
    ensure!(rows > Some(0), "no row was looked at; hint: a smaller `--from`, or more `--tokens`");
    let head = |sampled: &Vec<Sampled>| {
        sampled
            .iter()
            .zip(CANDIDATES)
            .map(|(sampled, (_, choosing))| Judged::of(sampled, *choosing))
            .collect()
    };
    Ok(samples.iter().map(|layer| layer.iter().map(head).collect()).collect())
}

/// Index of the cheapest candidate of each head that meets the target, `[layer][KV head]`; none is dense.
fn choose(judged: &[Vec<Vec<Judged>>], target: &Target) -> Vec<Vec<Option<usize>>> {
    let cheapest = |candidates: &Vec<Judged>| {
        let good = candidates.iter().enumerate().filter(|(_, judged)| judged.meets(target));
        let best = good.min_by(|(_, a), (_, b)| a.cost.total_cmp(&b.cost));
        best.filter(|(_, judged)| judged.cost <= DENSE_FROM).map(|(index, _)| index)
    };
    judged.iter().map(|layer| layer.iter().map(cheapest).collect()).collect()
}

fn level(target: &Target, chosen: &[Vec<Option<usize>>], note: &str) -> BudgetLevel {
    let head = |index: &Option<usize>| {
        index.map_or_else(|| "dense".to_owned(), |index| CANDIDATES[index].0.to_owned())
    };
    BudgetLevel {
        name: target.name.clone(),
        note: format!(
            "longshore calibrate: 95th percentile of the output error at most {}, median at most a third of it; {note}",
            target.error
        ),
        blocks: SHARED.to_owned(),
        heads: chosen.iter().map(|layer| layer.iter().map(head).collect()).collect(),
    }
}

/// A candidate over what is shared.
fn over(text: &str) -> String {
    let key = |pair: &str| pair.split('=').next().unwrap_or_default().to_owned();
    let given: Vec<String> = text.split(',').map(key).collect();
    let shared = SHARED.split(',').filter(|pair| !given.contains(&key(pair)));
    // `peak` is for scorers that know shares of rows.
    let shared = shared.filter(|pair| key(pair) != "peak" || !text.contains("pooled"));
    [text].into_iter().chain(shared).collect::<Vec<_>>().join(",")
}

fn told(target: &Target, judged: &[Vec<Vec<Judged>>], chosen: &[Vec<Option<usize>>]) -> [String; 5] {
    let heads = judged.iter().flatten().zip(chosen.iter().flatten());
    let (mut cost, mut dense, mut errors) = (0.0, 0, Vec::new());
    for (candidates, chosen) in heads.clone() {
        match chosen {
            Some(index) => {
                cost += candidates[*index].cost;
                errors.push(candidates[*index].error.p95);
            }
            None => {
                (cost, dense) = (cost + 1.0, dense + 1);
                errors.push(0.0);
            }
        }
    }
    let count = heads.count();
    [
        target.name.clone(),
        target.error.to_string(),
        format!("{dense} of {count}"),
        percent(cost / count.max(1) as f64),
        format!("{:.4}", Quantiles::of(&errors).median),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(cost: f64, median: f64, p95: f64) -> Judged {
        Judged { cost, error: Quantiles { count: 9, median, p95, ..Quantiles::default() } }
    }

    #[test]
    fn heads_get_the_cheapest_that_keeps_the_target() {
        let target = Target { name: "t".to_owned(), error: 0.3 };
        let easy = vec![judged(0.1, 0.2, 0.25), judged(0.3, 0.05, 0.3), judged(0.2, 0.09, 0.29)];
        let hard = vec![judged(0.1, 0.0, 0.31), judged(0.95, 0.0, 0.0)];
        let unseen = vec![Judged { cost: 0.0, error: Quantiles::default() }];
        let chosen = choose(&[vec![easy, hard], vec![unseen.clone(), unseen]], &target);
        assert_eq!(chosen, [[Some(2), None], [None, None]]);
        let level = level(&target, &chosen, "n");
        assert_eq!(level.heads[0], [CANDIDATES[2].0, "dense"]);
    }

    #[test]
    fn targets_are_names_with_errors() {
        let read = |text: &str| targets(&[text.to_owned()]);
        assert_eq!(read("a=0.5").unwrap(), [Target { name: "a".to_owned(), error: 0.5 }]);
        for bad in ["", "a", "a=", "a=x", "a=0", "a=-1", "a=NaN", "a=11"] {
            let told = read(bad).unwrap_err().to_string();
            assert!(told.contains("`--target-error`") && told.contains("NAME=ERROR"), "{told}");
        }
    }

    /// What is measured is what the plan says: a head's keys over the shared ones.
    #[test]
    fn candidates_are_rules_of_a_plan() {
        for (text, _) in CANDIDATES {
            let heads = vec![vec![(*text).to_owned()]];
            let level =
                BudgetLevel { name: "a".to_owned(), note: String::new(), blocks: SHARED.to_owned(), heads };
            let plan = HeadBudgets::new("m", vec![level], 1, 1);
            assert!(plan.is_ok(), "{text}: {plan:?}");
            let policy = PrefillPolicy::parse(&format!("blocks:{}", over(text)), None);
            let reads = policy.unwrap_or_else(|error| panic!("{text}: {error}")).reads();
            assert!(!reads.all_keys, "{text} would make remote prefixes travel");
        }
    }

    /// Each costs a plan and an attention of every tile that is looked at: so many are ten minutes or a little more.
    #[test]
    fn candidates_are_few_different_and_of_every_kind() {
        let texts: std::collections::BTreeSet<&str> = CANDIDATES.iter().map(|(text, _)| *text).collect();
        assert!(texts.len() == CANDIDATES.len() && texts.len() <= 32, "{} candidates", texts.len());
        for kinds in [["correction=off", "gamma="], ["correction=off", "top-k"], ["second-order", "top-k"]] {
            assert!(texts.iter().any(|text| kinds.iter().all(|kind| text.contains(kind))), "{kinds:?}");
        }
        assert!(texts.iter().any(|text| text.contains("top-k") && !text.contains("correction=off")));
    }
}
