//! What a call asks of the device: launches, and one wait.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use longshore_attention::{
    AttendItem, CpuExecutor, ExactBlock, Executor as _, HeadShape, KvDtype, Partials, Queries, SparseItem,
    SparseWork, Tile, TileShape, Tiles, Visit, WorkList,
};
use longshore_cuda::{CudaExecutor, Device};

use crate::counted::{Counts, Moment, Watched};

pub(crate) const HEADS: HeadShape = HeadShape { kv_heads: 2, group: 2, head_dim: 64 };
pub(crate) const TOKENS: usize = 16;
const SHAPE: TileShape = shape_of(KvDtype::F16);

const fn shape_of(dtype: KvDtype) -> TileShape {
    TileShape { block_tokens: TOKENS, kv_heads: HEADS.kv_heads, head_dim: HEADS.head_dim, dtype }
}

/// A sequence whose keys all lie before its rows.
pub(crate) struct Sequence {
    pub(crate) tiles: Tiles,
    rows: Vec<f32>,
}

fn sequence(blocks: usize, rows: usize) -> Sequence {
    sequence_of(KvDtype::F16, blocks, rows)
}

pub(crate) fn sequence_of(dtype: KvDtype, blocks: usize, rows: usize) -> Sequence {
    let shape = shape_of(dtype);
    let elements = TOKENS * HEADS.kv_heads * HEADS.head_dim;
    let number = |index: usize| ((index * 37 + blocks) % 101) as f32 / 64.0 - 0.75;
    let tile = |block: usize| {
        let mut tile = Tile::zeroed(shape);
        let values: Vec<f32> = (0..elements).map(|index| number(index + block * 7)).collect();
        tile.write(0, &values, &values).unwrap();
        tile
    };
    let tiles = Tiles { shape, tiles: (0..blocks).map(tile).collect() };
    let rows = (0..rows * HEADS.query_heads() * HEADS.head_dim).map(number).collect();
    Sequence { tiles, rows }
}

impl Sequence {
    pub(crate) fn queries(&self) -> Queries<'_> {
        let first_position = (self.tiles.tiles.len() * TOKENS) as u64;
        Queries { shape: HEADS, first_position, scale: 0.125, data: &self.rows }
    }

    pub(crate) fn block(index: usize) -> ExactBlock {
        ExactBlock { tile: index as u32, first_position: (index * TOKENS) as u64, len: TOKENS as u32 }
    }

    /// A list for each stripe of so many blocks.
    fn stripes(&self, blocks: usize) -> Vec<WorkList> {
        let all: Vec<ExactBlock> = (0..self.tiles.tiles.len()).map(Self::block).collect();
        all.chunks(blocks).map(|exact| WorkList { exact: exact.to_vec(), ..WorkList::default() }).collect()
    }

    fn items<'a>(&'a self, work: &'a [WorkList]) -> Vec<AttendItem<'a>> {
        let item = |work| AttendItem { queries: self.queries(), kv: &self.tiles, work, initial: None };
        work.iter().map(item).collect()
    }
}

/// An executor with room for so many pages of tiles, and its device.
fn executor(pages: usize) -> (Arc<Watched>, CudaExecutor) {
    executor_of(KvDtype::F16, pages)
}

pub(crate) fn executor_of(dtype: KvDtype, pages: usize) -> (Arc<Watched>, CudaExecutor) {
    let watched = Watched::with_room(usize::MAX);
    let device: Arc<dyn Device> = watched.clone();
    // Six eighths of the budget are for tiles; four for those of int8 as they are.
    let eighths = if dtype == KvDtype::Int8 { 4 } else { 6 };
    let budget = (pages * shape_of(dtype).bytes()).div_ceil(eighths) * 8;
    (watched, CudaExecutor::new(device, CpuExecutor::serial(), budget))
}

