//! A row tile: some packed query rows of one KV head, folded over all blocks of a work list.
//!
//! Packed row `r` of a KV head is position `r / group` and query head `kv_head * group + r % group`. The rows of a tile are
//! worked on in groups of up to [`GROUP`], as many as fit in registers.

use pulp::{Arch, Simd, WithSimd};

use crate::partial::Fold;
use crate::shape::LANES;
use crate::tile::{Lane, Widened};
use crate::{Partials, Queries, SummaryKey};

use super::AttendItem;
use super::block::{Block, Gathered, MAX_KEYS, Visibility};
use super::microkernel::{Scores, Seen, logits, outputs, soften};

/// Packed rows of a tile.
pub(super) const ROWS: usize = 48;
/// Rows whose sums lie in registers together.
const GROUP: usize = 6;

/// Buffers that a thread keeps between row tiles.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    widened: Widened,
    gathered: Gathered,
}

/// Accumulated partials of the rows of a tile.
#[derive(Debug)]
pub(super) struct RowTile {
    /// First packed row.
    first: usize,
    m: Vec<f32>,
    l: Vec<f32>,
    /// `[rows][panels]`.
    o: Vec<Lane>,
    /// Lanes of an output row.
    panels: usize,
}

/// Packed query rows in groups, each `[head_dim][rows of the group]`.
struct PackedQueries {
    data: Vec<f32>,
    head_dim: usize,
    /// Scale of the logits, base 2.
    scale: f32,
    /// Position of each row of the tile.
    positions: Vec<u64>,
}

/// Runs the packed rows from `first` on (at most [`ROWS`]) of a KV head over the item's work list.
pub(super) fn run(item: &AttendItem<'_>, kv_head: usize, first: usize, scratch: &mut Scratch) -> RowTile {
    Arch::new().dispatch(FoldAll { item, kv_head, first, scratch })
}

/// A row tile's whole work, compiled once per instruction set. (A closure would not do: the compiler may leave its body
/// outside of the function that has the vector instructions.)
struct FoldAll<'a, 'b> {
    item: &'a AttendItem<'b>,
    kv_head: usize,
    first: usize,
    scratch: &'a mut Scratch,
}

impl WithSimd for FoldAll<'_, '_> {
    type Output = RowTile;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) -> RowTile {
        let Self { item, kv_head, first, scratch } = self;
        let queries = PackedQueries::new(&item.queries, kv_head, first);
        let mut rows = RowTile::new(item, kv_head, first, queries.positions.len());
        let last = queries.positions.last().copied().unwrap_or(0);
        let block_tokens = item.kv.shape().block_tokens;
        for exact in item.work.exact.iter().filter(|exact| exact.first_position <= last) {
            let tile = item.kv.tile(exact.tile as usize);
            rows.fold(&queries, &Block::exact(exact, tile, kv_head, &mut scratch.widened));
        }
        for columns in item.work.columns.chunks(block_tokens) {
            if columns.iter().any(|column| column.position <= last) {
                rows.fold(&queries, &scratch.gathered.columns(item.kv, kv_head, columns));
            }
        }
        let summaries: Vec<&SummaryKey> =
            item.work.summaries.iter().filter(|summary| summary.kv_head as usize == kv_head).collect();
        for summaries in summaries.chunks(block_tokens) {
            rows.fold(&queries, &scratch.gathered.summaries(&item.kv.shape(), summaries));
        }
        rows
    }
}

impl PackedQueries {
    fn new(queries: &Queries<'_>, kv_head: usize, first: usize) -> Self {
        let shape = queries.shape;
        let (dim, width) = (shape.head_dim, shape.query_heads() * shape.head_dim);
        let rows = first..(queries.rows() * shape.group).min(first + ROWS);
        let mut data = Vec::with_capacity(rows.len() * dim);
        for start in rows.clone().step_by(GROUP) {
            let group = start..rows.end.min(start + GROUP);
            for element in 0..dim {
                data.extend(group.clone().map(|row| {
                    let head = kv_head * shape.group + row % shape.group;
                    queries.data[row / shape.group * width + head * dim + element]
                }));
            }
        }
        let positions = rows.map(|row| queries.first_position + (row / shape.group) as u64).collect();
        Self { data, head_dim: dim, scale: queries.scale * std::f32::consts::LOG2_E, positions }
    }
}

impl RowTile {
    /// The rows before any block: the item's `initial`, or the identity.
    fn new(item: &AttendItem<'_>, kv_head: usize, first: usize, rows: usize) -> Self {
        let shape = item.queries.shape;
        let panels = shape.head_dim.div_ceil(LANES);
        let mut tile = Self {
            first,
            m: vec![f32::NEG_INFINITY; rows],
            l: vec![0.0; rows],
            o: vec![[0.0; LANES]; rows * panels],
            panels,
        };
        if let Some(initial) = item.initial {
            for row in 0..rows {
                let packed = first + row;
                let head = kv_head * shape.group + packed % shape.group;
                let (m, l, o) = initial.row(packed / shape.group, head);
                (tile.m[row], tile.l[row]) = (m, l);
                tile.o[row * panels..].as_flattened_mut()[..o.len()].copy_from_slice(o);
            }
        }
        tile
    }

    /// Writes the rows where they belong.
    pub(super) fn store(&self, partials: &mut Partials, kv_head: usize, group: usize) {
        for (row, o) in self.o.chunks_exact(self.panels).enumerate() {
            let packed = self.first + row;
            let head = kv_head * group + packed % group;
            partials.set_row(packed / group, head, self.m[row], self.l[row], o.as_flattened());
        }
    }

