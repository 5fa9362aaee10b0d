//! FlexPrefill's heads against the oracle.

use std::collections::BTreeSet;

use crate::case::{Case, Shape, generator, policy, seen};
use crate::oracle::{Choice, check, choose, dot};

const LAST: usize = 64;

/// What each value of the policy is in a case.
#[derive(Debug, Clone, Copy)]
struct Rule {
    gamma: f64,
    tau: f64,
    /// Blocks.
    least: usize,
}

/// Attention of a head's last rows before `end` in f64, summed over columns and over distances.
fn sums(case: &Case, head: usize, end: usize) -> [Vec<f64>; 2] {
    let kv_head = head / case.shape.heads.group;
    let (mut columns, mut distances) = (vec![0.0_f64; end], vec![0.0_f64; end]);
    for row in end - LAST..end {
        let score = |key| dot(case.query(row, head), case.key(key, kv_head)) * f64::from(case.scale);
        let scores: Vec<f64> = (0..=row).map(score).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - top).exp()).sum();
        for (key, score) in scores.iter().enumerate() {
            let weight = (score - top).exp() / sum;
            columns[key] += weight;
            distances[row - key] += weight;
        }
    }
    [columns, distances]
}

fn by_block(keys: &[f64], block: usize) -> Vec<f64> {
    keys.chunks(block).map(|keys| keys.iter().sum()).collect()
}

/// log2 weights of the first blocks for the mean query of some rows.
fn pooled(case: &Case, head: usize, rows: std::ops::Range<usize>, blocks: usize) -> Vec<f64> {
    let count = rows.len() as f64;
    let score = |block: usize| -> f64 {
        let mean = case.mean(block, head / case.shape.heads.group);
        let each = rows.clone().map(|row| dot(case.query(row, head), mean));
        each.sum::<f64>() / count * f64::from(case.scale) * std::f64::consts::LOG2_E
    };
    (0..blocks).map(score).collect()
}

/// Square root of the Jensen-Shannon divergence of two distributions.
fn distance(p: &[f64], q: &[f64]) -> f64 {
    let share = |weights: &[f64]| -> Vec<f64> {
        let total: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / total).collect()
    };
    let (p, q) = (share(p), share(q));
    let from_middle = |(x, y): (&f64, &f64)| if *x > 0.0 { x * (2.0 * x / (x + y)).ln() } else { 0.0 };
    let one: f64 = p.iter().zip(&q).map(from_middle).sum();
    let other: f64 = q.iter().zip(&p).map(from_middle).sum();
    (0.5 * (one + other)).max(0.0).sqrt()
}

fn needed(keys: &[f64], gamma: f64) -> usize {
    let mut sorted = keys.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let wanted = gamma * keys.iter().sum::<f64>();
    let mut reached = 0.0;
    let enough = sorted.iter().position(|x| {
        reached += x;
        reached >= wanted
    });
    enough.map_or(keys.len(), |last| last + 1)
}

/// The heaviest blocks of columns, or of distances.
fn heaviest(keys: &[f64], block: usize, rule: Rule) -> Choice {
    let count = |gamma: f64| needed(keys, gamma).div_ceil(block).max(rule.least).max(1);
    let mut blocks: Vec<f64> = by_block(keys, block).iter().map(|sum| (sum + 1e-30).log2()).collect();
    blocks[0] = 1e9;
    let pick = |count: usize| choose(&format!("k={count}"), usize::MAX, &blocks, 1e-3);
    Choice { must: pick(count(rule.gamma * 0.9999)).must, may: pick(count(rule.gamma * 1.0001)).may }
}

/// Blocks that distances touch from a tile.
fn touched(case: &Case, tile: usize, diagonals: &BTreeSet<usize>) -> BTreeSet<usize> {
    let block = case.shape.block;
    let near = |position: usize, diagonal: usize| {
        let farthest = (diagonal * block + block - 1).min(position);
        (diagonal * block..=farthest).map(move |distance| (position - distance) / block)
    };
    let pairs = (tile * 32..(tile + 1) * 32).flat_map(|p| diagonals.iter().map(move |d| (p, *d)));
    pairs.flat_map(|(position, diagonal)| near(position, diagonal)).collect()
}

