//! Head patterns against the oracle.

use std::collections::BTreeSet;

use longshore_attention::{HeadPattern, HeadPlan, KvDtype, PrefillPolicy};

use crate::case::{Case, Seen, Shape, generator, policy, seen};
use crate::oracle::{Choice, check, choose, dot};

fn planned(patterns: &[HeadPattern]) -> PrefillPolicy {
    let plan = HeadPlan::new(vec![patterns.to_vec(); 6]).unwrap();
    PrefillPolicy::parse("heads:min_positions=0", Some(&plan)).unwrap()
}

#[test]
fn streaming_heads_see_the_ends() {
    for seed in 0..12 {
        let mut rng = generator(seed);
        let case = Shape::random(&mut rng, 700).case(&mut rng);
        let (block, tokens) = (case.shape.block, case.shape.tokens);
        for (sink, recent) in [(0, 1), (1, 33), (64, 256), (100, 16), (5000, 1), (0, 5000)] {
            let work = case.plan(&policy(&format!("streaming:sink={sink},recent={recent},min_positions=0")));
            for tile in 0..tokens / 32 {
                let mut wanted = BTreeSet::new();
                for position in tile * 32..(tile + 1) * 32 {
                    let visible = (0..=position).filter(|&j| j < sink || position - j < recent);
                    wanted.extend(visible.map(|j| j / block));
                }
                // Blocks are whole, and those that the tile lies in are always visited.
                let found = seen(&case, &work, 0, 0, tile);
                wanted.extend(tile * 32 / block..=(tile * 32 + 31) / block);
                assert_eq!(found, Seen { blocks: wanted, ..Seen::default() }, "tile {tile} {sink} {recent}");
            }
        }
        assert_eq!(case.plan(&policy("streaming:recent=5000,min_positions=0")), case.plan(&policy("exact")));
    }
}

#[test]
fn block_sparse_heads_visit_the_nearest_blocks() {
    for seed in 0..8 {
        let mut rng = generator(seed);
        let case = Shape::random(&mut rng, 900).case(&mut rng);
        let heads = case.shape.heads;
        let patterns: Vec<HeadPattern> =
            (0..heads.query_heads()).map(|head| HeadPattern::BlockSparse { top: head as u64 % 5 }).collect();
        let work = case.plan(&planned(&patterns));
        for tile in 0..case.shape.tokens / 32 {
            for kv_head in 0..heads.kv_heads {
                let mut choice = Choice::default();
                let scored = tile * 32 / case.shape.block;
                for head in kv_head * heads.group..(kv_head + 1) * heads.group {
                    let score = |block: usize| -> f64 {
                        let each = (tile * 32..(tile + 1) * 32)
                            .map(|position| dot(case.query(position, head), case.mean(block, kv_head)));
                        each.sum::<f64>() / 32.0
                    };
                    let scores: Vec<f64> = (0..scored).map(score).collect();
                    let own = choose(&format!("k={}", head % 5), usize::MAX, &scores, 1e-4);
                    choice.must.extend(own.must);
                    choice.may.extend(own.may);
                }
                choice.may.extend(scored..=(tile * 32 + 31) / case.shape.block);
                let found = seen(&case, &work, 0, kv_head, tile);
                check(&format!("tile {tile}"), &found.blocks, &choice);
                assert!(found.means.is_empty() && found.columns.is_empty());
            }
        }
    }
}

/// Columns and diagonals of a query head for the span that ends at `end`: attention of its last 64 rows in f64.
fn index(case: &Case, head: usize, end: usize, vertical: usize, slash: usize) -> [Choice; 2] {
    let kv_head = head / case.shape.heads.group;
    let (mut columns, mut diagonals) = (vec![0.0_f64; end], vec![0.0_f64; end]);
    for row in end - 64..end {
        let score = |key| dot(case.query(row, head), case.key(key, kv_head)) * f64::from(case.scale);
        let scores: Vec<f64> = (0..=row).map(score).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - top).exp()).sum();
        for (key, score) in scores.iter().enumerate() {
            let weight = (score - top).exp() / sum;
            columns[key] += weight;
            diagonals[row - key] += weight;
        }
    }
    columns[..30].fill(1e9);
    diagonals[..100].fill(1e9);
    let log = |sums: Vec<f64>| -> Vec<f64> { sums.into_iter().map(|sum| (sum + 1e-30).log2()).collect() };
    [
        choose(&format!("k={}", vertical.max(30)), usize::MAX, &log(columns), 1e-4),
        choose(&format!("k={}", slash.max(100)), usize::MAX, &log(diagonals), 1e-4),
    ]
}

/// Blocks that these distances touch from a tile.
fn touched(case: &Case, tile: usize, distances: &BTreeSet<usize>) -> BTreeSet<usize> {
    let positions = tile * 32..(tile + 1) * 32;
    let pairs = positions.flat_map(|position| distances.iter().map(move |distance| (position, distance)));
    pairs
        .filter(|(position, d)| *d <= position)
        .map(|(position, d)| (position - d) / case.shape.block)
        .collect()
}

