//! Two levels of scores against the oracle: which panels are opened, and what is chosen of their blocks.

use std::collections::BTreeSet;
use std::ops::Range;

use longshore_attention::{CpuExecutor, HeadShape};

use crate::case::{Case, Shape, generator, policy, seen};
use crate::oracle::{check, choose, dot};

const GUARDS: &str = "sink=1,local=2,dense_layers=0,min_positions=0";

/// log2 Σ 2^x.
fn log_sum(of: &[f64]) -> f64 {
    let top = of.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    top + of.iter().map(|x| (x - top).exp2()).sum::<f64>().log2()
}

/// Blocks of each panel before a tile: up to 16 of one stripe.
fn panels(case: &Case, blocks: usize) -> Vec<Range<usize>> {
    let stripes = (0..blocks).step_by(case.shape.stripe);
    let of_stripe = stripes.map(|first| first..(first + case.shape.stripe).min(blocks));
    of_stripe
        .flat_map(|stripe| stripe.clone().step_by(16).map(move |first| first..(first + 16).min(stripe.end)))
        .collect()
}

/// Blocks that are scored for a tile; `None` when rounding may decide.
fn open(case: &Case, rows: &[&[f32]], kv_head: usize, blocks: usize) -> Option<BTreeSet<usize>> {
    let panels = panels(case, blocks);
    let size = |panel: &Range<usize>| {
        (panel.start % case.shape.stripe + 16).min(case.shape.stripe) - panel.start % case.shape.stripe
    };
    let whole = panels.iter().take_while(|panel| panel.len() == size(panel)).count();
    let most = whole.div_ceil(4).max(32);
    if whole <= most {
        return Some((0..blocks).collect());
    }
    let base = f64::from(case.scale) * std::f64::consts::LOG2_E;
    let bound = |q: &[f32], panel: &Range<usize>| -> f64 {
        let element = |i: usize| {
            let products =
                panel.clone().map(|block| f64::from(q[i]) * f64::from(case.mean(block, kv_head)[i]));
            products.fold(f64::NEG_INFINITY, f64::max)
        };
        (0..q.len()).map(element).sum::<f64>() * base
    };
    let mut shares = vec![f64::NEG_INFINITY; whole];
    for q in rows {
        let bounds: Vec<f64> = panels[..whole].iter().map(|panel| bound(q, panel)).collect();
        let sum = log_sum(&bounds);
        shares.iter_mut().zip(&bounds).for_each(|(share, bound)| *share = share.max(bound - sum));
    }
    let mut order: Vec<usize> = (0..whole).collect();
    order.sort_by(|&a, &b| shares[b].total_cmp(&shares[a]));
    if shares[order[most - 1]] - shares[order[most]] < 1e-4 {
        return None;
    }
    let open = order[..most].iter().copied().chain(whole..panels.len());
    Some(open.flat_map(|panel| panels[panel].clone()).collect())
}

/// Energies by row-normalised scores among the open blocks.
fn energies(case: &Case, rows: &[&[f32]], kv_head: usize, blocks: usize, open: &BTreeSet<usize>) -> Vec<f64> {
    let base = f64::from(case.scale) * std::f64::consts::LOG2_E;
    let mut shares = vec![Vec::new(); blocks];
    for q in rows {
        let scores: Vec<f64> = open.iter().map(|&block| dot(q, case.mean(block, kv_head)) * base).collect();
        let sum = log_sum(&scores);
        open.iter().zip(&scores).for_each(|(&block, score)| shares[block].push(score - sum));
    }
    shares.iter().map(|shares| if shares.is_empty() { f64::NEG_INFINITY } else { log_sum(shares) }).collect()
}

fn case(stripe: usize, tokens: usize, seed: u64) -> Case {
    let heads = HeadShape { kv_heads: 2, group: 2, head_dim: 8 };
    Shape { heads, stripe, tokens, ..Shape::default() }.case(&mut generator(seed))
}

#[test]
fn panels_are_opened_by_their_bounds_and_blocks_chosen_of_those() {
    let (mut judged, mut closed) = (0, 0);
    // Stripes of one panel, of less, and of two.
    for (stripe, tokens, seed) in [(16, 10_240, 1), (4, 9_999, 2), (32, 12_000, 3)] {
        let case = case(stripe, tokens, seed);
        let first = (tokens - 500) / 32 * 32;
        for (selector, spec) in
            [("mass,gamma=0.5", "gamma=0.5"), ("top-k,k=9", "k=9"), ("alpha,alpha=0.2", "alpha=0.2")]
        {
            let text = format!("blocks:scorer=row-normalised,selector={selector},levels=2,{GUARDS}");
            let work = policy(&text).plan(&CpuExecutor::serial(), &case.input(first, tokens)).unwrap();
            for (tile, kv_head) in (0..(tokens - first) / 32).flat_map(|tile| [(tile, 0), (tile, 1)]) {
                let start = first + tile * 32;
                let blocks = start / case.shape.block;
                let rows: Vec<&[f32]> = (start..start + 32)
                    .flat_map(|position| {
                        [2 * kv_head, 2 * kv_head + 1].map(|head| case.query(position, head))
                    })
                    .collect();
                let Some(open) = open(&case, &rows, kv_head, blocks) else { continue };
                let energies = energies(&case, &rows, kv_head, blocks, &open);
                let mut choice = choose(spec, usize::MAX, &energies, 1e-4);
                for forced in [0].into_iter().chain(blocks - 2..=(start + 31) / case.shape.block) {
                    choice.must.insert(forced);
                    choice.may.insert(forced);
                }
                let found = seen(&case, &work, first, kv_head, tile);
                check(&format!("{text}, tile {tile}, head {kv_head}"), &found.blocks, &choice);
                let unvisited: BTreeSet<usize> =
                    (0..blocks).filter(|block| !found.blocks.contains(block)).collect();
                assert_eq!(found.means, unvisited, "closed blocks have means as others");
                (judged, closed) = (judged + 1, closed + blocks - open.len());
            }
        }
    }
    assert!(judged > 100 && closed > 10_000, "{judged} tiles, {closed} blocks closed");
}

#[test]
fn a_tile_is_planned_alike_in_every_chunk_and_short_prefixes_as_with_one_level() {
    let case = case(16, 10_240, 5);
    let serial = CpuExecutor::serial();
    for scorer in ["pooled", "row-normalised", "second-order"] {
        let of =
            |levels: &str| policy(&format!("blocks:scorer={scorer},selector=top-k,k=20,{GUARDS}{levels}"));
        let (two, one) = (of(",levels=2"), of(""));
        assert_eq!(of(",levels=1"), one);
        let whole = two.plan(&serial, &case.input(0, 10_240)).unwrap();
        for first in [9_984, 10_144] {
            let part = two.plan(&serial, &case.input(first, 10_240)).unwrap();
            for (tile, kv_head) in (0..part.tiles()).flat_map(|tile| [(tile, 0), (tile, 1)]) {
                assert_eq!(
                    part.list(kv_head, tile),
                    whole.list(kv_head, first / 32 + tile),
                    "{scorer}, {first}"
                );
            }
        }
        let single = one.plan(&serial, &case.input(0, 10_240)).unwrap();
        // 32 panels of 16 blocks of 16 positions; a tile at their end has them before it.
        let alike =
            |tile: usize| [0, 1].iter().all(|&head| single.list(head, tile) == whole.list(head, tile));
        assert!((0..=256).all(alike), "{scorer}: a short prefix was planned otherwise");
        assert!(!(300..320).all(alike), "{scorer}: nothing was closed");
    }
}
