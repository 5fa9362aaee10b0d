//! A device without memory or with few pages: the same answers, later.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use longshore_attention::{
    AttendItem, Column, CpuExecutor, ExactBlock, Executor, KvDtype, Partials, SparseItem, SparseWork,
    Summaries, Visit, WorkList,
};
use longshore_cuda::{CudaExecutor, Kind, Shortage};

use crate::counted::Watched;
use crate::counts::{HEADS, Sequence, TOKENS, executor_of, sequence_of};

const BLOCKS: usize = 12;
const STRIPE: u32 = 6;

/// A sequence, with lists of blocks, columns and means over it.
struct Prefill {
    sequence: Sequence,
    summaries: Summaries,
    sparse: SparseWork,
    /// All blocks, and single keys of others.
    flat: WorkList,
    earlier: Partials,
}

fn column(tile: u32, offset: u32) -> Column {
    Column { tile, offset, position: u64::from(tile) * TOKENS as u64 + u64::from(offset) }
}

fn prefill(dtype: KvDtype) -> Prefill {
    let sequence = sequence_of(dtype, BLOCKS, 40);
    let mut summaries = Summaries::new(sequence.tiles.shape, STRIPE, 0).unwrap();
    for (block, tile) in sequence.tiles.tiles.iter().enumerate() {
        summaries.push(block as u64, tile).unwrap();
    }
    let list = |odd: usize| {
        let block = |index: usize| Visit::Block(Sequence::block(index + odd));
        let visits = vec![
            block(0),
            block(2),
            Visit::Columns { first: 0, count: 3 },
            Visit::Means { tile: 0, first: 0, keys: 0b11_0000 },
            Visit::EndOfStripe,
            block(6),
            block(10),
            Visit::Columns { first: 3, count: 2 },
            Visit::Means { tile: 1, first: 0, keys: 0b1_1000 },
            Visit::EndOfStripe,
        ];
        let columns = vec![column(4, 3), column(5, 1), column(5, 2), column(8, 9), column(9, 0)];
        (visits, columns)
    };
    let sparse =
        SparseWork::new(HEADS.kv_heads, vec![32, 40], (0..4).map(|l| list(l % 2)).collect()).unwrap();
    let flat = WorkList {
        exact: (0..BLOCKS).step_by(2).map(Sequence::block).collect::<Vec<ExactBlock>>(),
        columns: (0..BLOCKS as u32).skip(1).step_by(2).map(|tile| column(tile, 5)).collect(),
        column_bias: (0..BLOCKS / 2).map(|index| index as f32 / 8.0).collect(),
        ..WorkList::default()
    };
    let records = [0.5, 2.0].into_iter().chain((0..HEADS.head_dim).map(|i| i as f32 / 64.0));
    let records: Vec<f32> = (0..40 * HEADS.query_heads()).flat_map(|_| records.clone()).collect();
    let earlier = Partials::from_interleaved(40, HEADS.query_heads(), HEADS.head_dim, &records).unwrap();
    Prefill { sequence, summaries, sparse, flat, earlier }
}

impl Prefill {
    fn sparse_item(&self) -> SparseItem<'_> {
        SparseItem {
            queries: self.sequence.queries(),
            kv: &self.sequence.tiles,
            summaries: &self.summaries,
            work: &self.sparse,
            earlier: Some(&self.earlier),
            stripe: None,
            skip_below: None,
        }
    }

    /// Lists of everything, single columns, and a decode step of one row after them.
    fn ask(&self, executor: &dyn Executor) -> Vec<Partials> {
        let row = HEADS.query_heads() * HEADS.head_dim;
        let all = WorkList { exact: (0..BLOCKS).map(Sequence::block).collect(), ..WorkList::default() };
        let mut one = self.sequence.queries();
        one.data = &one.data[..row];
        let initial = Partials::identity(1, HEADS.query_heads(), HEADS.head_dim);
        let (queries, kv) = (self.sequence.queries(), &self.sequence.tiles);
        let flat = AttendItem { queries, kv, work: &self.flat, initial: Some(&self.earlier) };
        let step = AttendItem { queries: one, kv, work: &all, initial: Some(&initial) };
        let mut found = executor.attend_sparse(&[self.sparse_item()]).unwrap();
        found.extend(executor.attend(&[flat, step]).unwrap());
        found
    }
}

#[track_caller]
fn assert_near(found: &[Partials], wanted: &[Partials], what: &str) {
    assert_eq!(found.len(), wanted.len());
    for (found, wanted) in found.iter().zip(wanted) {
        let (found, wanted) = (found.clone().finish(), wanted.clone().finish());
        let near = |(f, w): (&f32, &f32)| (f - w).abs() <= 2e-3 * (1.0 + w.abs());
        assert!(found.iter().zip(&wanted).all(near), "{what}");
    }
}

fn fallbacks(executor: &CudaExecutor) -> [u64; 2] {
    Shortage::ALL.map(|shortage| executor.stats().fallbacks.of(shortage))
}