fn attend(watched: &Watched, executor: &CudaExecutor, items: &[AttendItem<'_>]) -> (Counts, Vec<Partials>) {
    let before = watched.counted();
    let partials = executor.attend(items).unwrap();
    (watched.counted() - before, partials)
}

#[test]
fn stripes_of_a_prefill_are_queued_together_and_read_once() {
    let sequence = sequence(20, 40);
    let work = sequence.stripes(4);
    let items = sequence.items(&work);
    let (watched, executor) = executor(20);
    let (first, partials) = attend(&watched, &executor, &items);
    // The tiles of each stripe become pages by one launch.
    assert_eq!((first.launches, first.waits(), first.downloads), (5 + 5, 1, 1), "{first:?}");
    // The rows, and of each stripe the table of new pages, its pages, visits, columns, their bias and the items of the launch.
    assert_eq!((first.uploads, first.uploads_apart), (1 + 5 * 6, 20), "{first:?}");
    let (again, same) = attend(&watched, &executor, &items);
    assert_eq!((again.launches, again.waits(), again.uploads), (5, 1, 1 + 5 * 5), "{again:?}");
    assert_eq!(again.uploads_apart, 0, "{again:?}");
    assert_eq!(partials, same);
    // In waves of one result each: the same, read one by one.
    let by_one = executor.with_wave_bytes(1);
    let (waves, same) = attend(&watched, &by_one, &items);
    assert_eq!((waves.launches, waves.downloads), (5, 5), "{waves:?}");
    assert_eq!(partials, same);
}

#[test]
fn tiles_arrive_while_earlier_launches_run() {
    let sequence = sequence(24, 40);
    let work = sequence.stripes(4);
    let (watched, executor) = executor(24);
    executor.attend(&sequence.items(&work)).unwrap();
    // Four tiles a stripe. The first three stripes take new memory, which waits for what is queued.
    let leads = watched.inner.leads();
    assert_eq!((leads.len(), watched.counted().arrivals_wait), (24, 6), "{leads:?}");
    // From then on tiles wait for what made pages of those that were there before, three stripes ago: not for the attention over these,
    // nor for anything of the two stripes since. A stripe is seven copies of tables and two launches.
    assert!(leads[12..].iter().all(|&lead| lead >= 2 * 7), "{leads:?}");
}

#[test]
fn a_decode_step_is_two_launches_and_one_wait_however_many_items_and_pages() {
    let sequences = [sequence(18, 1), sequence(40, 2), sequence(3, 1)];
    let works: Vec<Vec<WorkList>> = sequences.iter().map(|one| one.stripes(8)).collect();
    let items: Vec<AttendItem<'_>> =
        sequences.iter().zip(&works).flat_map(|(one, work)| one.items(work)).collect();
    let (watched, roomy) = executor(61);
    let (first, partials) = attend(&watched, &roomy, &items);
    // No stripe is longer than a split: nothing is to be merged.
    assert_eq!((first.launches, first.waits(), first.downloads), (items.len() + 1, 1, 1), "{first:?}");
    let before = roomy.stats().uploaded_bytes;
    let (again, same) = attend(&watched, &roomy, &items);
    assert_eq!((again.launches, again.waits(), again.uploads), (1, 1, 3), "{again:?}");
    // The rows of each sequence once, whatever the number of its stripes; addresses of pages; 48 bytes for each item.
    let rows = 4 * HEADS.query_heads() * HEADS.head_dim * size_of::<f32>();
    let uploaded = rows + 61 * size_of::<u64>() + items.len() * 48;
    assert_eq!(roomy.stats().uploaded_bytes - before, uploaded as u64, "{} items", items.len());
    assert_eq!(partials, same);

    // Longer than a split, and folded onto what was there before.
    let long = [WorkList { exact: (0..40).map(Sequence::block).collect(), ..WorkList::default() }];
    let initial = Partials::identity(2, HEADS.query_heads(), HEADS.head_dim);
    let item = AttendItem { initial: Some(&initial), ..sequences[1].items(&long)[0] };
    let (merged, _) = attend(&watched, &roomy, &[item]);
    assert_eq!((merged.launches, merged.waits()), (2, 1), "{merged:?}");

    // Pages for three tiles at a time: more launches, and still one wait.
    let (watched, tight) = executor(3);
    let (turns, found) = attend(&watched, &tight, &[item]);
    assert_eq!((turns.waits(), turns.downloads), (1, 1), "{turns:?}");
    assert!(turns.launches <= 3 * 14, "{turns:?}");
    assert_eq!(turns.uploads_apart, 40, "{turns:?}");
    let wanted = CpuExecutor::serial().attend(&[item]).unwrap();
    let (found, wanted) = (found[0].clone().finish(), wanted[0].clone().finish());
    assert!(found.iter().zip(&wanted).all(|(f, w)| (f - w).abs() <= 2e-3 * (1.0 + w.abs())));
}

#[test]
fn lists_are_queued_together_and_rows_that_they_leave_out_are_answered() {
    let sequence = sequence(6, 40);
    let visits = (0..6).step_by(2).map(|index| Visit::Block(Sequence::block(index))).collect::<Vec<_>>();
    let lists = vec![(visits.clone(), Vec::new()), (visits, Vec::new())];
    // Rows 32 to 39 have no list.
    let work = SparseWork::new(HEADS.kv_heads, vec![32], lists).unwrap();
    let nothing = SparseWork::new(HEADS.kv_heads, vec![32], vec![(Vec::new(), Vec::new()); 2]).unwrap();
    let item = |work| SparseItem {
        queries: sequence.queries(),
        kv: &sequence.tiles,
        summaries: &sequence.tiles,
        work,
        earlier: None,
        stripe: None,
        skip_below: None,
    };
    let (items, (watched, executor)) = ([item(&work), item(&nothing), item(&work)], executor(6));
    let found = executor.attend_sparse(&items).unwrap();
    let counts = watched.counted();
    assert_eq!((counts.launches, counts.uploads_apart, counts.waits()), (1 + 2, 3, 1), "{counts:?}");
    let wanted = CpuExecutor::serial().attend_sparse(&items).unwrap();
    assert_eq!(found[1], wanted[1], "nothing is visited: the identity");
    for (found, wanted) in found.iter().zip(&wanted) {
        let (found, wanted) = (found.clone().finish(), wanted.clone().finish());
        assert!(found.iter().zip(&wanted).all(|(f, w)| (f - w).abs() <= 2e-3 * (1.0 + w.abs())));
    }
}

#[test]
fn what_needs_no_device_asks_nothing_of_it() {
    let (watched, executor) = executor(4);
    let (sequence, none) = (sequence(4, 2), WorkList::default());
    let empty = Sequence { rows: Vec::new(), tiles: Tiles { shape: SHAPE, tiles: Vec::new() } };
    let items =
        [sequence.items(std::slice::from_ref(&none)), empty.items(std::slice::from_ref(&none))].concat();
    let (counts, partials) = attend(&watched, &executor, &items);
    assert_eq!((counts, partials), (Counts::default(), CpuExecutor::serial().attend(&items).unwrap()));
}

/// Holds up a call at `moment`, and does another one meanwhile.
fn others_go_on(moment: Moment, held: (usize, usize), other: (usize, usize)) {
    let (watched, executor) = executor(40);
    let (held, other) = (sequence(held.0, held.1), sequence(other.0, other.1));
    let (held_work, other_work) = (held.stripes(4), other.stripes(4));
    let (held_items, other_items) = (held.items(&held_work), other.items(&other_work));
    // The other's pages are there.
    let wanted = executor.attend(&other_items).unwrap();
    let (at_moment, is_held) = sync_channel(1);
    let (done, other_is_done) = sync_channel(1);
    watched.before(moment, move || {
        at_moment.send(()).unwrap();
        other_is_done.recv_timeout(Duration::from_secs(120)).expect("nobody goes on while a call is held up");
    });
    std::thread::scope(|scope| {
        let first = scope.spawn(|| executor.attend(&held_items).unwrap());
        is_held.recv_timeout(Duration::from_secs(120)).unwrap();
        let found = executor.attend(&other_items).unwrap();
        // Figures are told meanwhile too.
        assert!(executor.stats().pages.hits > 0);
        done.send(()).unwrap();
        assert_eq!(found, wanted);
        assert_eq!(first.join().unwrap(), executor.attend(&held_items).unwrap());
    });
}

#[test]
fn others_go_on_while_a_call_waits() {
    others_go_on(Moment::Download, (8, 40), (6, 40));
}

#[test]
fn others_go_on_while_tiles_wait_for_room_on_their_way() {
    others_go_on(Moment::UploadApart, (8, 40), (6, 40));
    others_go_on(Moment::UploadApart, (8, 1), (6, 1));
}

#[test]
fn others_go_on_while_a_kernel_is_compiled() {
    others_go_on(Moment::Launch("attend_decode"), (8, 1), (6, 40));
    others_go_on(Moment::Launch("attend_prefill"), (8, 40), (6, 1));
    others_go_on(Moment::Launch("panels_to_rows"), (8, 40), (6, 40));
}

#[test]
fn lists_go_by_warp_groups_where_that_is_asked_for() {
    let sequence = sequence(8, 40);
    let work = sequence.stripes(8);
    let items = sequence.items(&work);
    let expected = CpuExecutor::serial().attend(&items).unwrap().remove(0).finish();
    for wgmma in [false, true] {
        let (watched, executor) = executor(8);
        let executor = executor.with_wgmma(wgmma);
        let (told, launched) = sync_channel(1);
        watched.before(Moment::Launch("attend_prefill_wgmma"), move || told.send(()).unwrap());
        let (_, mut partials) = attend(&watched, &executor, &items);
        assert_eq!(launched.try_recv().is_ok(), wgmma);
        let found = partials.remove(0).finish();
        assert!(found.iter().zip(&expected).all(|(found, expected)| (found - expected).abs() < 2e-3));
    }
}

#[test]
fn warp_groups_take_no_lists_of_which_one_of_them_would_have_no_row() {
    for (rows, entry) in [(32, "attend_prefill"), (33, "attend_prefill_wgmma")] {
        let sequence = sequence(8, rows);
        let work = sequence.stripes(8);
        let (watched, executor) = executor(8);
        let executor = executor.with_wgmma(true);
        attend(&watched, &executor, &sequence.items(&work));
        let launched = watched.take_launched();
        let attends: Vec<_> = launched.into_iter().filter(|entry| entry.starts_with("attend_")).collect();
        assert_eq!(attends, [entry], "{} packed rows", rows * HEADS.group);
    }
}
