//! Every visit of every row comes once and in order, in regions of bounded size.

use std::collections::HashMap;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{REGION, ROWS, Region, regions};
use crate::executor::unseen::Unseen;
use crate::{ExactBlock, HeadShape, KvDtype, Partials, Queries, SparseItem, SparseWork, TileShape, Visit};

struct Call {
    heads: HeadShape,
    kv: Unseen,
    work: SparseWork,
    data: Vec<f32>,
    stripe: Option<Partials>,
}

impl Call {
    /// Tiles of 32 rows and a last one of fewer, lists of so many stripes of `blocks` blocks.
    fn new(heads: HeadShape, rows: usize, blocks: usize, stripes: impl FnMut() -> usize) -> Self {
        let HeadShape { kv_heads, head_dim, .. } = heads;
        let shape = TileShape { block_tokens: 64, kv_heads, head_dim, dtype: KvDtype::F16 };
        let ends: Vec<u32> = (1..=rows.div_ceil(32)).map(|tile| (tile * 32).min(rows) as u32).collect();
        let block = Visit::Block(ExactBlock { tile: 0, first_position: 0, len: 64 });
        let mut stripe = vec![block; blocks];
        stripe.push(Visit::EndOfStripe);
        let lists = std::iter::repeat_with(stripes).take(kv_heads * ends.len());
        let lists = lists.map(|stripes| (stripe.repeat(stripes), Vec::new())).collect();
        Self {
            heads,
            kv: Unseen(shape),
            work: SparseWork::new(kv_heads, ends, lists).unwrap(),
            data: vec![0.0; rows * heads.query_heads() * head_dim],
            stripe: None,
        }
    }

    fn item(&self) -> SparseItem<'_> {
        SparseItem {
            queries: Queries { shape: self.heads, first_position: 7, scale: 1.0, data: &self.data },
            kv: &self.kv,
            summaries: &self.kv,
            work: &self.work,
            earlier: None,
            stripe: self.stripe.as_ref(),
            skip_below: None,
        }
    }
}

/// Visits of each packed row (item, KV head, row) in the order in which they come; panics on an inconsistent schedule.
fn visited(regions: &[Region<'_>]) -> HashMap<(usize, usize, usize), Vec<Visit>> {
    let mut all: HashMap<_, Vec<Visit>> = HashMap::new();
    for region in regions {
        let mut here = HashMap::new();
        for task in &region.tasks {
            assert!((1..=ROWS).contains(&task.rows.count), "{task:?}");
            for row in task.rows.first..task.rows.first + task.rows.count {
                let row = (task.item, task.rows.kv_head, row);
                assert!(here.insert(row, ()).is_none(), "two tasks of a region write row {row:?}");
                assert_eq!(task.begins, !all.contains_key(&row), "{task:?}");
                let visits = all.entry(row).or_default();
                assert!(visits.last().is_none_or(|last| *last == Visit::EndOfStripe), "{task:?}");
                visits.extend(task.visits);
            }
        }
    }
    all
}

#[test]
fn every_visit_comes_once_and_in_order() {
    println!("seed 91");
    let mut rng = ChaCha8Rng::seed_from_u64(91);
    for _ in 0..100 {
        let calls: Vec<Call> = (0..rng.random_range(0..3))
            .map(|_| {
                let heads = HeadShape {
                    kv_heads: rng.random_range(1..4),
                    group: rng.random_range(1..9),
                    head_dim: 128,
                };
                let rows = rng.random_range(0..100);
                let mut call = Call::new(heads, rows, 8, || rng.random_range(0..20));
                if rows % 2 == 1 {
                    call.data.extend(vec![0.0; 40 * heads.query_heads() * heads.head_dim]);
                    call.stripe = Some(Partials::identity(rows + 40, heads.query_heads(), heads.head_dim));
                }
                call
            })
            .collect();
        let items: Vec<SparseItem<'_>> = calls.iter().map(Call::item).collect();
        let seen = visited(&regions(&items, [1, 2, 3, 8][calls.len()]));
        let mut rows = 0;
        for (index, item) in items.iter().enumerate() {
            for kv_head in 0..item.queries.shape.kv_heads {
                for row in 0..item.queries.rows() * item.queries.shape.group {
                    let position = row / item.queries.shape.group;
                    let tile = Some(position / 32).filter(|_| position < item.work.rows_end());
                    let list = tile.map_or(&[][..], |tile| item.work.list(kv_head, tile));
                    let found = seen.get(&(index, kv_head, row));
                    assert_eq!(found.map_or(&[][..], |visits| &visits[..]), list, "item {index}, row {row}");
                    assert!(
                        item.stripe.is_none() || found.is_some(),
                        "the stripe of row {row} must be folded"
                    );
                    rows += usize::from(found.is_some());
                }
            }
        }
        assert_eq!(rows, seen.len());
    }
}

#[test]
fn long_lists_give_others_a_turn() {
    let heads = HeadShape { kv_heads: 2, group: 4, head_dim: 128 };
    let call = Call::new(heads, 128, 32, || 60);
    let regions = regions(&[call.item()], 2);
    assert!(regions.len() > 5, "{} regions", regions.len());
    let most = regions.iter().map(|region| region.cost).max().unwrap();
    assert!(most <= 4 * REGION, "a region of {most} multiply-adds");
}

#[test]
fn few_rows_keep_all_threads_busy() {
    let call = Call::new(HeadShape { kv_heads: 3, group: 3, head_dim: 64 }, 32, 32, || 1);
    assert_eq!(regions(&[call.item()], 1)[0].tasks.len(), 3);
    assert_eq!(regions(&[call.item()], 2)[0].tasks.len(), 6);
    assert!(regions(&[], 2).is_empty());
}
