//! The canonical arithmetic: what may not change a single bit.

use longshore_attention::{AttendItem, CpuExecutor, Executor, HeadShape, KvDtype, Partials, Tile, WorkList};
use longshore_compute::{ComputePool, InstructionSet, PoolOptions};
use rand::{RngExt, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use crate::case::{Case, Plan, attend, bits, generator};

/// A random plan of a size that has several row tiles and blocks.
fn plan(rng: &mut ChaCha8Rng) -> Plan {
    Plan {
        heads: HeadShape {
            kv_heads: rng.random_range(1..4),
            group: rng.random_range(1..9),
            head_dim: [7, 64, 80][rng.random_range(0..3)],
        },
        block_tokens: [16, 64][rng.random_range(0..2)],
        dtype: KvDtype::ALL[rng.random_range(0..4)],
        prefix: rng.random_range(0..200),
        rows: rng.random_range(2..80),
        size: [0.1, 1.0, 30.0][rng.random_range(0..3)],
    }
}

/// A slice of rows of a result, as bits.
fn rows_of(partials: &Partials, first: usize, count: usize) -> Vec<u32> {
    let (_, heads, dim) = partials.shape();
    let width = heads * (dim + 2);
    bits(partials)[first * width..][..count * width].to_vec()
}

#[test]
fn rows_do_not_depend_on_other_rows() {
    let mut rng = generator(21);
    for _ in 0..12 {
        let plan = plan(&mut rng);
        let case = plan.sparse(&mut rng);
        let whole = case.attend();
        let mut first = 0;
        while first < case.rows() {
            let count = rng.random_range(1..=(case.rows() - first).min(20));
            let part = attend(case.item(&case.work, first, count, None));
            assert_eq!(bits(&part), rows_of(&whole, first, count), "{plan:?}, {count} rows from {first}");
            first += count;
        }
    }
}

/// Plain Rust says what every instruction set computes.
#[test]
fn instruction_sets_agree() {
    let mut rng = generator(28);
    for dtype in KvDtype::ALL {
        for group in 1..9 {
            let plan = Plan { dtype, rows: rng.random_range(1..9), ..plan(&mut rng) };
            let plan = Plan { heads: HeadShape { group, ..plan.heads }, ..plan };
            let case = plan.sparse(&mut rng);
            let expected = case.attend_with(&with(InstructionSet::Portable));
            for set in InstructionSet::available() {
                assert_eq!(bits(&case.attend_with(&with(set))), bits(&expected), "{set}, {plan:?}");
            }
        }
    }
}

fn with(set: InstructionSet) -> CpuExecutor {
    CpuExecutor::serial().with_instruction_set(set)
}

/// Few rows and many blocks: threads share the blocks of a row.
#[test]
fn long_rows_do_not_depend_on_threads() {
    let mut rng = generator(29);
    for dtype in KvDtype::ALL {
        for (group, rows) in [(1, 1), (3, 1), (4, 4), (7, 2), (8, 1)] {
            let heads = HeadShape { kv_heads: 2, group, head_dim: 64 };
            let plan = Plan { heads, block_tokens: 64, dtype, prefix: 5000, rows, size: 1.0 };
            let case = plan.dense(&mut rng);
            let expected = bits(&case.attend());
            for threads in [2, 4] {
                let pool = ComputePool::new(&PoolOptions { threads, pin: Vec::new() }).unwrap();
                let executor = CpuExecutor::new(pool);
                for _ in 0..3 {
                    let found = bits(&case.attend_with(&executor));
                    assert_eq!(found, expected, "{plan:?} on {threads} threads");
                }
            }
        }
    }
}

#[test]
fn rows_do_not_depend_on_items_or_threads() {
    let mut rng = generator(22);
    let plans: Vec<Plan> = (0..8).map(|_| plan(&mut rng)).collect();
    let cases: Vec<Case> = plans.iter().map(|plan| plan.sparse(&mut rng)).collect();
    let alone: Vec<Vec<u32>> = cases.iter().map(|case| bits(&case.attend())).collect();
    for threads in [1, 2, 3, 4, 7] {
        let mut order: Vec<usize> = (0..cases.len()).collect();
        order.shuffle(&mut rng);
        let items: Vec<AttendItem<'_>> =
            order.iter().map(|&i| cases[i].item(&cases[i].work, 0, cases[i].rows(), None)).collect();
        let pool = ComputePool::new(&PoolOptions { threads, pin: Vec::new() }).unwrap();
        let together = CpuExecutor::new(pool).attend(&items).unwrap();
        for (&i, partials) in order.iter().zip(&together) {
            assert_eq!(bits(partials), alone[i], "{:?} on {threads} threads", plans[i]);
        }
    }
}

/// Keys that a row does not see, be they later ones or past `len`, may hold anything: even what would poison a sum.
#[test]
fn unseen_keys_do_not_exist() {
    let mut rng = generator(23);
    for _ in 0..12 {
        let plan = plan(&mut rng);
        let case = plan.dense(&mut rng);
        let whole = case.attend();
        let row = rng.random_range(0..case.rows());
        let cut = case.first_position as usize + row + 1;

        let mut poisoned = case.clone();
        let width = plan.heads.kv_heads * plan.heads.head_dim;
        let block = plan.block_tokens;
        for (poison, position) in
            [f32::NAN, f32::INFINITY].iter().cycle().zip(cut..case.kv.tiles.len() * block)
        {
            let tile: &mut Tile = &mut poisoned.kv.tiles[position / block];
            tile.write(position % block, &vec![*poison; width], &vec![*poison; width]).unwrap();
        }
        assert_eq!(
            rows_of(&poisoned.attend(), 0, row + 1),
            rows_of(&whole, 0, row + 1),
            "{plan:?}, keys from {cut} on poisoned"
        );

        // The same keys, but not even in the work list.
        let mut short = case.work.clone();
        short.exact.retain_mut(|block| {
            block.len = block.len.min((cut as u64).saturating_sub(block.first_position) as u32);
            block.len > 0
        });
        let part = attend(case.item(&short, row, 1, None));
        assert_eq!(bits(&part), rows_of(&whole, row, 1), "{plan:?}, work list cut at {cut}");
    }
}

/// Columns that a row does not see keep their place in the order, and nothing else. (Exact blocks lie in other tiles.)
#[test]
fn unseen_columns_do_not_exist() {
    let mut rng = generator(24);
    let plan = Plan {
        heads: HeadShape { kv_heads: 2, group: 3, head_dim: 64 },
        block_tokens: 64,
        dtype: KvDtype::F32,
        prefix: 50,
        rows: 150,
        size: 1.0,
    };
    let mut case = plan.sparse(&mut rng);
    case.work.columns.shuffle(&mut rng);
    let whole = case.attend();
    let cut = case.first_position + 60;
    for column in &case.work.columns {
        if column.position > cut {
            let poison = [f32::NAN; 128];
            case.kv.tiles[column.tile as usize].write(column.offset as usize, &poison, &poison).unwrap();
        }
    }
    let seen = attend(case.item(&case.work, 0, 61, None));
    assert_eq!(bits(&seen), rows_of(&whole, 0, 61));
}

/// attend(a..c) = attend(b..c, initial = attend(a..b)).
#[test]
fn a_fold_continues_bit_for_bit() {
    let mut rng = generator(25);
    for _ in 0..12 {
        let plan = plan(&mut rng);
        let case = plan.sparse(&mut rng);
        let whole = bits(&case.attend());
        let cut = rng.random_range(0..=case.work.exact.len());
        let early = WorkList { exact: case.work.exact[..cut].to_vec(), ..WorkList::default() };
        let late = WorkList { exact: case.work.exact[cut..].to_vec(), ..case.work.clone() };
        let first = attend(case.item(&early, 0, case.rows(), None));
        let wired = Partials::from_interleaved(
            case.rows(),
            plan.heads.query_heads(),
            plan.heads.head_dim,
            &first.to_interleaved(),
        )
        .unwrap();
        let both = attend(case.item(&late, 0, case.rows(), Some(&wired)));
        assert_eq!(bits(&both), whole, "{plan:?}, cut at block {cut}");
    }
}

/// Folding blocks inside the executor is merging their partials.
#[test]
fn folding_is_merging() {
    let mut rng = generator(26);
    for _ in 0..12 {
        let plan = plan(&mut rng);
        let case = plan.dense(&mut rng);
        let mut merged = Partials::identity(case.rows(), plan.heads.query_heads(), plan.heads.head_dim);
        for block in &case.work.exact {
            let one = WorkList { exact: vec![*block], ..WorkList::default() };
            merged.merge(&attend(case.item(&one, 0, case.rows(), None))).unwrap();
        }
        assert_eq!(bits(&merged), bits(&case.attend()), "{plan:?}");
    }
}

/// A tile that travelled as bytes gives the same bits.
#[test]
fn bodies_travel() {
    let mut rng = generator(27);
    let plan = plan(&mut rng);
    let mut case = plan.sparse(&mut rng);
    let before = bits(&case.attend());
    for tile in &mut case.kv.tiles {
        *tile = Tile::from_bytes(tile.shape(), tile.as_bytes()).unwrap();
    }
    assert_eq!(bits(&case.attend()), before, "{plan:?}");
}
