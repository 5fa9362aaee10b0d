//! Results against the f64 reference, straight from the definition.

use longshore_attention::{HeadShape, KvDtype, Partials, SparseWork, Tile, Visit};
use rand::RngExt;

use super::case::SparseCase;
use crate::case::{Plan, generator, relative_l2};

/// Keys and values `[key][kv_heads * head_dim]` of tiles.
type Read = Vec<Vec<(Vec<f32>, Vec<f32>)>>;

impl SparseCase {
    fn read(&self) -> (Read, Read) {
        let each = |tile: &Tile| (0..tile.shape().block_tokens).map(|key| tile.read(key).unwrap()).collect();
        let read = |tiles: &[Tile]| tiles.iter().map(each).collect();
        (read(&self.case.kv.tiles), read(&self.summaries.tiles))
    }

    /// O in f64, `[rows, query_heads * head_dim]`.
    fn reference(&self) -> Vec<f64> {
        let (work, (kv, means)) = (self.whole(), self.read());
        let heads = self.case.heads.query_heads();
        let all = (0..self.case.rows()).flat_map(|row| (0..heads).map(move |head| (row, head)));
        all.flat_map(|(row, head)| self.reference_row(&work, &kv, &means, row, head)).collect()
    }

    fn reference_row<'k>(
        &self,
        work: &SparseWork,
        kv: &'k Read,
        means: &'k Read,
        row: usize,
        head: usize,
    ) -> Vec<f64> {
        let (case, dim) = (&self.case, self.case.heads.head_dim);
        let (kv_head, position) = (head / case.heads.group, case.first_position + row as u64);
        let q = &case.q[row * case.row_width() + head * dim..][..dim];
        let mut keys: Vec<(f64, &[f32])> = Vec::new();
        let mut see = |(key, value): &'k (Vec<f32>, Vec<f32>), bias: f64| {
            let pairs = q.iter().zip(&key[kv_head * dim..][..dim]);
            let dot: f64 = pairs.map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
            keys.push((dot * f64::from(case.scale) + bias, &value[kv_head * dim..][..dim]));
        };
        for visit in work.list(kv_head, self.tile_of(row)) {
            match *visit {
                Visit::Block(block) => {
                    let seen = (position + 1).saturating_sub(block.first_position).min(u64::from(block.len));
                    (0..seen).for_each(|key| see(&kv[block.tile as usize][key as usize], 0.0));
                }
                Visit::Columns { first, count } => {
                    let columns = &work.columns()[first as usize..][..count as usize];
                    for column in columns.iter().filter(|column| column.position <= position) {
                        see(&kv[column.tile as usize][column.offset as usize], 0.0);
                    }
                }
                Visit::Means { tile, first, keys } => {
                    let bias = (case.kv.shape.block_tokens as f64).ln();
                    for key in (0..64).filter(|key| keys >> key & 1 == 1) {
                        see(&means[tile as usize][first as usize + key], bias);
                    }
                }
                Visit::EndOfStripe => {}
            }
        }
        let top = keys.iter().map(|(t, _)| *t).fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = keys.iter().map(|(t, _)| (t - top).exp()).sum();
        (0..dim).map(|i| keys.iter().map(|(t, v)| (t - top).exp() / total * f64::from(v[i])).sum()).collect()
    }
}

fn check(plan: Plan, stripe_blocks: usize, case: &SparseCase, limit: f64) {
    let error = relative_l2(&case.attend().finish(), &case.reference());
    assert!(error <= limit, "{plan:?}, stripes of {stripe_blocks}: relative L2 error {error:e}");
}

const GROUPS: [usize; 7] = [1, 2, 3, 4, 5, 7, 8];

/// Head sizes and groups of real models, every KV type, tails, columns and means off every tile size.
#[test]
fn random_lists_match() {
    let mut rng = generator(101);
    for head_dim in [64, 80, 96, 128, 256, 5] {
        for group in GROUPS {
            for dtype in KvDtype::ALL {
                let heads = HeadShape { kv_heads: rng.random_range(1..3), group, head_dim };
                let (prefix, rows) = (rng.random_range(0..300), rng.random_range(1..50));
                let block_tokens = [16, 64][rng.random_range(0..2)];
                let plan = Plan { heads, block_tokens, dtype, prefix, rows, size: 1.0 };
                let stripe_blocks = [1, 4, 16, 32, 128, 256][rng.random_range(0..6)];
                check(plan, stripe_blocks, &SparseCase::random(plan, stripe_blocks, &mut rng), 3e-6);
            }
        }
    }
}

