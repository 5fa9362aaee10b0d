//! Random attention calls, and the slow obvious reference in f64.

use longshore_attention::{
    AttendItem, Column, CpuExecutor, ExactBlock, Executor, HeadShape, KvDtype, Partials, Queries, SummaryKey,
    Tile, TileShape, Tiles, WorkList,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Generator of a test; prints its seed, which a failing test shows.
pub(crate) fn generator(seed: u64) -> ChaCha8Rng {
    println!("seed {seed}");
    ChaCha8Rng::seed_from_u64(seed)
}

/// Numbers that are roughly normal, with deviation `size`.
pub(crate) fn numbers(rng: &mut ChaCha8Rng, count: usize, size: f32) -> Vec<f32> {
    (0..count).map(|_| (0..4).map(|_| rng.random_range(-1.0..1.0_f32)).sum::<f32>() * 0.866 * size).collect()
}

/// The tiles of a sequence with these keys and values, f32 `[tokens, kv_heads, head_dim]`.
pub(crate) fn tiles_of(shape: TileShape, keys: &[f32], values: &[f32]) -> Tiles {
    let block = shape.block_tokens * shape.kv_heads * shape.head_dim;
    let tiles = keys.chunks(block).zip(values.chunks(block)).map(|(keys, values)| {
        let mut tile = Tile::zeroed(shape);
        tile.write(0, keys, values).unwrap();
        tile
    });
    Tiles { shape, tiles: tiles.collect() }
}

/// One attention call with everything that it needs.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) heads: HeadShape,
    pub(crate) kv: Tiles,
    pub(crate) work: WorkList,
    pub(crate) q: Vec<f32>,
    pub(crate) first_position: u64,
    pub(crate) scale: f32,
}

/// What varies between cases.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) heads: HeadShape,
    pub(crate) block_tokens: usize,
    pub(crate) dtype: KvDtype,
    /// Keys before row 0.
    pub(crate) prefix: usize,
    /// Query rows, one a position.
    pub(crate) rows: usize,
    /// Deviation of q.
    pub(crate) size: f32,
}

impl Plan {
    /// Query rows at the end of a sequence whose keys are all visited, causally.
    pub(crate) fn dense(self, rng: &mut ChaCha8Rng) -> Case {
        let Self { heads, block_tokens, dtype, prefix, rows, size } = self;
        let shape = TileShape { block_tokens, kv_heads: heads.kv_heads, head_dim: heads.head_dim, dtype };
        let tokens = prefix + rows;
        let width = heads.kv_heads * heads.head_dim;
        let (keys, values) = (numbers(rng, tokens * width, 1.0), numbers(rng, tokens * width, 1.0));
        let exact = (0..tokens.div_ceil(block_tokens)).map(|tile| ExactBlock {
            tile: tile as u32,
            first_position: (tile * block_tokens) as u64,
            len: block_tokens.min(tokens - tile * block_tokens) as u32,
        });
        Case {
            heads,
            kv: tiles_of(shape, &keys, &values),
            work: WorkList { exact: exact.collect(), ..WorkList::default() },
            q: numbers(rng, rows * heads.query_heads() * heads.head_dim, size),
            first_position: prefix as u64,
            scale: 1.0 / (heads.head_dim as f32).sqrt(),
        }
    }

    /// Some blocks exact, some keys of the others as columns, and a few summaries.
    pub(crate) fn sparse(self, rng: &mut ChaCha8Rng) -> Case {
        let mut case = self.dense(rng);
        let exact = std::mem::take(&mut case.work.exact);
        for block in exact {
            if rng.random_bool(0.5) {
                case.work.exact.push(block);
                continue;
            }
            for offset in 0..block.len {
                if rng.random_bool(0.4) {
                    let position = block.first_position + u64::from(offset);
                    case.work.columns.push(Column { tile: block.tile, offset, position });
                }
            }
        }
        if rng.random_bool(0.5) {
            case.work.column_bias = case.work.columns.iter().map(|_| rng.random_range(-3.0..3.0)).collect();
        }
        let dim = self.heads.head_dim;
        for _ in 0..rng.random_range(0..3 * self.block_tokens) {
            case.work.summaries.push(SummaryKey {
                kv_head: rng.random_range(0..self.heads.kv_heads as u32),
                key: numbers(rng, dim, 1.0),
                value: numbers(rng, dim, 1.0),
                weight: rng.random_range(0.5..64.0),
                bias: rng.random_range(-3.0..3.0),
            });
        }
        case
    }
}