/// Every allocation of the calls is the one that is refused, in turn.
#[test]
fn whatever_memory_is_refused_the_answer_is_the_same() {
    let prefill = prefill(KvDtype::F16);
    let wanted = prefill.ask(&CpuExecutor::serial());
    let (mut fallen, mut made_room, mut number) = (0, 0, 0);
    loop {
        let (watched, executor) = executor_of(KvDtype::F16, 20);
        let told = Arc::new(Mutex::new(Vec::new()));
        let listener = Arc::clone(&told);
        let executor = executor.on_shortage(move |shortage, error| {
            assert_eq!(error.kind(), Kind::Exhausted);
            listener.lock().unwrap().push(shortage);
        });
        watched.refuse_allocation(number);
        let found = prefill.ask(&executor);
        let reached = watched.has_refused();
        watched.refuse_allocation(usize::MAX);
        assert_near(&found, &wanted, &format!("without allocation {number}"));
        let [memory, pages] = fallbacks(&executor);
        assert!(memory <= 1 && pages == 0, "allocation {number}: {memory}, {pages}");
        assert_eq!(*told.lock().unwrap(), vec![Shortage::Memory; memory as usize]);
        if memory == 1 {
            // What the CPU does has its bits.
            assert!(found[0] == wanted[0] || found[1..] == wanted[1..], "allocation {number}");
        }
        fallen += memory;
        made_room += u64::from(executor.stats().pages.returned > 0);
        // The shortage is over.
        assert_near(&prefill.ask(&executor), &wanted, &format!("after allocation {number}"));
        assert_eq!(fallbacks(&executor), [memory, 0]);
        drop(executor);
        assert_eq!(watched.used.load(Ordering::Relaxed), 0, "allocation {number} leaks");
        if !reached {
            break;
        }
        number += 1;
    }
    // As long as there is nothing to give back, the CPU answers. Then what tiles arrived in is enough for what is refused once, and pages stay.
    assert!(number > 30, "{number}");
    assert_eq!((fallen, made_room), (3, 0), "of {number}");
}

#[test]
fn pages_make_room_for_what_else_a_call_needs() {
    // Room for 48 pages, of which the cache takes a slab of 32.
    let page = sequence_of(KvDtype::F16, 1, 1).tiles.shape.bytes();
    let executor = CudaExecutor::new(Watched::with_room(48 * page), CpuExecutor::serial(), 1 << 30);
    let all =
        |blocks: usize| WorkList { exact: (0..blocks).map(Sequence::block).collect(), ..WorkList::default() };
    let check = |blocks: usize, rows: usize| {
        let (sequence, work) = (sequence_of(KvDtype::F16, blocks, rows), all(blocks));
        let items =
            [AttendItem { queries: sequence.queries(), kv: &sequence.tiles, work: &work, initial: None }];
        let wanted = CpuExecutor::serial().attend(&items).unwrap();
        assert_near(&executor.attend(&items).unwrap(), &wanted, &format!("{blocks} blocks, {rows} rows"));
        executor.stats()
    };
    let few = check(30, 1);
    assert_eq!((few.pages.pages, few.pages.returned), (30, 0));
    // Queries and results take more than the slab leaves.
    let many = check(8, 100);
    assert!(many.pages.returned > 0 && many.pages.pages >= 8, "{many:?}");
    assert_eq!(fallbacks(&executor), [0, 0]);
    // More than there is, with all pages: the CPU's, and the pages stay.
    let more = check(8, 1_000);
    assert_eq!((more.pages.pages, more.pages.returned), (many.pages.pages, many.pages.returned));
    assert_eq!(fallbacks(&executor), [1, 0]);
    check(30, 1);
    assert_eq!(fallbacks(&executor), [1, 0]);
}

#[test]
fn a_device_without_any_memory_leaves_everything_to_the_cpu() {
    let prefill = prefill(KvDtype::F16);
    let executor = CudaExecutor::new(Watched::with_room(1 << 10), CpuExecutor::serial(), 1 << 30);
    assert_eq!(prefill.ask(&executor), prefill.ask(&CpuExecutor::serial()));
    assert_eq!(fallbacks(&executor), [2, 0]);
}

#[test]
fn calls_that_visit_more_tiles_than_there_are_pages_go_in_turns() {
    for dtype in [KvDtype::F16, KvDtype::F32, KvDtype::Int8] {
        let prefill = prefill(dtype);
        let wanted = prefill.ask(&CpuExecutor::serial());
        let mut launches = Vec::new();
        // A sixth as many are for means; f32 means share pages with f32 tiles.
        for pages in [6, 7, 11, 100] {
            let (watched, executor) = executor_of(dtype, pages * if dtype == KvDtype::Int8 { 3 } else { 1 });
            assert_near(&prefill.ask(&executor), &wanted, &format!("{dtype:?}, {pages} pages"));
            assert_eq!(fallbacks(&executor), [0, 0], "{dtype:?}, {pages} pages");
            assert_eq!(watched.counted().waits(), 2, "{dtype:?}, {pages} pages");
            launches.push(watched.counted().launches);
        }
        assert!(launches.is_sorted_by(|few, more| few >= more) && launches[0] > launches[3], "{launches:?}");
    }
}

#[test]
fn a_budget_without_pages_leaves_everything_to_the_cpu() {
    let prefill = prefill(KvDtype::F16);
    let wanted = prefill.ask(&CpuExecutor::serial());
    let (watched, executor) = executor_of(KvDtype::F16, 0);
    assert_eq!(prefill.ask(&executor), wanted);
    assert_eq!(fallbacks(&executor), [0, 2]);
    assert_eq!((watched.counted().launches, watched.used.load(Ordering::Relaxed)), (0, 0));
    // Pages for tiles, and none for means.
    let (_, executor) = executor_of(KvDtype::F16, 3);
    let found = prefill.ask(&executor);
    assert_eq!(fallbacks(&executor), [0, 1]);
    assert_eq!(found[0], wanted[0]);
    assert_near(&found, &wanted, "three pages");
}
