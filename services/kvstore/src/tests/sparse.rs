//! Lists of sparse attention over views, against the executor, and lists that make no sense.
#![allow(clippy::single_range_in_vec_init, reason = "lists of one run")]

use std::ops::Range;

use longshore_attention::{
    CpuExecutor, ExactBlock, Executor as _, HeadShape, Queries, SparseItem, SparseWork, Tiles, Visit,
};
use longshore_proto::types::{RUNS_MAX, SparseVisits};

use super::*;

const GROUP: usize = HEADS / KV_HEADS;

fn visits(kv_head: usize, runs: &[Range<u64>], skip_below: Option<f32>) -> Option<SparseVisits> {
    Some(SparseVisits { kv_head: kv_head as u32, runs: runs.to_vec(), skip_below })
}

/// Rows for the heads of one KV head.
fn sparse_item(view_id: u64, first_position: u64, rows: usize, sparse: Option<SparseVisits>) -> AttendItem {
    let values = noise(first_position + rows as u64, rows * GROUP * HEAD_DIM);
    let queries = Tensor::from_f32(&[rows as u64, GROUP as u64, HEAD_DIM as u64], &values);
    AttendItem { view_id, first_position, queries, scale: 0.35, sparse }
}

/// What a stripe of a list must give: all heads of the tiles, of which one has queries and visits.
fn direct(item: &AttendItem, layer: u32, blocks: u8, visited: &[u64]) -> Vec<u32> {
    let sparse = item.sparse.as_ref().unwrap();
    let (rows, own, width) = (item.queries.shape[0] as usize, sparse.kv_head as usize, GROUP * HEAD_DIM);
    let mut data = vec![0.0; rows * KV_HEADS * width];
    for (row, values) in item.queries.to_f32().unwrap().chunks_exact(width).enumerate() {
        data[(row * KV_HEADS + own) * width..][..width].copy_from_slice(values);
    }
    let heads = HeadShape { kv_heads: KV_HEADS, group: GROUP, head_dim: HEAD_DIM };
    let queries =
        Queries { shape: heads, first_position: item.first_position, scale: item.scale, data: &data };
    let tiles = (1..=blocks).map(|name| tile(name, layer)).collect();
    let source = Tiles { shape: shape(), tiles };
    let len = BLOCK_TOKENS as u32;
    let block =
        |&at: &u64| Visit::Block(ExactBlock { tile: at as u32, first_position: at * u64::from(len), len });
    let list = |head| if head == own { visited.iter().map(block).collect() } else { Vec::new() };
    let lists = (0..KV_HEADS).map(|head| (list(head), Vec::new())).collect();
    let work = SparseWork::new(KV_HEADS, vec![rows as u32], lists).unwrap();
    let skip_below = sparse.skip_below;
    let call = SparseItem {
        queries,
        kv: &source,
        summaries: &source,
        work: &work,
        earlier: None,
        stripe: None,
        skip_below,
    };
    let whole = CpuExecutor::serial().attend_sparse(&[call]).unwrap().remove(0);
    let mut bits = Vec::new();
    for (row, head) in (0..rows).flat_map(|row| (0..GROUP).map(move |head| (row, head))) {
        let (m, l, o) = whole.row(row, own * GROUP + head);
        bits.extend([m, l].iter().chain(o).map(|value| value.to_bits()));
    }
    bits
}

fn bits(partial: &AttendPartial) -> Vec<u32> {
    partial.partial.to_f32().unwrap().iter().map(|value| value.to_bits()).collect()
}

