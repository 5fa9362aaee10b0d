//! `longshore eval scorers`: which scorer and which selector find the blocks that matter when all visit as much, with and without
//! means for the rest.

mod captured;
mod layer;
mod measure;
mod planted;
mod rule;

use anyhow::{Result, ensure};
use longshore_attention::QUERY_TILE;

use self::{
    layer::Layer,
    measure::{Bench, Measured, cost},
    rule::{Rule, Scorer},
};
use super::{
    corpus,
    report::{Conditions, Table, check_places, percent, picture, tell},
    subject::Subject,
    svg::{Heatmap, Scale},
};
use crate::{cli::ScorersArgs, console, process};

/// Positions when nothing else is asked for.
const PLANTED_TOKENS: u32 = 32_768;
const MODEL_TOKENS: u32 = 8192;

/// Runs the command.
pub(super) fn run(args: &ScorersArgs) -> Result<()> {
    let wanted = densities(&args.density)?;
    let Some(config) = process::configuration(&args.serve, args.serve.settings())? else { return Ok(()) };
    if process::only_checked(&args.serve) {
        return Ok(());
    }
    check_places(&args.output)?;
    let pool = process::compute_pool(&config)?;
    let (layers, conditions) = if args.layers.is_empty() {
        let tokens = args.tokens.unwrap_or(PLANTED_TOKENS) as usize;
        let layers = planted::layers(tokens, &tiles(tokens, args.tiles as usize))?;
        (layers, planted_conditions(pool.threads()))
    } else {
        let subject = Subject::load(&config, pool.clone())?;
        let chosen = captured::parse(&args.layers, subject.layers())?;
        let tokens = corpus::read(&subject, args.text.as_deref(), args.tokens.unwrap_or(MODEL_TOKENS))?;
        let at = tiles(tokens.len(), args.tiles as usize);
        (captured::layers(&subject, &tokens, &chosen, &at)?, Conditions::of(&subject))
    };
    let measured = measure(&pool, layers, &wanted)?;
    for &density in &wanted {
        draw(args, density, &measured)?;
    }
    let title = if args.layers.is_empty() { "Planted heads" } else { "Heads of the model" };
    let tables = [
        (format!("{title}, all together"), overview(&measured)),
        (format!("{title}, 95th percentile of output errors"), by_layer(&measured)),
    ];
    tell(&conditions, &args.output, "scorers", &tables, &measured)
}

fn planted_conditions(threads: usize) -> Conditions {
    Conditions {
        model: "planted heads".to_owned(),
        kv_dtype: "f32",
        position: String::new(),
        chunk_tokens: 0,
        threads,
    }
}

/// Shares of percentages; refuses those that are none.
fn densities(percents: &[f64]) -> Result<Vec<f64>> {
    for percent in percents {
        ensure!(
            *percent > 0.0 && *percent <= 100.0,
            "`--density` has {percent}, must be percent above 0, up to 100"
        );
    }
    Ok(percents.iter().map(|percent| percent / 100.0).collect())
}

/// Evenly spaced query tiles of the second half: their first positions.
fn tiles(tokens: usize, count: usize) -> Vec<u64> {
    let all = tokens / 2 / QUERY_TILE..tokens / QUERY_TILE;
    let count = count.min(all.len());
    (1..=count).map(|i| ((all.start + i * all.len() / count - 1) * QUERY_TILE) as u64).collect()
}

fn measure(
    pool: &std::sync::Arc<longshore_compute::ComputePool>,
    layers: Vec<Layer>,
    wanted: &[f64],
) -> Result<Vec<Measured>> {
    let rules = Rule::all();
    let bar = console::point_bar("comparing", (layers.len() + rules.len() * wanted.len()) as u64);
    bar.set_message("exact attention");
    let bench = Bench::new(pool, layers, &|| bar.inc(1))?;
    let mut measured = Vec::with_capacity(rules.len() * wanted.len());
    for &density in wanted {
        for &rule in &rules {
            bar.set_message(format!("{} at {}", rule.name(), percent(density)));
            measured.push(bench.measure(rule, density)?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(measured)
}

/// Best first at each density; the oracle last.
fn ranked(measured: &[Measured], density: f64) -> Vec<&Measured> {
    let mut own: Vec<&Measured> = measured.iter().filter(|m| m.wanted == density).collect();
    let oracle = |m: &Measured| m.rule.scorer == Scorer::Oracle;
    own.sort_by(|a, b| oracle(a).cmp(&oracle(b)).then(a.output.p95.total_cmp(&b.output.p95)));
    own
}

fn all_ranked(measured: &[Measured]) -> Vec<&Measured> {
    let mut densities: Vec<f64> = measured.iter().map(|m| m.wanted).collect();
    densities.dedup();
    densities.into_iter().flat_map(|density| ranked(measured, density)).collect()
}

fn overview(measured: &[Measured]) -> Table {
    let mut table = Table::new([
        "density wanted",
        "rule",
        "value",
        "keys and means",
        "of it means",
        "output median",
        "output p95",
        "output mean",
        "mass mean",
        "mass p10",
    ]);
    for m in all_ranked(measured) {
        table.row([
            percent(m.wanted),
            m.rule.name(),
            format!("{:.4e}", m.value),
            percent(cost(m.visited)),
            percent(m.visited.means as f64 / m.visited.causal.max(1) as f64),
            format!("{:.4}", m.output.median),
            format!("{:.4}", m.output.p95),
            format!("{:.4}", m.output.mean),
            percent(m.mass.mean),
            percent(m.mass.p10),
        ]);
    }
    table
}

fn by_layer(measured: &[Measured]) -> Table {
    let names =
        measured.first().map(|m| m.layers.iter().map(|layer| layer.name.clone())).into_iter().flatten();
    let head: Vec<String> =
        ["density wanted".to_owned(), "rule".to_owned()].into_iter().chain(names).collect();
    let mut table = Table::new(head);
    for m in all_ranked(measured) {
        let errors = m.layers.iter().map(|layer| format!("{:.3}", layer.output.p95));
        table.row([percent(m.wanted), m.rule.name()].into_iter().chain(errors));
    }
    table
}

/// 95th percentiles by rule and layer at one density.
fn draw(args: &ScorersArgs, density: f64, measured: &[Measured]) -> Result<()> {
    let ranked = ranked(measured, density);
    let Some(first) = ranked.first() else { return Ok(()) };
    let columns: Vec<String> = first.layers.iter().map(|layer| layer.name.clone()).collect();
    let rows: Vec<String> = ranked.iter().map(|m| m.rule.name()).collect();
    let cells: Vec<Vec<Option<f64>>> =
        ranked.iter().map(|m| m.layers.iter().map(|layer| Some(layer.output.p95)).collect()).collect();
    let title = format!("output error p95 at {} % of the keys", (density * 1e4).round() / 1e2);
    let axes = (if args.layers.is_empty() { "kind of head" } else { "layer" }, "rule");
    let map =
        Heatmap { title: &title, axes, columns: &columns, rows: &rows, cells: &cells, scale: Scale::Error };
    picture(&args.output, &title, &map.svg())
}

#[cfg(test)]
mod tests;