impl Case {
    /// Query rows.
    pub(crate) fn rows(&self) -> usize {
        self.q.len() / self.row_width()
    }

    /// Elements of a query row.
    pub(crate) fn row_width(&self) -> usize {
        self.heads.query_heads() * self.heads.head_dim
    }

    /// The call over `work`, for the rows from `first` on, `count` of them.
    pub(crate) fn item<'a>(
        &'a self,
        work: &'a WorkList,
        first: usize,
        count: usize,
        initial: Option<&'a Partials>,
    ) -> AttendItem<'a> {
        let queries = Queries {
            shape: self.heads,
            first_position: self.first_position + first as u64,
            scale: self.scale,
            data: &self.q[first * self.row_width()..][..count * self.row_width()],
        };
        AttendItem { queries, kv: &self.kv, work, initial }
    }

    /// Result of the whole call.
    pub(crate) fn attend(&self) -> Partials {
        attend(self.item(&self.work, 0, self.rows(), None))
    }

    /// Result of the whole call with some executor.
    pub(crate) fn attend_with(&self, executor: &CpuExecutor) -> Partials {
        executor.attend(&[self.item(&self.work, 0, self.rows(), None)]).unwrap().remove(0)
    }

    /// O in f64, `[rows, query_heads * head_dim]`, straight from the definition.
    pub(crate) fn reference(&self) -> Vec<f64> {
        (0..self.rows())
            .flat_map(|row| (0..self.heads.query_heads()).flat_map(move |head| self.reference_row(row, head)))
            .collect()
    }

    fn reference_row(&self, row: usize, head: usize) -> Vec<f64> {
        let dim = self.heads.head_dim;
        let kv_head = head / self.heads.group;
        let position = self.first_position + row as u64;
        let q = &self.q[row * self.row_width() + head * dim..][..dim];
        let mut keys: Vec<(f64, Vec<f32>)> = Vec::new();
        let mut see = |key: &[f32], value: &[f32], bias: f64| {
            let dot: f64 = q.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
            keys.push((dot * f64::from(self.scale) + bias, value.to_vec()));
        };
        let exact = self.work.exact.iter().flat_map(|block| {
            (0..block.len).map(|offset| (block.tile, offset, block.first_position + u64::from(offset)))
        });
        let columns = self.work.columns.iter().map(|column| (column.tile, column.offset, column.position));
        let biases = self.work.column_bias.iter().copied().chain(std::iter::repeat(0.0));
        let all = exact.map(|key| (key, 0.0)).chain(columns.zip(biases));
        for ((tile, offset, key_position), bias) in all {
            if key_position <= position {
                let (k, v) = self.kv.tiles[tile as usize].read(offset as usize).unwrap();
                let bias = f64::from(bias) * std::f64::consts::LN_2;
                see(&k[kv_head * dim..][..dim], &v[kv_head * dim..][..dim], bias);
            }
        }
        for summary in self.work.summaries.iter().filter(|summary| summary.kv_head as usize == kv_head) {
            let bias = f64::from(summary.weight).ln() + f64::from(summary.bias) * std::f64::consts::LN_2;
            see(&summary.key, &summary.value, bias);
        }
        let top = keys.iter().map(|(t, _)| *t).fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = keys.iter().map(|(t, _)| (t - top).exp()).sum();
        (0..dim).map(|i| keys.iter().map(|(t, v)| (t - top).exp() / total * f64::from(v[i])).sum()).collect()
    }
}

/// Runs one item.
pub(crate) fn attend(item: AttendItem<'_>) -> Partials {
    CpuExecutor::serial().attend(&[item]).unwrap().remove(0)
}

/// ‖a − b‖ / ‖b‖.
pub(crate) fn relative_l2(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let error: f64 = a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - b).powi(2)).sum();
    let size: f64 = b.iter().map(|b| b * b).sum();
    if error == 0.0 { 0.0 } else { (error / size).sqrt() }
}

/// The bits of a partial, to compare exactly.
pub(crate) fn bits(partials: &Partials) -> Vec<u32> {
    partials.to_interleaved().iter().map(|x| x.to_bits()).collect()
}