fn compare_vertical_slash(case: &Case, vertical: usize, slash: usize) -> [usize; 2] {
    let heads = case.shape.heads;
    let text = format!("minference:vertical={vertical},slash={slash},min_positions=0");
    let work = case.plan(&policy(&text));
    let mut counts = [0, 0];
    for end in (512..=case.shape.tokens).step_by(512) {
        for kv_head in 0..heads.kv_heads {
            let (mut columns, mut distances) = (Choice::default(), Choice::default());
            for head in kv_head * heads.group..(kv_head + 1) * heads.group {
                let [own_columns, own_distances] = index(case, head, end, vertical, slash);
                columns.must.extend(own_columns.must);
                columns.may.extend(own_columns.may);
                distances.must.extend(own_distances.must);
                distances.may.extend(own_distances.may);
            }
            for tile in (end - 512) / 32..end / 32 {
                let what = format!("{text} tile {tile} KV head {kv_head}");
                let found = seen(case, &work, 0, kv_head, tile);
                let mut blocks = Choice {
                    must: touched(case, tile, &distances.must),
                    may: touched(case, tile, &distances.may),
                };
                blocks.may.extend(tile * 32 / case.shape.block..=(tile * 32 + 31) / case.shape.block);
                check(&what, &found.blocks, &blocks);
                let gathered = |columns: &BTreeSet<usize>| -> BTreeSet<usize> {
                    let outside =
                        |j: &usize| *j < (tile + 1) * 32 && !found.blocks.contains(&(j / case.shape.block));
                    columns.iter().copied().filter(outside).collect()
                };
                let wanted = Choice { must: gathered(&columns.must), may: gathered(&columns.may) };
                check(&what, &found.columns, &wanted);
                assert!(found.means.is_empty());
                counts[0] += found.columns.len();
                counts[1] += (tile + 1) * 32 / case.shape.block - found.blocks.len().min(tile);
            }
        }
    }
    counts
}

#[test]
fn vertical_slash_heads_visit_columns_and_diagonals() {
    let mut counts = [0, 0];
    for seed in 0..8 {
        let mut rng = generator(seed);
        let mut shape = Shape::random(&mut rng, 900);
        (shape.tokens, shape.block) = (1100 + seed as usize, [16, 16, 32, 64][seed as usize % 4]);
        shape.heads.head_dim = shape.heads.head_dim.min(20);
        let case = shape.case(&mut rng);
        let found = compare_vertical_slash(&case, 60, 0);
        counts = [counts[0] + found[0], counts[1] + found[1]];
        compare_vertical_slash(&case, 0, 150);
    }
    assert!(counts.iter().all(|&count| count > 1000), "columns and blocks left out: {counts:?}");
}

#[test]
fn vertical_slash_under_extreme_and_equal_logits() {
    let mut rng = generator(9);
    let shape = Shape { tokens: 1024, ..Shape::default() };
    let mut case = shape.case(&mut rng);
    case.q.fill(0.0);
    let work = case.plan(&policy("minference:vertical=31,slash=100,min_positions=0"));
    for tile in 0..32 {
        seen(&case, &work, 0, 0, tile);
    }
    let case = Shape { size: 9000.0, dtype: KvDtype::F16, ..shape }.case(&mut rng);
    let work = case.plan(&policy("minference:vertical=31,slash=100,min_positions=0"));
    for tile in 0..32 {
        seen(&case, &work, 0, 1, tile);
    }
}

#[test]
fn full_budgets_of_heads_are_dense() {
    let case = Shape { tokens: 1024, ..Shape::default() }.case(&mut generator(10));
    let exact = case.plan(&policy("exact"));
    assert_eq!(case.plan(&policy("minference:vertical=0,slash=16777216,min_positions=0")), exact);
    let every_key = case.plan(&policy("minference:vertical=16777216,slash=0,min_positions=0"));
    for tile in 0..32 {
        let found = seen(&case, &every_key, 0, 0, tile);
        let outside = (0..(tile + 1) * 32).filter(|j| !found.blocks.contains(&(j / 16)));
        assert_eq!(found.columns, outside.collect());
    }
    assert_eq!(case.plan(&planned(&[HeadPattern::Dense; 6])), exact);
    assert_eq!(case.plan(&planned(&[HeadPattern::BlockSparse { top: 1000 }; 2])), exact);
}

/// A KV head is dense when one of its query heads is; a plan may be of query heads or of KV heads.
#[test]
fn heads_of_a_group_are_united() {
    use HeadPattern::{Dense, Streaming};
    let case = Shape::default().case(&mut generator(11));
    let exact = case.plan(&policy("exact"));
    let narrow = Streaming { sink: 16, recent: 16 };
    let wide = Streaming { sink: 0, recent: 64 };
    let work = case.plan(&planned(&[narrow, Dense, narrow, narrow, narrow, wide]));
    let kv = case.plan(&planned(&[Dense, Streaming { sink: 16, recent: 64 }]));
    for tile in 0..work.tiles() {
        assert_eq!(work.list(0, tile), exact.list(0, tile));
        assert_eq!(work.list(1, tile), kv.list(1, tile), "tile {tile}");
        assert_eq!(kv.list(0, tile), exact.list(0, tile));
    }
}
