//! Scorers, selectors, guards and correction against the oracle.

use std::collections::BTreeSet;

use longshore_attention::{CpuExecutor, KvDtype};
use rand::RngExt;

use crate::case::{Case, Shape, generator, policy, seen};
use crate::oracle::{Choice, check, choose, energies, shares};

const SCORERS: [&str; 6] = [
    "pooled",
    "row-normalised",
    "second-order",
    "pooled-query",
    "antidiagonal,stride=8",
    "antidiagonal,stride=16",
];

const SELECTORS: [(&str, &str); 3] = [("alpha", "alpha"), ("mass", "gamma"), ("top-k", "k")];

/// Compares all lists of a case; gives how many scored blocks were visited and how many were not.
fn compare(case: &Case, scorer: &str, selector: (&str, &str), value: f64, band: f64) -> [usize; 2] {
    compare_most(case, scorer, selector, (value, None), band)
}

fn compare_most(
    case: &Case,
    scorer: &str,
    (selector, key): (&str, &str),
    (value, most): (f64, Option<usize>),
    band: f64,
) -> [usize; 2] {
    let (sink, local) = (1, 2);
    let max_blocks = most.map_or_else(|| "off".to_owned(), |most| most.to_string());
    let text = format!(
        "blocks:scorer={scorer},selector={selector},{key}={value},max_blocks={max_blocks},sink={sink},local={local},\
         dense_layers=0,min_positions=0"
    );
    let most = most.unwrap_or(usize::MAX);
    let work = case.plan(&policy(&text));
    let mut counts = [0, 0];
    for tile in 0..case.shape.tokens / 32 {
        let rows = tile * 32..(tile + 1) * 32;
        for kv_head in 0..case.shape.heads.kv_heads {
            let found = seen(case, &work, 0, kv_head, tile);
            let energies = energies(case, scorer, rows.clone(), kv_head);
            let scored = energies.len();
            let mut choice = choose(&format!("{key}={value}"), most, &energies, band);
            let forced = (0..scored).filter(|b| *b < sink || b + local >= scored);
            let forced = forced.chain(scored..=(rows.end - 1) / case.shape.block);
            for block in forced {
                choice.must.insert(block);
                choice.may.insert(block);
            }
            check(&format!("{text} tile {tile} KV head {kv_head}, {energies:?}"), &found.blocks, &choice);
            let unvisited: BTreeSet<usize> = (0..scored).filter(|b| !found.blocks.contains(b)).collect();
            assert_eq!(found.means, unvisited, "means are of what is scored and not visited");
            assert!(found.columns.is_empty());
            counts[0] += scored - unvisited.len();
            counts[1] += unvisited.len();
        }
    }
    counts
}

#[test]
fn every_scorer_and_selector_on_random_shapes() {
    let mut counts = [0, 0];
    for seed in 0..40 {
        let mut rng = generator(seed);
        let case = Shape::random(&mut rng, 900).case(&mut rng);
        println!("{:?}", case.shape);
        for scorer in SCORERS {
            for selector in SELECTORS {
                let value = match selector.1 {
                    "k" => f64::from(rng.random_range(0..20)),
                    _ => [0.01, 0.1, 0.5, 0.9][rng.random_range(0..4)],
                };
                let most = rng.random_bool(0.3).then(|| rng.random_range(1..20));
                let found = compare_most(&case, scorer, selector, (value, most), 1e-4);
                counts = [counts[0] + found[0], counts[1] + found[1]];
            }
        }
    }
    assert!(counts.iter().all(|&count| count > 10_000), "visited and not visited: {counts:?}");
}

#[test]
fn equal_logits() {
    let mut case = Shape { size: 0.0, ..Shape::default() }.case(&mut generator(1));
    case.q.fill(0.0);
    for scorer in SCORERS {
        compare(&case, scorer, SELECTORS[0], 0.5, 1e-4);
        compare(&case, scorer, SELECTORS[1], 0.4, 1e-4);
        compare(&case, scorer, SELECTORS[2], 7.0, 1e-4);
        compare_most(&case, scorer, SELECTORS[0], (0.5, Some(7)), 1e-4);
        compare_most(&case, scorer, SELECTORS[1], (0.4, Some(3)), 1e-4);
        // Of equals the later come first: the last tile has 7 of 42, and the first block, which is a sink.
        let text = format!(
            "blocks:scorer={scorer},selector=top-k,k=7,sink=1,local=0,dense_layers=0,min_positions=0"
        );
        let found = seen(&case, &case.plan(&policy(&text)), 0, 1, 20);
        let scored: Vec<usize> = found.blocks.into_iter().filter(|&block| block < 40).collect();
        if !scorer.starts_with("antidiagonal") {
            assert_eq!(scored, [0, 33, 34, 35, 36, 37, 38, 39], "{scorer}");
        }
    }
}

