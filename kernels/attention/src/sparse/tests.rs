//! Putting lists together, and counting what they visit.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Pairs, SparseWork, Visit};
use crate::{Column, Error, ExactBlock, HeadShape, Queries};

const COLUMN: Column = Column { tile: 0, offset: 0, position: 3 };

fn field(found: Result<SparseWork, Error>) -> &'static str {
    let Err(Error::Invalid { field, .. }) = found else { panic!("must be refused") };
    field
}

#[test]
fn lists_are_found_again() {
    let list = |first| (vec![Visit::Columns { first, count: 1 }, Visit::EndOfStripe], vec![COLUMN; 2]);
    let work = SparseWork::new(2, vec![5, 37], vec![list(0), list(1), (Vec::new(), vec![COLUMN]), list(1)]);
    let work = work.unwrap();
    assert_eq!((work.kv_heads(), work.tiles(), work.rows(0), work.rows(1)), (2, 2, 0..5, 5..37));
    let columns = [Some(0), Some(3), None, Some(6)];
    for (index, first) in columns.into_iter().enumerate() {
        let expected = first.map(|first| vec![Visit::Columns { first, count: 1 }, Visit::EndOfStripe]);
        assert_eq!(work.list(index / 2, index % 2), expected.unwrap_or_default());
    }
    assert_eq!(work.columns(), [COLUMN; 7]);
}

#[test]
fn lists_that_cannot_be() {
    let none = || (Vec::new(), Vec::new());
    assert_eq!(field(SparseWork::new(2, vec![5], vec![none()])), "lists");
    assert_eq!(field(SparseWork::new(1, vec![5], vec![none(), none()])), "lists");
    assert_eq!(field(SparseWork::new(1, vec![0], vec![none()])), "row_ends");
    assert_eq!(field(SparseWork::new(1, vec![5, 5], vec![none(), none()])), "row_ends");
    assert_eq!(field(SparseWork::new(1, vec![5, 4], vec![none(), none()])), "row_ends");
    // Columns of the next list are not the list's own.
    for (first, count) in [(0, 3), (2, 1), (u32::MAX, 2), (1, u32::MAX)] {
        let lists =
            vec![(vec![Visit::Columns { first, count }], vec![COLUMN; 2]), (Vec::new(), vec![COLUMN; 9])];
        assert_eq!(field(SparseWork::new(2, vec![5], lists)), "columns", "{count} from {first}");
    }
}

#[test]
fn pairs_are_counted() {
    println!("seed 81");
    let mut rng = ChaCha8Rng::seed_from_u64(81);
    for _ in 0..50 {
        let shape = HeadShape { kv_heads: 2, group: rng.random_range(1..5), head_dim: 1 };
        let first_position = rng.random_range(0..100);
        let data = vec![0.0; 50 * shape.query_heads()];
        let queries = Queries { shape, first_position, scale: 1.0, data: &data };
        let lists: Vec<_> = (0..4).map(|_| list(&mut rng)).collect();
        let work = SparseWork::new(2, vec![20, 45], lists).unwrap();
        let mut expected = Pairs::default();
        for (kv_head, row) in (0..2).flat_map(|head| (0..45).map(move |row| (head, row))) {
            let position = first_position + row;
            expected.causal += position + 1;
            for visit in work.list(kv_head, usize::from(row >= 20)) {
                let sees = |key: &u64| *key <= position;
                match *visit {
                    Visit::Block(block) => {
                        let keys = block.first_position..block.first_position + u64::from(block.len);
                        expected.keys += keys.filter(sees).count() as u64;
                    }
                    Visit::Columns { first, count } => {
                        let columns = &work.columns()[first as usize..][..count as usize];
                        expected.keys +=
                            columns.iter().filter(|column| sees(&column.position)).count() as u64;
                    }
                    Visit::Means { keys, .. } => expected.means += u64::from(keys.count_ones()),
                    Visit::EndOfStripe => {}
                }
            }
        }
        let group = shape.group as u64;
        let expected = Pairs {
            keys: expected.keys * group,
            means: expected.means * group,
            causal: expected.causal * group,
        };
        assert_eq!(work.visited_pairs(&queries), expected);
        assert_eq!(expected.density(), expected.keys as f64 / expected.causal as f64);
    }
    assert_eq!(Pairs::default().density(), 1.0);
}

fn list(rng: &mut ChaCha8Rng) -> (Vec<Visit>, Vec<Column>) {
    let columns = (0..20).map(|_| Column { position: rng.random_range(0..150), ..COLUMN }).collect();
    let visits = (0..rng.random_range(0..8)).map(|_| match rng.random_range(0..4) {
        0 => Visit::EndOfStripe,
        1 => Visit::Means { tile: 0, first: 0, keys: rng.random() },
        2 => Visit::Columns { first: rng.random_range(0..10), count: rng.random_range(0..11) },
        _ => Visit::Block(ExactBlock {
            tile: 0,
            first_position: rng.random_range(0..150),
            len: rng.random_range(1..65),
        }),
    });
    (visits.collect(), columns)
}
