//! How much of the causal attention lists visit.

use crate::{Queries, SparseWork, Visit};

/// Pairs of a packed row (position and query head) and something that it sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pairs {
    /// With keys: of blocks and columns.
    pub keys: u64,
    /// With means of blocks.
    pub means: u64,
    /// With all keys up to the row's own: what exact attention of the tiles' rows visits.
    pub causal: u64,
}

impl Pairs {
    /// Share of the keys that are visited, means not counted; 1 where there are none.
    pub fn density(&self) -> f64 {
        if self.causal == 0 { 1.0 } else { self.keys as f64 / self.causal as f64 }
    }
}

impl std::ops::AddAssign for Pairs {
    fn add_assign(&mut self, other: Self) {
        self.keys += other.keys;
        self.means += other.means;
        self.causal += other.causal;
    }
}

impl SparseWork {
    /// What the rows of `queries`, for which the lists were made, visit; skip-softmax is not taken into account.
    pub fn visited_pairs(&self, queries: &Queries<'_>) -> Pairs {
        let heads = 0..self.kv_heads();
        let lists = heads.flat_map(|head| (0..self.tiles()).map(move |tile| (head, tile)));
        let mut pairs = Pairs::default();
        for (kv_head, tile) in lists {
            let rows = self.rows(tile);
            let (first, rows) = (queries.first_position + rows.start as u64, rows.len() as u64);
            pairs.causal += seen(0, first + rows, first, rows);
            for visit in self.list(kv_head, tile) {
                match *visit {
                    Visit::Block(block) => {
                        pairs.keys += seen(block.first_position, u64::from(block.len), first, rows);
                    }
                    Visit::Columns { first: column, count } => {
                        let columns = &self.columns()[column as usize..][..count as usize];
                        pairs.keys +=
                            columns.iter().map(|column| seen(column.position, 1, first, rows)).sum::<u64>();
                    }
                    Visit::Means { keys, .. } => pairs.means += u64::from(keys.count_ones()) * rows,
                    Visit::EndOfStripe => {}
                }
            }
        }
        let group = queries.shape.group as u64;
        Pairs { keys: pairs.keys * group, means: pairs.means * group, causal: pairs.causal * group }
    }
}

/// Pairs of keys `[key, key + keys)`, one at least, with the rows from position `first` on that see them.
fn seen(key: u64, keys: u64, first: u64, rows: u64) -> u64 {
    // A row that sees the last key sees all; of the rows before, each sees one less.
    let last = key.saturating_add(keys - 1);
    let all = (first + rows).saturating_sub(last.max(first)).min(rows);
    let some = (first..first + rows - all).map(|row| (row + 1).saturating_sub(key));
    all * keys + some.sum::<u64>()
}
