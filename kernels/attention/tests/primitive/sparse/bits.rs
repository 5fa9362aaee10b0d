//! What may not change a single bit.

use std::ops::Range;
use std::sync::Arc;

use longshore_attention::{
    CpuExecutor, Executor, HeadShape, KvDtype, PagedKv, Partials, Queries, SparseItem, SparseWork, Tile,
    TileShape, Visit, WorkList,
};
use longshore_compute::{ComputePool, InstructionSet, PoolOptions};
use rand::{RngExt, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::case::SparseCase;
use crate::case::{Plan, bits, generator};

/// A random plan that has several query tiles and stripes.
fn plan(rng: &mut ChaCha8Rng) -> Plan {
    Plan {
        heads: HeadShape {
            kv_heads: rng.random_range(1..4),
            group: rng.random_range(1..9),
            head_dim: [7, 64, 80][rng.random_range(0..3)],
        },
        block_tokens: [16, 64][rng.random_range(0..2)],
        dtype: KvDtype::ALL[rng.random_range(0..4)],
        prefix: rng.random_range(0..400),
        rows: rng.random_range(2..120),
        size: [0.1, 1.0, 30.0][rng.random_range(0..3)],
    }
}

/// Executors on every instruction set, and on 1 to 3 threads.
fn executors() -> Vec<CpuExecutor> {
    let sets = InstructionSet::available().into_iter();
    let serial = sets.map(|set| CpuExecutor::serial().with_instruction_set(set));
    let pools = (1..4).map(|threads| CpuExecutor::new(pool(threads)));
    serial.chain(pools).collect()
}

fn pool(threads: usize) -> Arc<ComputePool> {
    ComputePool::new(&PoolOptions { threads, pin: Vec::new() }).unwrap()
}

/// Runs of rows that make up all of them.
fn cuts(rows: usize, rng: &mut ChaCha8Rng) -> Vec<Range<usize>> {
    let mut cuts = vec![0, rows];
    cuts.extend((0..rng.random_range(0..4)).map(|_| rng.random_range(0..=rows)));
    cuts.sort_unstable();
    cuts.dedup();
    cuts.windows(2).map(|ends| ends[0]..ends[1]).collect()
}

/// The result put together from items of these rows, run in random order in one call.
fn in_items(
    case: &SparseCase,
    cuts: &[Range<usize>],
    executor: &CpuExecutor,
    rng: &mut ChaCha8Rng,
) -> Vec<u32> {
    let works: Vec<SparseWork> = cuts.iter().map(|rows| case.work(rows.clone(), <[Visit]>::to_vec)).collect();
    let mut order: Vec<usize> = (0..cuts.len()).collect();
    order.shuffle(rng);
    let items: Vec<SparseItem<'_>> =
        order.iter().map(|&at| case.item(&works[at], cuts[at].clone())).collect();
    let found = executor.attend_sparse(&items).unwrap();
    let mut parts: Vec<_> = order.iter().zip(&found).collect();
    parts.sort_by_key(|(at, _)| **at);
    parts.into_iter().flat_map(|(_, partials)| bits(partials)).collect()
}

/// Lists that visit every block give the bits of today's path: a partial a stripe, merged in order.
#[test]
fn full_lists_are_stripes_merged() {
    let mut rng = generator(111);
    let executors = executors();
    for round in 0..24 {
        let plan = Plan { dtype: KvDtype::ALL[round % 4], ..plan(&mut rng) };
        let stripe_blocks = rng.random_range(1..9);
        let case = SparseCase::full(plan, stripe_blocks, &mut rng);
        let dense = &case.case;
        let heads = plan.heads;
        let mut expected = Partials::identity(plan.rows, heads.query_heads(), heads.head_dim);
        for stripe in dense.work.exact.chunks(stripe_blocks) {
            let list = WorkList { exact: stripe.to_vec(), ..WorkList::default() };
            expected.merge(&crate::case::attend(dense.item(&list, 0, plan.rows, None))).unwrap();
        }
        let expected = bits(&expected);
        for executor in &executors {
            let what = format!("{plan:?}, stripes of {stripe_blocks}, {executor:?}");
            assert_eq!(bits(&case.attend_with(executor)), expected, "{what}");
            let cuts = cuts(plan.rows, &mut rng);
            assert_eq!(in_items(&case, &cuts, executor, &mut rng), expected, "{what}, rows {cuts:?}");
        }
    }
}

#[test]
fn random_lists_do_not_depend_on_where_they_run() {
    let mut rng = generator(112);
    let executors = executors();
    for round in 0..32 {
        let plan = Plan { dtype: KvDtype::ALL[round % 4], ..plan(&mut rng) };
        let stripe_blocks = [2, 8, 16, 32][rng.random_range(0..4)];
        let mut case = SparseCase::random(plan, stripe_blocks, &mut rng);
        case.skip_below = [None, Some(3.0)][rng.random_range(0..2)];
        let expected = bits(&case.attend());
        for executor in &executors {
            let what = format!("{plan:?}, stripes of {stripe_blocks}, {executor:?}");
            assert_eq!(bits(&case.attend_with(executor)), expected, "{what}");
            let cuts = cuts(plan.rows, &mut rng);
            assert_eq!(in_items(&case, &cuts, executor, &mut rng), expected, "{what}, rows {cuts:?}");
        }
    }
}

/// Long lists are cut into tasks of several regions.
#[test]
fn long_lists_do_not_depend_on_threads() {
    let mut rng = generator(113);
    let heads = HeadShape { kv_heads: 2, group: 8, head_dim: 256 };
    let plan = Plan { heads, block_tokens: 64, dtype: KvDtype::Int8, prefix: 5000, rows: 33, size: 1.0 };
    let case = SparseCase::random(plan, 8, &mut rng);
    let expected = bits(&case.attend());
    for threads in [2, 3] {
        let executor = CpuExecutor::new(pool(threads));
        for _ in 0..3 {
            assert_eq!(bits(&case.attend_with(&executor)), expected, "{threads} threads");
        }
    }
    // A stripe that ends at once is what came earlier; only a list's first task takes it in.
    let (work, earlier) = (case.whole(), case.attend());
    let ended = case.work(0..33, |visits| [&[Visit::EndOfStripe], visits].concat());
    let executor = CpuExecutor::new(pool(2));
    let items = [
        SparseItem { earlier: Some(&earlier), ..case.item(&work, 0..33) },
        SparseItem { stripe: Some(&earlier), ..case.item(&ended, 0..33) },
    ];
    let [first, second] = &executor.attend_sparse(&items).unwrap()[..] else { panic!("two results") };
    assert_eq!(bits(first), bits(second));
}

/// The stripes before a cut as `earlier`, and the visits of the stripe that it cuts as `stripe`.
#[test]
fn a_list_continues_bit_for_bit() {
    let mut rng = generator(114);
    for _ in 0..24 {
        let plan = plan(&mut rng);
        let rows = plan.rows;
        let mut case = SparseCase::random(plan, 4, &mut rng);
        case.skip_below = [None, Some(3.0)][rng.random_range(0..2)];
        let expected = bits(&case.attend());
        let share: f64 = rng.random();
        let cut = |visits: &[Visit]| (visits.len() as f64 * share) as usize;
        let begins = |visits: &[Visit]| {
            let end = cut(visits);
            visits[..end].iter().rposition(|visit| *visit == Visit::EndOfStripe).map_or(0, |at| at + 1)
        };
        let earlier = case.work(0..rows, |visits| visits[..begins(visits)].to_vec());
        let stripe = case.work(0..rows, |visits| visits[begins(visits)..cut(visits)].to_vec());
        let rest = case.work(0..rows, |visits| visits[cut(visits)..].to_vec());
        let attend = |item: SparseItem<'_>| CpuExecutor::serial().attend_sparse(&[item]).unwrap().remove(0);
        let earlier = attend(case.item(&earlier, 0..rows));
        let stripe = attend(case.item(&stripe, 0..rows));
        let item = case.item(&rest, 0..rows);
        let found = attend(SparseItem { earlier: Some(&earlier), stripe: Some(&stripe), ..item });
        assert_eq!(bits(&found), expected, "{plan:?}, cut at {share}");

        // Rows without lists have their stripe folded all the same.
        let none = SparseWork::new(plan.heads.kv_heads, Vec::new(), Vec::new()).unwrap();
        let item = SparseItem { work: &none, earlier: Some(&earlier), stripe: Some(&stripe), ..item };
        let mut both = earlier.clone();
        both.merge(&stripe).unwrap();
        assert_eq!(bits(&attend(item)), bits(&both), "{plan:?}");
        assert_eq!(bits(&attend(SparseItem { stripe: None, ..item })), bits(&earlier), "{plan:?}");
    }
}

/// Rows of equal queries at one position are equal, whoever their neighbours are.
#[test]
fn equal_rows_are_equal() {
    let mut rng = generator(115);
    for group in [2, 3, 7] {
        let heads = HeadShape { kv_heads: 2, group, head_dim: 64 };
        let plan = Plan { heads, block_tokens: 16, dtype: KvDtype::Bf16, prefix: 150, rows: 40, size: 3.0 };
        let mut case = SparseCase::random(plan, 4, &mut rng);
        case.skip_below = Some(2.0);
        for row in case.case.q.chunks_exact_mut(2 * group * 64) {
            for heads in row.chunks_exact_mut(group * 64) {
                let (first, others) = heads.split_at_mut(64);
                others.chunks_exact_mut(64).for_each(|other| other.copy_from_slice(first));
            }
        }
        let found = case.attend();
        for (row, head) in (0..40).flat_map(|row| (0..2 * group).map(move |head| (row, head))) {
            assert_eq!(found.row(row, head), found.row(row, head / group * group), "row {row}, head {head}");
        }
    }
}

/// One KV head of the tiles.
struct OneHead<'a>(&'a dyn PagedKv, usize);

