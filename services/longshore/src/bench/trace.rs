//! `longshore bench trace`: which blocks would have been held, by eviction policy and capacity.

mod bound;
mod generate;
mod optimum;
mod plot;
mod read;
mod replay;
mod report;
#[cfg(test)]
mod tests;

use std::{fs::File, io::BufReader};

use anyhow::{Context, Result};
use longshore_blocks::{AdmissionRule, Geometry, pool::Eviction};

use self::{
    read::Trace,
    replay::{Below, Cluster, replay},
    report::{Capacity, Report},
};
use crate::{cli::BenchTraceArgs, console};

/// Runs the command; blocks, so never on a reactor thread.
pub(crate) fn trace(args: &BenchTraceArgs) -> Result<()> {
    let policies = policies(args)?;
    let (name, trace) = load(args)?;
    let capacities = capacities(args, &trace);
    let mut report = Report::new(name, &trace, capacities.clone(), args);
    let blocks: Vec<u64> = capacities.iter().map(|capacity| capacity.blocks).collect();
    let bar = console::point_bar("replaying", (policies.len() * blocks.len()) as u64);
    let first = policies.first().copied();
    for policy in policies {
        let at = |capacity: &u64| {
            let hits = replay(&trace, &cluster(args, policy, *capacity));
            bar.inc(1);
            hits
        };
        report.add(policy.name(), blocks.iter().map(at).collect::<Result<_>>()?);
    }
    if let Some(times) = args.disk {
        let policy = first.context("there is a policy")?;
        for rule in AdmissionRule::ALL {
            let disk = Some(Below { times, rule });
            let at = |capacity: &u64| replay(&trace, &Cluster { disk, ..cluster(args, policy, *capacity) });
            let name = format!("{}, disk of {times} times, {}", policy.name(), rule.name());
            report.add(name, blocks.iter().map(at).collect::<Result<_>>()?);
        }
    }
    bar.finish_and_clear();
    report.add(
        "lru, head first",
        blocks.iter().map(|blocks| optimum::first_touched_lru(&trace, *blocks)).collect(),
    );
    report.add("Belady's optimum", blocks.iter().map(|blocks| optimum::belady(&trace, *blocks)).collect());
    report.add("no limit", blocks.iter().map(|_| optimum::belady(&trace, trace.unique_blocks)).collect());
    if args.bound {
        report.add_blocks("bound without foresight", bound::hazard_bound(&trace, &blocks));
    }
    report.write(args)
}

fn policies(args: &BenchTraceArgs) -> Result<Vec<Eviction>> {
    if args.policies.is_empty() {
        return Ok(Eviction::ALL.to_vec());
    }
    let parse = |name: &String| name.parse().with_context(|| format!("`--policy {name}`"));
    args.policies.iter().map(parse).collect()
}

fn load(args: &BenchTraceArgs) -> Result<(String, Trace)> {
    let block_tokens = u64::from(args.block_tokens);
    match &args.file {
        None => {
            let made = generate::generate(args.synthetic as usize, block_tokens, args.seed)?;
            Ok((format!("made up, seed {}", args.seed), made))
        }
        Some(path) => {
            let what = || format!("`{}`", path.display());
            let file = File::open(path).with_context(|| format!("cannot open {}", what()))?;
            let trace = Trace::read(BufReader::new(file), block_tokens).with_context(what)?;
            let name = path.file_stem().unwrap_or(path.as_os_str());
            Ok((name.to_string_lossy().into_owned(), trace))
        }
    }
}

fn capacities(args: &BenchTraceArgs, trace: &Trace) -> Vec<Capacity> {
    let shares = args.percent.iter().map(|percent| trace.unique_blocks as f64 * percent / 100.0);
    let tokens = args.tokens.iter().map(|tokens| *tokens as f64 / trace.block_tokens as f64);
    let blocks: Vec<f64> = if args.tokens.is_empty() { shares.collect() } else { tokens.collect() };
    let capacity = |blocks: f64| {
        // No shard may be without room for a block.
        let blocks = (blocks as u64).max(args.shards);
        Capacity {
            blocks,
            tokens: blocks * trace.block_tokens,
            share: blocks as f64 / trace.unique_blocks as f64,
        }
    };
    blocks.into_iter().map(capacity).collect()
}

fn cluster(args: &BenchTraceArgs, eviction: Eviction, capacity_blocks: u64) -> Cluster {
    let geometry = Geometry::default();
    let stripe_tokens = geometry.block_tokens() * geometry.stripe_blocks();
    Cluster {
        eviction,
        capacity_blocks,
        shards: args.shards,
        stripe_blocks: (stripe_tokens / args.block_tokens).max(1) as usize,
        retention_ms: args.retention_ms.max(1),
        disk: None,
    }
}