#[tokio::test]
async fn lists_give_the_partials_of_the_executor() {
    let shard = shard(9);
    let names: Vec<u8> = (1..=9).collect();
    shard.store(&names).await;
    let view = shard.view(&names.iter().map(|name| (u64::from(*name) - 1, *name)).collect::<Vec<_>>()).await;
    // Stripes of two blocks.
    let mut state = 7u64;
    for round in 0..40 {
        let mut picked = Vec::new();
        for block in 0..9 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if state >> 62 == 0 || block == round % 9 {
                picked.push(block);
            }
        }
        let mut runs: Vec<Range<u64>> = Vec::new();
        for &block in &picked {
            match runs.last_mut().filter(|run| run.end == block) {
                Some(run) => run.end += 1,
                None => runs.push(block..block + 1),
            }
        }
        let skip = [None, Some(0.5)][round as usize % 2];
        let (rows, layer) = (1 + round as usize % 5, (round % 3) as u32);
        let asked = sparse_item(
            view,
            [30, 144, 200][round as usize % 3],
            rows,
            visits(round as usize % 2, &runs, skip),
        );
        // Beside an item that visits all of the view.
        let query = query(1, layer, vec![asked.clone(), item(view, 144, 2)]);
        let (partials, _) = partials_of(&shard.attend(vec![query.clone()]).await, 1);
        let mut expected: Vec<(u64, Vec<u32>)> = Vec::new();
        for stripe in 0..5 {
            let own: Vec<u64> = picked.iter().copied().filter(|block| block / 2 == stripe).collect();
            if !own.is_empty() {
                expected.push((stripe, direct(&asked, layer, 9, &own)));
            }
        }
        let found = partials
            .iter()
            .filter(|partial| partial.item == 0)
            .map(|partial| (partial.stripe, bits(partial)));
        assert_eq!(found.collect::<Vec<_>>(), expected, "blocks {picked:?}");
        assert_eq!(partials.iter().filter(|partial| partial.item == 1).count(), 5);
        let here = shard.shard.attend_here(&query).unwrap().unwrap();
        let here: Vec<_> = here.iter().map(|answer| answer.partial.to_interleaved()).collect();
        let here: Vec<Vec<u32>> =
            here.iter().map(|values| values.iter().map(|value| value.to_bits()).collect()).collect();
        assert_eq!(here, partials.iter().map(bits).collect::<Vec<_>>());
    }
}

/// Lists that no message can tell reach a shard of the same process all the same.
#[tokio::test]
async fn hostile_lists_are_refused_by_field() {
    let shard = shard(4);
    shard.store(&[1, 2, 3, 4]).await;
    // Block 2 of the sequence is elsewhere.
    let view = shard.view(&[(0, 1), (1, 2), (3, 3), (4, 4)]).await;
    let crowd: Vec<_> = (0..=RUNS_MAX as u64).map(|run| 2 * run..2 * run + 1).collect();
    let far = u64::MAX - 1..u64::MAX;
    let runs = [
        vec![],
        vec![1..1],
        vec![Range { start: 3, end: 1 }],
        vec![3..4, 0..1],
        vec![0..2, 1..2],
        vec![0..1, 1..2],
        vec![0..3],
        vec![2..3],
        vec![1..4],
        vec![4..6],
        vec![5..6],
        vec![0..u64::MAX],
        vec![far],
        crowd,
    ];
    for runs in runs {
        let what = format!("{:?}", &runs[..runs.len().min(4)]);
        let asked = query(1, 0, vec![sparse_item(view, 80, 2, visits(0, &runs, None))]);
        let (code, message) = shard.refused(asked).await;
        assert_eq!(code, 3, "{what}: {message}");
        assert!(message.contains("`items[0].sparse.runs`"), "{what}: {message}");
    }
    let good = || sparse_item(view, 80, 2, visits(1, &[0..2, 3..5], Some(3.0)));
    for (wrong, field) in [
        (visits(KV_HEADS, &[0..1], None), "sparse.kv_head"),
        (visits(0, &[0..1], Some(0.0)), "sparse.skip_below"),
        (visits(0, &[0..1], Some(f32::NAN)), "sparse.skip_below"),
    ] {
        let (code, message) = shard.refused(query(1, 0, vec![AttendItem { sparse: wrong, ..good() }])).await;
        assert!(code == 3 && message.contains(&format!("`items[0].{field}`")), "{message}");
    }
    // As many query heads as all KV heads have are a larger group of one.
    let (partials, _) = partials_of(&shard.attend(vec![query(1, 0, vec![good()])]).await, 1);
    assert_eq!(partials.iter().map(|partial| partial.stripe).collect::<Vec<_>>(), [0, 1, 2]);
}
