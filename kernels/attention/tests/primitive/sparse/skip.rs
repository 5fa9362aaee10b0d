//! Skip-softmax: which blocks a row leaves out.

use longshore_attention::{CpuExecutor, Executor, HeadShape, KvDtype, SparseItem, Visit};
use rand::RngExt;

use super::case::SparseCase;
use crate::case::{Plan, bits, generator};

impl SparseCase {
    /// The list of a row without the blocks that it leaves out, judged in f64, and how many those are; `None` when some
    /// block is too near to the limit to tell.
    fn without_skipped(&self, row: usize, head: usize, limit: f64) -> Option<(Vec<Visit>, usize)> {
        let (case, dim) = (&self.case, self.case.heads.head_dim);
        let (kv_head, position) = (head / case.heads.group, case.first_position + row as u64);
        let tiles = self.lists.len() / case.heads.kv_heads;
        let q = &case.q[row * case.row_width() + head * dim..][..dim];
        let scale = f64::from(case.scale) * std::f64::consts::LOG2_E;
        let logit = |tile: u32, key: usize| {
            let (k, _) = case.kv.tiles[tile as usize].read(key).unwrap();
            let pairs = q.iter().zip(&k[kv_head * dim..][..dim]);
            pairs.map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>() * scale
        };
        let (mut top, mut visits, mut skipped) = (f64::NEG_INFINITY, Vec::new(), 0);
        for visit in &self.lists[kv_head * tiles + self.tile_of(row)].0 {
            if let Visit::Block(block) = *visit {
                let seen = (position + 1).saturating_sub(block.first_position).min(u64::from(block.len));
                let own =
                    (0..seen).map(|key| logit(block.tile, key as usize)).fold(f64::NEG_INFINITY, f64::max);
                let distance = top - own - limit;
                if position >= block.first_position + u64::from(block.len) && top.is_finite() {
                    if distance.abs() < 1e-3 {
                        return None;
                    }
                    if distance > 0.0 {
                        skipped += 1;
                        continue;
                    }
                }
                top = top.max(own);
            } else if *visit == Visit::EndOfStripe {
                top = f64::NEG_INFINITY;
            }
            visits.push(*visit);
        }
        Some((visits, skipped))
    }
}

/// A row has the bits of a list without what it leaves out, whatever its neighbours do.
#[test]
fn rows_leave_out_what_lies_far_below() {
    let mut rng = generator(121);
    for (dtype, limit) in
        [(KvDtype::F32, 4.0), (KvDtype::F16, 6.0), (KvDtype::Int8, 2.5), (KvDtype::Bf16, 9.0)]
    {
        let heads = HeadShape { kv_heads: 2, group: rng.random_range(1..6), head_dim: 64 };
        let plan = Plan { heads, block_tokens: 16, dtype, prefix: 200, rows: 40, size: 6.0 };
        let mut case = SparseCase::full(plan, 8, &mut rng);
        let exact = case.attend();
        case.skip_below = Some(limit);
        let found = case.attend();
        let (mut skipped, mut judged) = (0, 0);
        for (row, head) in (0..40).flat_map(|row| (0..heads.query_heads()).map(move |head| (row, head))) {
            let Some((visits, own)) = case.without_skipped(row, head, f64::from(limit)) else { continue };
            let work = case.work(row..row + 1, |_| visits.clone());
            let item = SparseItem { skip_below: None, ..case.item(&work, row..row + 1) };
            let alone = CpuExecutor::serial().attend_sparse(&[item]).unwrap().remove(0);
            assert_eq!(found.row(row, head), alone.row(0, head), "{plan:?}, row {row}, head {head}");
            (skipped, judged) = (skipped + own, judged + 1);
        }
        assert!(judged > 20 * heads.query_heads() && skipped > judged, "{skipped} blocks of {judged} rows");
        // What was left out weighs less than its keys times 2^−limit.
        let pairs = found.clone().finish().into_iter().zip(exact.clone().finish());
        let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst > 0.0 && worst < 8.0 * 240.0 * (-limit).exp2(), "{worst}");
    }
}

/// Whoever is alone with a block keeps it, and so does whoever lies in it.
#[test]
fn own_and_first_blocks_stay() {
    let mut rng = generator(122);
    let heads = HeadShape { kv_heads: 1, group: 3, head_dim: 64 };
    let plan = Plan { heads, block_tokens: 16, dtype: KvDtype::F32, prefix: 0, rows: 64, size: 1.0 };
    let mut case = SparseCase::full(plan, 4, &mut rng);
    // The first key is what all queries look for; what the others weigh still changes bits.
    let (mut keys, values) = (vec![0.0; 16 * 64], vec![0.0; 16 * 64]);
    keys[0] = 60.0;
    case.case.kv.tiles[0].write(0, &keys, &values).unwrap();
    case.case.q.chunks_exact_mut(64).for_each(|q| q[0] = 1.0);
    case.skip_below = Some(1e-3);
    let found = case.attend();
    for row in 0..64 {
        let own = row / 16;
        let work = case.work(row..row + 1, |visits| {
            let keep = |visit: &&Visit| matches!(visit, Visit::Block(block) if block.tile == 0 || block.tile == own as u32);
            visits.iter().filter(keep).copied().collect()
        });
        let item = SparseItem { skip_below: None, ..case.item(&work, row..row + 1) };
        let alone = CpuExecutor::serial().attend_sparse(&[item]).unwrap().remove(0);
        assert_eq!(bits(&alone), bits(&found)[row * 3 * 66..][..3 * 66], "row {row}");
    }
}