/// What a query head of a tile visits; none where it hangs on rounding which kind the head is.
fn visited(case: &Case, head: usize, tile: usize, end: usize, rule: Rule) -> Option<(Choice, bool)> {
    let block = case.shape.block;
    let [columns, distances] = sums(case, head, end);
    let compared = (end - LAST) / block;
    let truth = by_block(&columns[..compared * block], block);
    let guess: Vec<f64> = pooled(case, head, end - LAST..end, compared).iter().map(|x| x.exp2()).collect();
    let far = distance(&truth, &guess);
    if (far - rule.tau).abs() < 1e-4 {
        return None;
    }
    if far < rule.tau {
        let scores = pooled(case, head, tile * 32..(tile + 1) * 32, tile * 32 / block);
        let mut choice = choose(&format!("gamma={}", rule.gamma), usize::MAX, &scores, 1e-3);
        let least = choose(&format!("k={}", rule.least), usize::MAX, &scores, 1e-3);
        choice.must.extend(least.must);
        choice.may.extend(least.may);
        return Some((choice, true));
    }
    let (columns, diagonals) = (heaviest(&columns, block, rule), heaviest(&distances, block, rule));
    let unite = |columns: &BTreeSet<usize>, diagonals: &BTreeSet<usize>| -> BTreeSet<usize> {
        let seen = columns.iter().copied().filter(|b| *b <= (tile * 32 + 31) / block);
        seen.chain(touched(case, tile, diagonals)).collect()
    };
    let must = unite(&columns.must, &diagonals.must);
    Some((Choice { must, may: unite(&columns.may, &diagonals.may) }, false))
}

#[test]
fn flexible_heads_follow_their_definition() {
    let (mut kinds, mut left_out) = ([0, 0], 0);
    for seed in 0..8 {
        let mut rng = generator(seed);
        let mut shape = Shape::random(&mut rng, 900);
        (shape.tokens, shape.block) = (1030, [16, 32, 64, 128][seed as usize % 4]);
        (shape.heads.head_dim, shape.size) = (8, [0.3, 1.0, 3.0, 6.0][seed as usize / 2]);
        let case = shape.case(&mut rng);
        let rule = Rule {
            gamma: [0.5, 0.8][seed as usize % 2],
            tau: [0.05, 0.02, 0.2][seed as usize % 3],
            least: 2,
        };
        let text = format!(
            "flexprefill:gamma={},tau={},budget={},min_positions=0",
            rule.gamma,
            rule.tau,
            rule.least * shape.block
        );
        let work = case.plan(&policy(&text));
        let (group, kv_heads) = (shape.heads.group, shape.heads.kv_heads);
        for (tile, kv_head) in (0..32).flat_map(|tile| (0..kv_heads).map(move |head| (tile, head))) {
            let end = (tile * 32 / 512 + 1) * 512;
            let heads = kv_head * group..(kv_head + 1) * group;
            let each = heads.map(|head| visited(&case, head, tile, end, rule));
            let Some(each) = each.collect::<Option<Vec<_>>>() else { continue };
            let mut choice = Choice::default();
            for (own, query_aware) in each {
                choice.must.extend(own.must);
                choice.may.extend(own.may);
                kinds[usize::from(query_aware)] += 1;
            }
            let own = tile * 32 / shape.block..=(tile * 32 + 31) / shape.block;
            choice.must.extend(own.clone());
            choice.may.extend(own);
            let found = seen(&case, &work, 0, kv_head, tile);
            check(&format!("{text} tile {tile} KV head {kv_head}"), &found.blocks, &choice);
            assert!(found.means.is_empty() && found.columns.is_empty());
            left_out += (tile * 32 + 31) / shape.block + 1 - found.blocks.len();
        }
        // Two spans are whole; the rows after them are exact.
        assert_eq!(work.list(0, 32), case.plan(&policy("exact")).list(0, 32));
    }
    assert!(kinds.iter().all(|&kind| kind > 200) && left_out > 500, "{kinds:?}, {left_out} left out");
}

#[test]
fn full_shares_are_dense() {
    let case = Shape { tokens: 1024, ..Shape::default() }.case(&mut generator(1));
    let exact = case.plan(&policy("exact"));
    for text in ["gamma=1,tau=0", "gamma=1,tau=1", "gamma=0,tau=0.1,budget=16777216"] {
        assert_eq!(case.plan(&policy(&format!("flexprefill:{text},min_positions=0"))), exact, "{text}");
    }
}