#[test]
fn extreme_logits() {
    for (seed, dtype) in [(0, KvDtype::F32), (1, KvDtype::Int8)] {
        let mut rng = generator(seed);
        let case = Shape { size: 9000.0, dtype, ..Shape::default() }.case(&mut rng);
        for scorer in SCORERS {
            compare(&case, scorer, SELECTORS[0], 0.1, 0.05);
            compare(&case, scorer, SELECTORS[1], 0.9, 0.05);
            compare(&case, scorer, SELECTORS[2], 5.0, 0.05);
        }
    }
}

/// Everything that has no bound visits everything, as `exact` does.
#[test]
fn full_budgets_are_dense() {
    for seed in 0..4 {
        let mut rng = generator(seed);
        let case = Shape::random(&mut rng, 900).case(&mut rng);
        let exact = case.plan(&policy("exact"));
        for scorer in SCORERS {
            for selector in ["alpha,alpha=0", "mass,gamma=1", "top-k,k=100000"] {
                let text = format!(
                    "blocks:scorer={scorer},selector={selector},sink=0,local=0,dense_layers=0,min_positions=0"
                );
                assert_eq!(case.plan(&policy(&text)), exact, "{text}");
            }
        }
    }
}

#[test]
fn guards_make_rows_exact() {
    let case = Shape::default().case(&mut generator(3));
    let text = "blocks:alpha=1,sink=0,local=0,dense_layers=4,min_positions=150";
    let sparse = policy(text);
    let exact = case.plan(&policy("exact"));
    let mut input = case.input(0, case.shape.tokens);
    let serial = CpuExecutor::serial();
    let exact_tiles = |input: &longshore_attention::PlanInput<'_>| -> Vec<usize> {
        let work = sparse.plan(&serial, input).unwrap();
        (0..work.tiles()).filter(|&tile| work.list(1, tile) == exact.list(1, tile)).collect()
    };
    // 700 positions are 21 whole tiles and a rest; 150 lies in tile 4.
    assert_eq!(exact_tiles(&input), [0, 1, 2, 3, 4, 21]);
    input.dense_from = 500;
    assert_eq!(exact_tiles(&input), [0, 1, 2, 3, 4, 15, 16, 17, 18, 19, 20, 21]);
    input.layer = 3;
    assert_eq!(exact_tiles(&input).len(), 22);
}

#[test]
fn blocks_unlike_their_mean_escape() {
    let case = Shape::default().case(&mut generator(4));
    let rare = |block: u64, kv_head: usize| if block % 7 == kv_head as u64 { 0.2 } else { 0.5 };
    let text = "alpha=1,sink=0,local=0,dense_layers=0,min_positions=0";
    let plain = case.plan(&policy(&format!("blocks:{text}")));
    let mut input = case.input(0, case.shape.tokens);
    input.cosines = Some(&rare);
    let work = policy(&format!("blocks:{text},escape=0.3")).plan(&CpuExecutor::serial(), &input).unwrap();
    for tile in 0..21 {
        for kv_head in 0..2 {
            let mut wanted = seen(&case, &plain, 0, kv_head, tile).blocks;
            wanted.extend((0..tile * 2).filter(|block| block % 7 == kv_head));
            assert_eq!(seen(&case, &work, 0, kv_head, tile).blocks, wanted);
        }
    }
}

/// A row that sees little else than one block keeps it, however many rows look elsewhere.
#[test]
fn blocks_that_take_much_of_a_row_stay() {
    let (mut kept, mut left) = (0, 0);
    for (seed, scorer) in ["row-normalised", "second-order", "antidiagonal,stride=16"].into_iter().enumerate()
    {
        let case = Shape { size: 3.0, ..Shape::default() }.case(&mut generator(seed as u64));
        let text = format!(
            "blocks:scorer={scorer},selector=top-k,k=0,peak=0.3,sink=0,local=0,dense_layers=0,min_positions=0"
        );
        let work = case.plan(&policy(&text));
        for (tile, kv_head) in (2..21).flat_map(|tile| [(tile, 0), (tile, 1)]) {
            let scored = tile * 32 / case.shape.block;
            let shares = shares(&case, scorer, tile * 32..(tile + 1) * 32, kv_head);
            let at_least = |limit: f64| -> BTreeSet<usize> {
                let has = |block: &usize| shares[*block].iter().any(|&share| share >= limit.log2());
                (0..scored).filter(has).collect()
            };
            let found = seen(&case, &work, 0, kv_head, tile).blocks;
            let found: BTreeSet<usize> = found.into_iter().filter(|&block| block < scored).collect();
            check(&text, &found, &Choice { must: at_least(0.3001), may: at_least(0.2999) });
            (kept, left) = (kept + found.len(), left + scored - found.len());
        }
    }
    assert!(kept > 50 && left > 50, "{kept} kept, {left} left");
}

#[test]
fn without_correction_there_are_no_means() {
    let case = Shape::default().case(&mut generator(5));
    let work = case.plan(&policy("blocks:correction=off,dense_layers=0,min_positions=0"));
    for tile in 0..work.tiles() {
        assert!(seen(&case, &work, 0, 0, tile).means.is_empty());
    }
}