impl PagedKv for OneHead<'_> {
    fn shape(&self) -> TileShape {
        TileShape { kv_heads: 1, ..self.0.shape() }
    }
    fn len(&self) -> usize {
        self.0.len()
    }
    fn tile(&self, index: usize) -> &Tile {
        self.0.tile(index)
    }
    fn only_head(&self) -> Option<usize> {
        Some(self.1)
    }
}

/// A KV head by itself gives the rows that it gives beside others.
#[test]
fn one_head_of_the_tiles_is_that_head() {
    let mut rng = generator(116);
    for round in 0..8 {
        let heads = HeadShape { kv_heads: 3, group: 2, head_dim: 20 };
        let dtype = KvDtype::ALL[round % 4];
        let plan = Plan { heads, block_tokens: 16, dtype, prefix: 150, rows: 40, size: 2.0 };
        let mut case = SparseCase::random(plan, 4, &mut rng);
        case.skip_below = [None, Some(2.0)][round % 2];
        let without_means = |visits: &[Visit]| -> Vec<Visit> {
            visits.iter().copied().filter(|visit| !matches!(visit, Visit::Means { .. })).collect()
        };
        let work = case.work(0..40, without_means);
        let whole = CpuExecutor::serial().attend_sparse(&[case.item(&work, 0..40)]).unwrap().remove(0);
        for head in 0..3 {
            let own = case.case.q.chunks_exact(6 * 20).flat_map(|row| &row[head * 40..][..40]);
            let data: Vec<f32> = own.copied().collect();
            let kv = OneHead(&case.case.kv, head);
            let item = case.item(&work, 0..40);
            let queries = Queries { shape: HeadShape { kv_heads: 1, ..heads }, data: &data, ..item.queries };
            let lists =
                (0..work.tiles()).map(|tile| (work.list(head, tile).to_vec(), work.columns().to_vec()));
            let ends = (0..work.tiles()).map(|tile| work.rows(tile).end as u32).collect();
            let alone = SparseWork::new(1, ends, lists.collect()).unwrap();
            let item = SparseItem { queries, kv: &kv, work: &alone, ..item };
            let found = CpuExecutor::serial().attend_sparse(&[item]).unwrap().remove(0);
            for (row, member) in (0..40).flat_map(|row| [(row, 0), (row, 1)]) {
                assert_eq!(
                    found.row(row, member),
                    whole.row(row, 2 * head + member),
                    "{dtype:?}, KV head {head}"
                );
            }
        }
        let kv = OneHead(&case.case.kv, 3);
        let item = case.item(&work, 0..40);
        let queries = Queries { shape: HeadShape { kv_heads: 1, ..heads }, data: &[], ..item.queries };
        let list = vec![(vec![Visit::Block(case.case.work.exact[0])], Vec::new())];
        let one = SparseWork::new(1, vec![1], list).unwrap();
        let data = [0.0; 40];
        let item = SparseItem { queries: Queries { data: &data, ..queries }, kv: &kv, work: &one, ..item };
        assert!(CpuExecutor::serial().attend_sparse(&[item]).is_err(), "there is no KV head 3");
    }
}
