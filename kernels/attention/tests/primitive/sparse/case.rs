//! Random lists.

use std::ops::Range;

use longshore_attention::{
    Column, CpuExecutor, ExactBlock, Executor, KvDtype, Partials, QUERY_TILE, Queries, SparseItem,
    SparseWork, TileShape, Tiles, Visit,
};
use rand::{RngExt, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use crate::case::{Case, Plan, numbers, tiles_of};

/// What a list visits, and its columns.
pub(super) type List = (Vec<Visit>, Vec<Column>);

/// One sparse call with everything that it needs.
#[derive(Debug, Clone)]
pub(super) struct SparseCase {
    pub(super) case: Case,
    pub(super) summaries: Tiles,
    /// `[kv_heads][query tiles]`.
    pub(super) lists: Vec<List>,
    pub(super) skip_below: Option<f32>,
}

/// Ends of the query tiles that `rows` positions from `first` on lie in.
fn row_ends(first: usize, rows: usize) -> Vec<u32> {
    let end = first + rows;
    (first / QUERY_TILE + 1..)
        .map(|tile| tile * QUERY_TILE)
        .take_while(|at| *at < end)
        .chain([end])
        .filter(|_| rows > 0)
        .map(|at| (at - first) as u32)
        .collect()
}

impl SparseCase {
    /// Every key of the sequence, stripe by stripe.
    pub(super) fn full(plan: Plan, stripe_blocks: usize, rng: &mut ChaCha8Rng) -> Self {
        Self::with(plan, stripe_blocks, rng, |case, _, _, _| {
            let stripes = case.work.exact.chunks(stripe_blocks);
            let visits = stripes.flat_map(|stripe| {
                stripe.iter().map(|&block| Visit::Block(block)).chain([Visit::EndOfStripe])
            });
            (visits.collect(), Vec::new())
        })
    }

    /// Some blocks, columns and means. Means that no list names are poisoned.
    pub(super) fn random(plan: Plan, stripe_blocks: usize, rng: &mut ChaCha8Rng) -> Self {
        let tokens = stripe_blocks.max(16);
        let dead: Vec<bool> = (0..tokens).map(|_| rng.random_bool(0.3)).collect();
        let mut case = Self::with(plan, stripe_blocks, rng, |case, rng, tile, _| {
            let empty = rng.random_bool(0.1);
            if empty { (Vec::new(), Vec::new()) } else { list(case, stripe_blocks, &dead, tile, rng) }
        });
        let width = plan.heads.kv_heads * plan.heads.head_dim;
        for (key, _) in dead.iter().enumerate().filter(|(_, dead)| **dead) {
            let poison = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX][key % 4];
            for tile in &mut case.summaries.tiles {
                tile.write(key, &vec![poison; width], &vec![poison; width]).unwrap();
            }
        }
        case
    }

    fn with(
        plan: Plan,
        stripe_blocks: usize,
        rng: &mut ChaCha8Rng,
        mut list: impl FnMut(&Case, &mut ChaCha8Rng, Range<usize>, usize) -> List,
    ) -> Self {
        let case = plan.dense(rng);
        let (tokens, width) = (stripe_blocks.max(16), plan.heads.kv_heads * plan.heads.head_dim);
        let stripes = case.kv.tiles.len().div_ceil(stripe_blocks);
        let shape = TileShape { block_tokens: tokens, dtype: KvDtype::F32, ..case.kv.shape };
        let means = numbers(rng, stripes * tokens * width, 1.0);
        let summaries = tiles_of(shape, &means, &numbers(rng, means.len(), 1.0));
        let ends = row_ends(plan.prefix, plan.rows);
        let mut lists = Vec::new();
        for kv_head in 0..plan.heads.kv_heads {
            for tile in 0..ends.len() {
                let start = if tile == 0 { 0 } else { ends[tile - 1] as usize };
                let positions = plan.prefix + start..plan.prefix + ends[tile] as usize;
                lists.push(list(&case, rng, positions, kv_head));
            }
        }
        Self { case, summaries, lists, skip_below: None }
    }

    /// Query tiles.
    fn tiles(&self) -> usize {
        self.lists.len() / self.case.heads.kv_heads
    }

    /// Query tile of a row.
    pub(super) fn tile_of(&self, row: usize) -> usize {
        let first = self.case.first_position as usize;
        (first + row) / QUERY_TILE - first / QUERY_TILE
    }

    /// The lists for some rows; `part` takes some visits of each.
    pub(super) fn work(&self, rows: Range<usize>, part: impl Fn(&[Visit]) -> Vec<Visit>) -> SparseWork {
        let ends = row_ends(self.case.first_position as usize + rows.start, rows.len());
        let first = self.tile_of(rows.start);
        let lists = (0..self.case.heads.kv_heads).flat_map(|head| {
            let own = &self.lists[head * self.tiles()..][..self.tiles()];
            own[first..first + ends.len()].iter().map(|(visits, columns)| (part(visits), columns.clone()))
        });
        SparseWork::new(self.case.heads.kv_heads, ends.clone(), lists.collect()).unwrap()
    }

    /// The lists for all rows.
    pub(super) fn whole(&self) -> SparseWork {
        self.work(0..self.case.rows(), <[Visit]>::to_vec)
    }

    /// The call over `work`, for some rows.
    pub(super) fn item<'a>(&'a self, work: &'a SparseWork, rows: Range<usize>) -> SparseItem<'a> {
        let width = self.case.row_width();
        let queries = Queries {
            shape: self.case.heads,
            first_position: self.case.first_position + rows.start as u64,
            scale: self.case.scale,
            data: &self.case.q[rows.start * width..rows.end * width],
        };
        SparseItem {
            queries,
            kv: &self.case.kv,
            summaries: &self.summaries,
            work,
            earlier: None,
            stripe: None,
            skip_below: self.skip_below,
        }
    }

    /// Result of the whole call with some executor.
    pub(super) fn attend_with(&self, executor: &CpuExecutor) -> Partials {
        let work = self.whole();
        executor.attend_sparse(&[self.item(&work, 0..self.case.rows())]).unwrap().remove(0)
    }

    /// Result of the whole call.
    pub(super) fn attend(&self) -> Partials {
        self.attend_with(&CpuExecutor::serial())
    }
}