    /// Folds a block onto all rows.
    #[inline(always)]
    fn fold(&mut self, queries: &PackedQueries, block: &Block<'_>) {
        let rows = self.m.len();
        let mut first = 0;
        while first + GROUP <= rows {
            self.fold_group::<GROUP>(queries, block, first);
            first += GROUP;
        }
        match rows - first {
            0 => {}
            1 => self.fold_group::<1>(queries, block, first),
            2 => self.fold_group::<2>(queries, block, first),
            3 => self.fold_group::<3>(queries, block, first),
            4 => self.fold_group::<4>(queries, block, first),
            _ => self.fold_group::<5>(queries, block, first),
        }
    }

    /// Folds a block onto the `R` rows from row `first` of the tile on.
    #[inline(always)]
    fn fold_group<const R: usize>(&mut self, queries: &PackedQueries, block: &Block<'_>, first: usize) {
        let q = &queries.data[first * queries.head_dim..][..R * queries.head_dim];
        let seen = Seen::new(&queries.positions[first..], block);
        if seen.end == 0 {
            return;
        }
        let mut scores: Scores<R> = [[0.0; MAX_KEYS]; R];
        let panels = seen.end.div_ceil(LANES);
        logits::<R>(q.as_chunks().0, block, queries.scale, panels, &mut scores);
        let mut folds = [Fold::Keep; R];
        for r in 0..R {
            hide(&mut scores[r][..panels * LANES], seen.positions[r], block);
            let (m, l) = soften(&mut scores[r].as_chunks_mut().0[..panels]);
            folds[r] = Fold::begin(&mut self.m[first + r], &mut self.l[first + r], m, l);
        }
        for (panel, v) in block.v.chunks_exact(block.v_stride).enumerate() {
            let sums = outputs(&scores, v, block, &seen);
            for r in 0..R {
                folds[r].output(&mut self.o[(first + r) * self.panels + panel], &sums[r]);
            }
        }
    }
}

impl<const R: usize> Seen<R> {
    /// For the rows at the first `R` of `positions`, which ascend.
    #[inline(always)]
    fn new(positions: &[u64], block: &Block<'_>) -> Self {
        let mut seen = Self { positions: [0; R], common: 0, end: 0 };
        seen.positions.copy_from_slice(&positions[..R]);
        seen.common = block.visibility.leading(seen.positions[0], block.keys);
        seen.end = block.visibility.end(seen.positions[R - 1], block.keys);
        seen
    }
}

/// Makes the logits of keys that the row does not see −∞.
#[inline(always)]
fn hide(scores: &mut [f32], position: u64, block: &Block<'_>) {
    match block.visibility {
        Visibility::At(_) => {
            let keys = block.keys.min(scores.len());
            for (key, score) in scores[..keys].iter_mut().enumerate() {
                if !block.visibility.sees(position, key) {
                    *score = f32::NEG_INFINITY;
                }
            }
            scores[keys..].fill(f32::NEG_INFINITY);
        }
        Visibility::From(_) | Visibility::All => {
            let seen = block.visibility.leading(position, block.keys).min(scores.len());
            scores[seen..].fill(f32::NEG_INFINITY);
        }
    }
}

#[cfg(test)]
mod tests {
    use pulp::{Scalar, WithSimd};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::{FoldAll, Scratch, run};
    use crate::executor::{AttendItem, PagedKv};
    use crate::{ExactBlock, HeadShape, KvDtype, Queries, Tile, TileShape, WorkList};

    struct One(Tile);

    impl PagedKv for One {
        fn shape(&self) -> TileShape {
            self.0.shape()
        }
        fn len(&self) -> usize {
            1
        }
        fn tile(&self, _index: usize) -> &Tile {
            &self.0
        }
    }

    /// Processors without fused multiply-adds or vectors give the same bits, only later.
    #[test]
    fn instruction_sets_agree_bit_for_bit() {
        println!("seed 51");
        let mut rng = ChaCha8Rng::seed_from_u64(51);
        let mut draw = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-3.0..3.0)).collect() };
        let heads = HeadShape { kv_heads: 1, group: 2, head_dim: 40 };
        for dtype in [KvDtype::F32, KvDtype::F16] {
            let mut tile = Tile::zeroed(TileShape { block_tokens: 64, kv_heads: 1, head_dim: 40, dtype });
            tile.write(0, &draw(64 * 40), &draw(64 * 40)).unwrap();
            let (kv, data) = (One(tile), draw(23 * 2 * 40));
            let exact = vec![ExactBlock { tile: 0, first_position: 0, len: 61 }];
            let work = WorkList { exact, ..WorkList::default() };
            let queries = Queries { shape: heads, first_position: 30, scale: 0.2, data: &data };
            let item = AttendItem { queries, kv: &kv, work: &work, initial: None };
            let fast = run(&item, 0, 0, &mut Scratch::default());
            let scratch = &mut Scratch::default();
            let plain = FoldAll { item: &item, kv_head: 0, first: 0, scratch }.with_simd(Scalar::new());
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
            assert_eq!(bits(&fast.m), bits(&plain.m));
            assert_eq!(bits(&fast.l), bits(&plain.l));
            assert_eq!(bits(fast.o.as_flattened()), bits(plain.o.as_flattened()));
        }
    }
}
