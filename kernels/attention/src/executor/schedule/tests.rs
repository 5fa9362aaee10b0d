//! Every block of every row tile comes once and in order, in regions of bounded size.

use std::collections::HashMap;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{REGION, ROWS, ROWS_APART, Region, regions};
use crate::executor::{AttendItem, unseen::Unseen};
use crate::{Column, ExactBlock, HeadShape, KvDtype, Queries, TileShape, WorkList};

struct Call {
    heads: HeadShape,
    kv: Unseen,
    work: WorkList,
    data: Vec<f32>,
    first_position: u64,
}

impl Call {
    /// Rows at the end of `blocks` blocks.
    fn new(heads: HeadShape, rows: usize, blocks: usize) -> Self {
        let shape = TileShape {
            block_tokens: 64,
            kv_heads: heads.kv_heads,
            head_dim: heads.head_dim,
            dtype: KvDtype::F16,
        };
        let exact = (0..blocks as u64).map(|at| ExactBlock { tile: 0, first_position: at * 64, len: 64 });
        Self {
            heads,
            kv: Unseen(shape),
            work: WorkList { exact: exact.collect(), ..WorkList::default() },
            data: vec![0.0; rows * heads.query_heads() * heads.head_dim],
            first_position: (blocks * 64).saturating_sub(rows) as u64,
        }
    }

    fn item(&self) -> AttendItem<'_> {
        let queries =
            Queries { shape: self.heads, first_position: self.first_position, scale: 1.0, data: &self.data };
        AttendItem { queries, kv: &self.kv, work: &self.work, initial: None }
    }
}

/// Blocks of each row tile in the order in which they come; panics on an inconsistent schedule.
fn visited(regions: &[Region]) -> HashMap<(usize, usize, usize), usize> {
    let mut next: HashMap<(usize, usize, usize), usize> = HashMap::new();
    for region in regions {
        let mut whole = HashMap::new();
        for task in &region.tasks {
            let tile = (task.item, task.rows.kv_head, task.rows.first);
            let next = next.entry(tile).or_default();
            assert_eq!(task.blocks.start, *next, "{task:?}");
            assert!(!task.blocks.is_empty(), "{task:?}");
            let Some((number, before)) = task.apart else {
                assert!(whole.insert(tile, ()).is_none(), "two tasks fold onto the same rows: {task:?}");
                *next = task.blocks.end;
                continue;
            };
            let apart = &region.apart[number];
            assert_eq!((apart.item, apart.rows), (task.item, task.rows));
            assert!(apart.rows.count <= ROWS_APART && before + task.blocks.len() <= apart.blocks, "{task:?}");
            *next = task.blocks.end;
        }
        for (number, apart) in region.apart.iter().enumerate() {
            let own = region.tasks.iter().filter(|task| task.apart.is_some_and(|(n, _)| n == number));
            assert_eq!(own.clone().count(), apart.tasks);
            assert_eq!(own.map(|task| task.blocks.len()).sum::<usize>(), apart.blocks);
        }
    }
    next
}

#[test]
fn every_block_comes_once_and_in_order() {
    println!("seed 71");
    let mut rng = ChaCha8Rng::seed_from_u64(71);
    for _ in 0..200 {
        let calls: Vec<Call> = (0..rng.random_range(0..4))
            .map(|_| {
                let kv_heads = rng.random_range(1..4);
                let heads = HeadShape { kv_heads, group: rng.random_range(1..9), head_dim: 64 };
                Call::new(heads, rng.random_range(1..300), rng.random_range(0..400))
            })
            .collect();
        let items: Vec<AttendItem<'_>> = calls.iter().map(Call::item).collect();
        let seen = visited(&regions(&items, rng.random_range(1..5)));
        for (index, call) in calls.iter().enumerate() {
            let packed = call.item().queries.rows() * call.heads.group;
            for first in (0..packed).step_by(ROWS) {
                let last = (first + ROWS).min(packed) - 1;
                let last = call.first_position + (last / call.heads.group) as u64;
                let blocks = call.work.exact.iter().filter(|block| block.first_position <= last).count();
                for kv_head in 0..call.heads.kv_heads {
                    let found = seen.get(&(index, kv_head, first)).copied().unwrap_or(0);
                    assert_eq!(found, blocks, "item {index}, head {kv_head}, row {first}");
                }
            }
        }
    }
}

#[test]
fn long_work_gives_others_a_turn() {
    let heads = HeadShape { kv_heads: 2, group: 4, head_dim: 128 };
    for (rows, blocks) in [(1, 40_000), (4, 40_000), (512, 2_000)] {
        let call = Call::new(heads, rows, blocks);
        let regions = regions(&[call.item()], 2);
        assert!(regions.len() > 3, "{rows} rows, {blocks} blocks: {} regions", regions.len());
        let most = regions.iter().map(|region| region.cost).max().unwrap();
        assert!(most <= 4 * REGION, "{rows} rows, {blocks} blocks: a region of {most} multiply-adds");
    }
}

#[test]
fn few_rows_keep_all_threads_busy() {
    let heads = HeadShape { kv_heads: 3, group: 3, head_dim: 64 };
    let call = Call::new(heads, 1, 32);
    let found = regions(&[call.item()], 2);
    assert_eq!(found.len(), 1);
    assert!(found[0].tasks.len() >= 8 && !found[0].is_small(), "{:?}", found[0]);
    let costs = found[0].tasks.iter().map(|task| task.cost);
    assert!(costs.clone().max().unwrap() <= 2 * costs.min().unwrap());

    // One thread gains nothing from cutting, and neither does a call that is over in a microsecond.
    assert_eq!(regions(&[call.item()], 1)[0].tasks.len(), 3);
    let small = Call::new(heads, 1, 1);
    let found = regions(&[small.item()], 2);
    assert!(found[0].is_small() || found[0].apart.is_empty(), "{found:?}");
}

#[test]
fn unseen_work_is_no_task() {
    let heads = HeadShape { kv_heads: 2, group: 3, head_dim: 64 };
    let mut call = Call::new(heads, 2, 3);
    call.first_position = 0;
    call.work.exact.iter_mut().for_each(|block| block.first_position += 10);
    assert!(regions(&[call.item()], 2).is_empty());
    call.work.columns = vec![Column { tile: 0, offset: 0, position: 0 }; 65];
    let seen = visited(&regions(&[call.item()], 2));
    assert_eq!(seen, HashMap::from([((0, 0, 0), 5), ((0, 1, 0), 5)]));
    assert!(regions(&[], 2).is_empty());
}