/// A list of a query tile at some positions; also of what lies after it, which nobody sees.
fn list(
    case: &Case,
    stripe_blocks: usize,
    dead: &[bool],
    positions: Range<usize>,
    rng: &mut ChaCha8Rng,
) -> List {
    let (mut visits, mut columns) = (Vec::new(), Vec::new());
    for (stripe, blocks) in case.work.exact.chunks(stripe_blocks).enumerate() {
        let (mut own, mut gathered) = (Vec::new(), Vec::new());
        for &block in blocks {
            let holds = positions.contains(&(block.first_position as usize));
            match rng.random_range(0..10) {
                0..3 => own.push(Visit::Block(block)),
                _ if holds && rng.random_bool(0.5) => own.push(Visit::Block(block)),
                3..6 => gathered.extend(some_columns(&block, rng)),
                _ => {}
            }
        }
        gathered.shuffle(rng);
        let mut rest = &gathered[..];
        while !rest.is_empty() {
            let count = rng.random_range(1..=rest.len().min(case.kv.shape.block_tokens));
            own.push(Visit::Columns { first: columns.len() as u32, count: count as u32 });
            columns.extend_from_slice(&rest[..count]);
            rest = &rest[count..];
        }
        let from_last = rng.random_bool(0.5);
        for first in (0..dead.len()).step_by(if from_last { 64 } else { 16 }) {
            let alive = (0..64).filter(|key| dead.get(first + key) == Some(&false));
            let alive = alive.fold(0_u64, |keys, key| keys | 1 << key);
            let keys = alive
                & [u64::MAX, rng.random(), 1 << rng.random_range(0..64), u64::MAX << rng.random_range(0..64)]
                    [rng.random_range(0..4)];
            if keys != 0 && rng.random_bool(0.7) {
                own.push(Visit::Means { tile: stripe as u32, first: first as u32, keys });
            }
        }
        if rng.random_bool(0.3) {
            own.shuffle(rng);
        }
        visits.extend(own);
        if rng.random_bool(0.9) {
            visits.push(Visit::EndOfStripe);
        }
    }
    (visits, columns)
}

fn some_columns(block: &ExactBlock, rng: &mut ChaCha8Rng) -> Vec<Column> {
    let share = [0.05, 0.3, 1.0][rng.random_range(0..3)];
    let offsets: Vec<u32> = (0..block.len).filter(|_| rng.random_bool(share)).collect();
    let column =
        |offset| Column { tile: block.tile, offset, position: block.first_position + u64::from(offset) };
    offsets.into_iter().map(column).collect()
}
