//! What policies should choose, in f64, straight from the definitions; slow and obvious.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::case::Case;

pub(crate) fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// log2 Σ 2^x.
fn log_sum(of: impl Iterator<Item = f64> + Clone) -> f64 {
    let top = of.clone().fold(f64::NEG_INFINITY, f64::max);
    top + of.map(|x| (x - top).exp2()).sum::<f64>().log2()
}

/// Energies of the blocks before a query tile, by each scorer.
pub(crate) fn energies(case: &Case, scorer: &str, tile: Range<usize>, kv_head: usize) -> Vec<f64> {
    let shares = shares(case, scorer, tile, kv_head);
    shares.into_iter().map(|of_block| log_sum(of_block.into_iter())).collect()
}

/// What the rows give to the cells of each block, log2; divided by the row's sum where the scorer does that.
pub(crate) fn shares(case: &Case, scorer: &str, tile: Range<usize>, kv_head: usize) -> Vec<Vec<f64>> {
    let (block, group) = (case.shape.block, case.shape.heads.group);
    let blocks = tile.start / block;
    let heads = kv_head * group..(kv_head + 1) * group;
    let base = f64::from(case.scale) * std::f64::consts::LOG2_E;
    // Rows of scores, `cells` to a block.
    let (rows, cells): (Vec<Vec<f64>>, usize) = match scorer {
        "pooled" | "row-normalised" => {
            let queries = tile.flat_map(|position| heads.clone().map(move |head| case.query(position, head)));
            let row = |q| (0..blocks).map(|b| dot(q, case.mean(b, kv_head)) * base).collect();
            (queries.map(row).collect(), 1)
        }
        "second-order" => {
            let queries = tile.flat_map(|position| heads.clone().map(move |head| case.query(position, head)));
            let spread = |q: &[f32], b| -> f64 {
                let terms = q.iter().zip(case.variance(b, kv_head));
                terms.map(|(&q, &v)| f64::from(q).powi(2) * f64::from(v)).sum()
            };
            let half = 0.5 * f64::from(case.scale) * base;
            let score = |q, b| dot(q, case.mean(b, kv_head)) * base + spread(q, b) * half;
            (queries.map(|q| (0..blocks).map(|b| score(q, b)).collect()).collect(), 1)
        }
        "pooled-query" => {
            let rows: Vec<&[f32]> =
                tile.flat_map(|position| heads.clone().map(move |head| case.query(position, head))).collect();
            let mean: Vec<f64> = (0..case.shape.heads.head_dim)
                .map(|i| rows.iter().map(|q| f64::from(q[i])).sum::<f64>() / rows.len() as f64)
                .collect();
            let score = |b| -> f64 {
                let key = case.mean(b, kv_head);
                mean.iter().zip(key).map(|(q, &k)| q * f64::from(k)).sum::<f64>() * base
            };
            (vec![(0..blocks).map(score).collect()], 1)
        }
        "antidiagonal,stride=8" | "antidiagonal,stride=16" => {
            let stride = if scorer.ends_with('8') { 8 } else { 16 };
            let mut rows = Vec::new();
            for first in tile.step_by(stride) {
                for head in heads.clone() {
                    let cell = |cell: usize| -> f64 {
                        let term = |t: usize| {
                            dot(
                                case.query(first + stride - 1 - t, head),
                                case.key(cell * stride + t, kv_head),
                            )
                        };
                        (0..stride).map(term).sum::<f64>() * base / stride as f64
                    };
                    rows.push((0..blocks * block / stride).map(cell).collect());
                }
            }
            (rows, block / stride)
        }
        _ => panic!("scorer {scorer}"),
    };
    let normalised = scorer != "pooled" && scorer != "pooled-query";
    let offsets: Vec<f64> =
        rows.iter().map(|row| if normalised { log_sum(row.iter().copied()) } else { 0.0 }).collect();
    (0..blocks)
        .map(|b| {
            let own = rows.iter().zip(&offsets).flat_map(|(row, offset)| {
                row[b * cells..(b + 1) * cells].iter().map(move |score| score - offset)
            });
            own.collect()
        })
        .collect()
}

/// What must be chosen, and what may be: they differ by what lies within the tie band.
#[derive(Debug, Default, Clone)]
pub(crate) struct Choice {
    pub(crate) must: BTreeSet<usize>,
    pub(crate) may: BTreeSet<usize>,
}

type Test<'a> = Box<dyn Fn(usize) -> bool + 'a>;

/// Choice of a selector that keeps `most` blocks at most; `band` is in log2.
pub(crate) fn choose(selector: &str, most: usize, energies: &[f64], band: f64) -> Choice {
    let (name, value) = selector.split_once('=').unwrap();
    let value: f64 = value.parse().unwrap();
    let all = 0..energies.len();
    let top = energies.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weight = |b: usize| (energies[b] - top).exp2();
    let total: f64 = all.clone().map(weight).sum();
    // Blocks that come before `b` surely, and perhaps.
    let surely = |b: usize| all.clone().filter(move |&other| energies[other] > energies[b] + band);
    let perhaps =
        |b: usize| all.clone().filter(move |&other| other != b && energies[other] >= energies[b] - band);
    let (must, may): (Test<'_>, Test<'_>) = match name {
        "alpha" => (
            Box::new(|b| energies[b] >= top + value.log2() + band),
            Box::new(|b| energies[b] >= top + value.log2() - band),
        ),
        "k" => (
            Box::new(|b| (perhaps(b).count() as f64) < value),
            Box::new(|b| (surely(b).count() as f64) < value),
        ),
        "gamma" => (
            Box::new(|b| perhaps(b).map(weight).sum::<f64>() < value * total * (1.0 - band) || value == 1.0),
            Box::new(|b| surely(b).map(weight).sum::<f64>() < value * total * (1.0 + band) || value == 1.0),
        ),
        _ => panic!("selector {name}"),
    };
    Choice {
        must: all.clone().filter(|&b| must(b) && perhaps(b).count() < most).collect(),
        may: all.clone().filter(|&b| may(b) && surely(b).count() < most).collect(),
    }
}

/// Asserts that what was found lies between.
#[track_caller]
pub(crate) fn check(what: &str, found: &BTreeSet<usize>, choice: &Choice) {
    let missing: Vec<_> = choice.must.difference(found).collect();
    let extra: Vec<_> = found.difference(&choice.may).collect();
    assert!(missing.is_empty() && extra.is_empty(), "{what}: lacks {missing:?}, has {extra:?} too many");
}