/// One row, at every place of a tile and a block.
#[test]
fn single_rows_match() {
    let mut rng = generator(102);
    for prefix in 60..140 {
        let heads = HeadShape { kv_heads: 2, group: GROUPS[prefix % 7], head_dim: 64 };
        let dtype = KvDtype::ALL[prefix % 4];
        let plan = Plan { heads, block_tokens: 16, dtype, prefix, rows: 1, size: 1.0 };
        check(plan, 4, &SparseCase::random(plan, 4, &mut rng), 3e-6);
    }
}

/// f32 logits of 1e4 are off by about 1e-3, and so are the probabilities: but nothing overflows.
#[test]
fn huge_logits_stay_finite() {
    let mut rng = generator(103);
    let heads = HeadShape { kv_heads: 2, group: 3, head_dim: 64 };
    for size in [1e4, 3e4] {
        let plan = Plan { heads, block_tokens: 64, dtype: KvDtype::F32, prefix: 300, rows: 70, size };
        for _ in 0..4 {
            let case = SparseCase::random(plan, 4, &mut rng);
            assert!(case.attend().finish().iter().all(|x| x.is_finite()));
            check(plan, 4, &case, 3e-2);
        }
    }
}

/// A mean is as many keys as a block has.
#[test]
fn means_stand_for_their_blocks() {
    let mut rng = generator(104);
    let heads = HeadShape { kv_heads: 2, group: 3, head_dim: 64 };
    let plan = Plan { heads, block_tokens: 64, dtype: KvDtype::F32, prefix: 64 * 9, rows: 5, size: 1.0 };
    let mut case = SparseCase::full(plan, 16, &mut rng);
    // Blocks of equal keys, whose mean is any of them.
    for block in 0..9 {
        let (key, value) = case.case.kv.tiles[block].read(7).unwrap();
        case.case.kv.tiles[block].write(0, &key.repeat(64), &value.repeat(64)).unwrap();
        case.summaries.tiles[0].write(block, &key, &value).unwrap();
    }
    let exact: Vec<f64> = case.attend().finish().iter().map(|&x| f64::from(x)).collect();
    for keys in [0b1_1111_1111_u64, 0b1, 0b1_0000_0000, 0b10_0100] {
        let mut means = case.clone();
        for (visits, _) in &mut means.lists {
            visits.retain(
                |visit| !matches!(visit, Visit::Block(block) if block.tile < 9 && keys >> block.tile & 1 == 1),
            );
            visits.insert(visits.len() - 1, Visit::Means { tile: 0, first: 0, keys });
        }
        let error = relative_l2(&means.attend().finish(), &exact);
        assert!(error < 1e-6, "means {keys:b}: relative L2 error {error:e}");
        means.lists.iter_mut().for_each(|(visits, _)| {
            visits.retain(|visit| !matches!(visit, Visit::Means { .. }));
        });
        assert!(relative_l2(&means.attend().finish(), &exact) > 1e-2, "as if means {keys:b} were nothing");
    }
}

#[test]
fn rows_without_visits_are_the_identity() {
    let mut rng = generator(105);
    let heads = HeadShape { kv_heads: 2, group: 3, head_dim: 5 };
    let plan = Plan { heads, block_tokens: 16, dtype: KvDtype::F32, prefix: 10, rows: 60, size: 1.0 };
    let mut case = SparseCase::full(plan, 1, &mut rng);
    let dense = case.attend();
    // Of tile 1 (positions 32 to 63) the first KV head visits nothing, the second only what few rows see.
    case.lists[1].0 = vec![Visit::EndOfStripe; 2];
    let later = case.case.work.exact.iter().filter(|block| block.first_position >= 48);
    case.lists[4].0 = later.map(|&block| Visit::Block(block)).collect();
    let sparse = case.attend();
    for row in 0..60 {
        for head in 0..6 {
            let expected = if case.tile_of(row) == 1 && (head < 3 || row < 38) {
                (f32::NEG_INFINITY, 0.0, &[0.0; 5][..])
            } else if case.tile_of(row) == 1 {
                continue;
            } else {
                dense.row(row, head)
            };
            assert_eq!(sparse.row(row, head), expected, "row {row}, head {head}");
        }
    }
    let none = SparseWork::new(2, Vec::new(), Vec::new()).unwrap();
    let found = longshore_attention::Executor::attend_sparse(
        &longshore_attention::CpuExecutor::serial(),
        &[case.item(&none, 0..60), case.item(&none, 0..0)],
    );
    assert_eq!(found.unwrap(), [Partials::identity(60, 6, 5), Partials::identity(0, 6, 5)]);
}
