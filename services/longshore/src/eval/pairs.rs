//! How much a list visits: keys that the executor really computes, not what a policy meant.

use longshore_attention::{PlanInput, SparseWork, Visit};
use serde::Serialize;

/// Pairs of a row and a key (of one KV head).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Pairs {
    /// Keys visited one by one.
    pub(super) keys: u64,
    /// Means of blocks, each of which costs as much as a key.
    pub(super) means: u64,
    /// Keys that exact attention visits.
    pub(super) causal: u64,
}

impl Pairs {
    /// Of all rows of a query tile in one KV head.
    pub(super) fn of(work: &SparseWork, plan: &PlanInput<'_>, kv_head: usize, tile: usize) -> Self {
        let rows = work.rows(tile);
        let first = plan.queries.first_position + rows.start as u64;
        let count = rows.len() as u64;
        let mut pairs = Self { causal: seen(first, count, 0, u64::MAX), ..Self::default() };
        for visit in work.list(kv_head, tile) {
            match *visit {
                Visit::Block(block) => {
                    pairs.keys += seen(first, count, block.first_position, u64::from(block.len));
                }
                Visit::Columns { first: column, count: columns } => {
                    let columns = &work.columns()[column as usize..(column + columns) as usize];
                    pairs.keys += columns.iter().map(|key| seen(first, count, key.position, 1)).sum::<u64>();
                }
                Visit::Means { keys, .. } => pairs.means += count * u64::from(keys.count_ones()),
                Visit::EndOfStripe => {}
            }
        }
        pairs
    }

    /// Adds others.
    pub(super) fn add(&mut self, other: Self) {
        self.keys += other.keys;
        self.means += other.means;
        self.causal += other.causal;
    }

    /// Share of the keys that are visited; 1 when nothing was counted.
    pub(super) fn density(&self) -> f64 {
        if self.causal == 0 { 1.0 } else { self.keys as f64 / self.causal as f64 }
    }
}

/// Pairs of `rows` rows from position `first` on with those of `len` keys from position `from` on that they may see.
fn seen(first: u64, rows: u64, from: u64, len: u64) -> u64 {
    if from.saturating_add(len) <= first + 1 {
        return rows * len;
    }
    (first..first + rows).map(|row| (row + 1).saturating_sub(from).min(len)).sum()
}

#[cfg(test)]
mod tests {
    use longshore_attention::{Column, ExactBlock, HeadShape, KvDtype, PagedKv, Queries, Tile, TileShape};

    use super::*;

    struct Nothing;

    impl PagedKv for Nothing {
        fn shape(&self) -> TileShape {
            TileShape { block_tokens: 64, kv_heads: 1, head_dim: 64, dtype: KvDtype::F32 }
        }

        fn len(&self) -> usize {
            0
        }

        fn tile(&self, index: usize) -> &Tile {
            panic!("there is no tile {index}")
        }
    }

    #[test]
    fn visited_pairs_are_those_of_the_definition() {
        let (first, rows) = (100u64, 32usize);
        let block = |tile: u32, len: u32| {
            Visit::Block(ExactBlock { tile, first_position: u64::from(tile) * 64, len })
        };
        let columns: Vec<Column> =
            [3, 99, 110, 131].map(|position| Column { tile: 0, offset: 0, position }).to_vec();
        let visits = vec![
            block(0, 64),
            block(1, 64),
            block(2, 4),
            Visit::Columns { first: 0, count: 4 },
            Visit::Means { tile: 0, first: 16, keys: 0b1011 },
            Visit::EndOfStripe,
        ];
        let work = SparseWork::new(1, vec![rows as u32], vec![(visits, columns.clone())]).unwrap();
        let shape = HeadShape { kv_heads: 1, group: 1, head_dim: 64 };
        let data = vec![0.0; rows * 64];
        let plan = PlanInput {
            queries: Queries { shape, first_position: first, scale: 1.0, data: &data },
            layer: 0,
            kv: &Nothing,
            first_block: 0,
            summaries: &Nothing,
            stripe_blocks: 32,
            dense_from: u64::MAX,
            spreads: None,
            cosines: None,
        };
        let counted = Pairs::of(&work, &plan, 0, 0);
        let positions = first..first + rows as u64;
        let blocks = positions.clone().flat_map(|row| (0..132u64).filter(move |key| *key <= row)).count();
        let singles =
            positions.clone().flat_map(|row| columns.iter().filter(move |key| key.position <= row)).count();
        assert_eq!(counted.keys, (blocks + singles) as u64);
        assert_eq!(counted.means, 3 * rows as u64);
        assert_eq!(counted.causal, positions.map(|row| row + 1).sum::<u64>());
        assert_eq!(Pairs::default().density(), 1.0);
    }
}
