//! How fast lists are beside the dense path; run by hand, in release:
//! `cargo test --release -p longshore-attention --test primitive -- --ignored --nocapture sparse_speed`.

use std::hint::black_box;
use std::time::Instant;

use longshore_attention::{
    AttendItem, CpuExecutor, Executor, HeadShape, KvDtype, Mean, SparseWork, Visit, WorkList,
};
use longshore_compute::{ComputePool, PoolOptions};

use super::case::SparseCase;
use crate::case::{Plan, generator};

const ROWS: usize = 512;
const STRIPE: usize = 32;

fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

/// The full lists with one of `every` blocks before the row's tile, and those at its end.
fn thinned(case: &SparseCase, every: u32, means: bool) -> SparseWork {
    let last = case.case.kv.tiles.len() as u32 - 8;
    case.work(0..ROWS, |visits| {
        let mut list = Vec::new();
        let mut left = 0_u64;
        for visit in visits {
            match visit {
                Visit::Block(block) if block.tile >= last || block.tile % every == 5 % every => {
                    list.push(*visit)
                }
                Visit::Block(block) => left |= 1 << (block.tile % STRIPE as u32),
                Visit::EndOfStripe => {
                    let tile = list.iter().rev().find_map(|visit| match visit {
                        Visit::Block(block) => Some(block.tile / STRIPE as u32),
                        _ => None,
                    });
                    if let (true, Some(tile), 1..) = (means, tile, left) {
                        list.push(Visit::Means { tile, first: 0, keys: left });
                    }
                    left = 0;
                    list.push(*visit);
                }
                _ => list.push(*visit),
            }
        }
        list
    })
}

/// The full lists' blocks as columns, one of 16 keys.
fn gathered(case: &SparseCase) -> SparseWork {
    let mut case = case.clone();
    for (visits, columns) in &mut case.lists {
        let mut list = Vec::new();
        for stripe in visits.split(|visit| *visit == Visit::EndOfStripe) {
            let first = columns.len() as u32;
            for visit in stripe {
                let Visit::Block(block) = visit else { continue };
                for offset in [3, 18, 36, 50].into_iter().filter(|offset| *offset < block.len) {
                    let position = block.first_position + u64::from(offset);
                    columns.push(longshore_attention::Column { tile: block.tile, offset, position });
                }
            }
            let end = columns.len() as u32;
            list.extend(
                (first..end).step_by(64).map(|at| Visit::Columns { first: at, count: 64.min(end - at) }),
            );
            list.push(Visit::EndOfStripe);
        }
        *visits = list;
    }
    case.whole()
}

/// Alternates the ways, so that the machine's moods meet all alike; the median of the ratios to the first.
#[test]
#[ignore = "a measurement"]
fn measures_sparse_speed() {
    let pool = ComputePool::new(&PoolOptions::default()).unwrap();
    let executor = CpuExecutor::new(pool.clone());
    println!("{} threads, {}", pool.threads(), executor.instruction_set());
    for (group, head_dim, dtype) in [(3, 64, KvDtype::F16), (3, 64, KvDtype::F32), (4, 128, KvDtype::F16)] {
        let heads = HeadShape { kv_heads: 3, group, head_dim };
        let plan = Plan { heads, block_tokens: 64, dtype, prefix: 8192 - ROWS, rows: ROWS, size: 1.0 };
        let case = SparseCase::full(plan, STRIPE, &mut generator(1));
        let lists: Vec<WorkList> = case
            .case
            .work
            .exact
            .chunks(STRIPE)
            .map(|exact| WorkList { exact: exact.to_vec(), ..WorkList::default() })
            .collect();
        let dense: Vec<AttendItem<'_>> =
            lists.iter().map(|list| case.case.item(list, 0, ROWS, None)).collect();
        let works = [
            ("every block", case.whole()),
            ("1 of 4", thinned(&case, 4, false)),
            ("1 of 16", thinned(&case, 16, false)),
            ("1 of 16, means", thinned(&case, 16, true)),
            ("columns, 1 of 16", gathered(&case)),
        ];
        let all =
            case.item(&works[0].1, 0..ROWS).work.visited_pairs(&case.item(&works[0].1, 0..ROWS).queries);
        let mut times = vec![Vec::new(); works.len() + 1];
        let mut merging = Vec::new();
        for _ in 0..15 {
            times[0].push(seconds(|| {
                black_box(executor.attend(&[case.case.item(&case.case.work, 0, ROWS, None)]).unwrap());
            }));
            merging.push(seconds(|| {
                let mut merged = executor.attend(&dense).unwrap();
                let (first, rest) = merged.split_first_mut().unwrap();
                rest.iter().for_each(|later| first.merge(later).unwrap());
                black_box(merged);
            }));
            for ((_, work), times) in works.iter().zip(&mut times[1..]) {
                times.push(seconds(|| {
                    black_box(executor.attend_sparse(&[case.item(work, 0..ROWS)]).unwrap());
                }));
            }
        }
        let median = |times: &[f64]| {
            let mut times = times.to_vec();
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        };
        let rate = |pairs: u64, times: &[f64]| pairs as f64 * head_dim as f64 * 4.0 / median(times) / 1e9;
        let base = rate(all.keys, &times[0]);
        println!(
            "g{group} d{head_dim} {}: dense {:.3} ms, {base:.1} GFLOP/s, stripes merged {:.3} ms",
            dtype.name(),
            median(&times[0]) * 1e3,
            median(&merging) * 1e3
        );
        for ((name, work), times) in works.iter().zip(&times[1..]) {
            let pairs = work.visited_pairs(&case.item(work, 0..ROWS).queries);
            let rate = rate(pairs.keys + pairs.means, times);
            println!(
                "  {name}: {:.3} ms, density {:.3}, {rate:.1} GFLOP/s ({:.0} % of dense)",
                median(times) * 1e3,
                pairs.density(),
                rate / base * 100.0
            );
        }
        let tile = &case.case.kv.tiles[3];
        let time = seconds(|| (0..1000).for_each(|_| drop(black_box(Mean::of(tile)))));
        println!("  mean of a block: {:.2} µs", time * 1e3);
    }
}
