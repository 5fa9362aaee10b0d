//! Pages that exist before their tiles: nobody waits, nobody brings a tile under a version that it does not have, and where there is no page all
//! is as it was.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use longshore_attention::{
    AttendItem, CpuExecutor, ExactBlock, Executor as _, Kind, KvDtype, PlanInput, PrefillPolicy, Promise,
    PromisedMeans, Queries, Summaries, Tile, TileShape, Tiles, WorkList, attend_by_lists,
};
use longshore_model::{
    Activations, Backend as _, KeptAppend, KeptAttention as _, KeptMeans, KeptPart, KeptVisits, Promised,
};

use crate::counted::Counts;
use crate::kept::{Gpu, SCALE, assert_near, gpu};
use crate::plan::HEADS;

const TOKENS: usize = 16;
/// Tokens that are there already, and new ones; both end within a block.
const BEFORE: usize = 37;
const ROWS: usize = 70;

/// A sequence whose last rows are on the device.
struct Growing {
    tiles: Tiles,
    q: Activations,
    k: Activations,
    v: Activations,
    promised: Vec<Promise>,
}

impl Growing {
    fn new(gpu: &Gpu, dtype: KvDtype) -> Self {
        let shape =
            TileShape { block_tokens: TOKENS, kv_heads: HEADS.kv_heads, head_dim: HEADS.head_dim, dtype };
        let width = HEADS.kv_heads * HEADS.head_dim;
        let blocks = (BEFORE + ROWS).div_ceil(TOKENS);
        let mut tiles: Vec<Tile> = (0..blocks).map(|_| Tile::zeroed(shape)).collect();
        for token in 0..BEFORE {
            let row: Vec<f32> = (0..width).map(|i| ((token * 31 + i * 7) % 64) as f32 / 32.0 - 1.0).collect();
            tiles[token / TOKENS].write(token % TOKENS, &row, &row).unwrap();
        }
        let tokens: Vec<u32> = (0..ROWS as u32).map(|row| row * 7 % 200).collect();
        let positions: Vec<u64> = (0..ROWS).map(|row| (BEFORE + row) as u64).collect();
        let x = gpu.backend.embed(&tokens).unwrap();
        let kept = gpu.backend.qkv_kept(0, &x, &positions).unwrap();
        let promised = (BEFORE / TOKENS..blocks).map(|_| Tile::promise()).collect();
        Self { tiles: Tiles { shape, tiles }, q: kept.q, k: kept.k, v: kept.v, promised }
    }

    fn part(&self) -> KeptAppend<'_> {
        let tiles = self.tiles.tiles[BEFORE / TOKENS..].iter().collect();
        KeptAppend { rows: 0..ROWS, offset: BEFORE % TOKENS, tiles, promised: &self.promised }
    }

    fn append(&self, gpu: &Gpu) -> (Counts, bool) {
        let before = gpu.watched.counted();
        let made = gpu.executor.append_kept(&self.k, &self.v, &[self.part()]).unwrap();
        (gpu.watched.counted() - before, made)
    }

    fn attend(&self, gpu: &Gpu) -> (Counts, Option<Activations>) {
        let visits = KeptVisits::All { kv: &self.tiles, first_key: 0, promised: &self.promised };
        gpu.attend(&self.q, &[KeptPart { rows: 0..ROWS, first_position: BEFORE as u64, visits }])
    }

    /// Writes the tiles of the host; with `kept`, under the promised versions.
    fn write(&mut self, kept: bool) {
        let (k, v) = (self.k.to_host().unwrap(), self.v.to_host().unwrap());
        let width = self.k.width();
        let mut promised = std::mem::take(&mut self.promised).into_iter().filter(|_| kept);
        let mut done = 0;
        while done < ROWS {
            let token = BEFORE + done;
            let count = (TOKENS - token % TOKENS).min(ROWS - done);
            let (keys, values) = (&k[done * width..][..count * width], &v[done * width..][..count * width]);
            let tile = &mut self.tiles.tiles[token / TOKENS];
            match promised.next() {
                Some(promise) => tile.write_promised(promise, token % TOKENS, keys, values).unwrap(),
                None => tile.write(token % TOKENS, keys, values).unwrap(),
            }
            done += count;
        }
    }

    /// Attention over the written tiles, by way of the host; on the CPU without a device.
    fn by_host(&self, gpu: Option<&Gpu>) -> Vec<f32> {
        let data = self.q.to_host().unwrap();
        let queries = Queries { shape: HEADS, first_position: BEFORE as u64, scale: SCALE, data: &data };
        let block = |tile: usize| ExactBlock {
            tile: tile as u32,
            first_position: (tile * TOKENS) as u64,
            len: TOKENS.min(BEFORE + ROWS - tile * TOKENS) as u32,
        };
        let exact = (0..self.tiles.tiles.len()).map(block).collect();
        let work = WorkList { exact, ..WorkList::default() };
        let items = [AttendItem { queries, kv: &self.tiles, work: &work, initial: None }];
        let partials = match gpu {
            Some(gpu) => gpu.executor.attend(&items),
            None => CpuExecutor::serial().attend(&items),
        };
        partials.unwrap().remove(0).finish()
    }
}

#[test]
fn rows_become_pages_that_are_found_again_when_their_tiles_are_written() {
    for (dtype, limit) in [(KvDtype::F32, 1e-5), (KvDtype::F16, 2e-3), (KvDtype::Bf16, 8e-3)] {
        let (gpu, what) = (gpu(1 << 26), format!("{dtype:?}"));
        let mut growing = Growing::new(&gpu, dtype);
        let (counts, made) = growing.append(&gpu);
        assert!(made, "{what}");
        // The block that was begun goes up once; the others never do. One launch for it, one for the rows, a table for each.
        assert_eq!(
            (counts.waits(), counts.uploads_apart, counts.launches, counts.uploads),
            (0, 1, 2, 2),
            "{what}"
        );
        let (counts, found) = growing.attend(&gpu);
        // The blocks before.
        assert_eq!((counts.waits(), counts.uploads_apart), (0, BEFORE / TOKENS), "{what}");
        let before = gpu.watched.counted();
        growing.write(true);
        let by_host = growing.by_host(Some(&gpu));
        assert_eq!((gpu.watched.counted() - before).uploads_apart, 0, "{what}: the pages are there");
        let wanted = growing.by_host(None);
        assert_near(&found.unwrap().to_host().unwrap(), &wanted, limit, &what);
        assert_near(&by_host, &wanted, limit, &what);
        // Once more, onto pages of the device: nothing goes up but a table.
        let again = Growing { promised: (0..1).map(|_| Tile::promise()).collect(), ..growing };
        let last = again.tiles.tiles.len() - 1;
        let (k, v) = (again.k.select(&[0, 1]).unwrap(), again.v.select(&[0, 1]).unwrap());
        let (offset, tiles) = ((BEFORE + ROWS) % TOKENS, vec![&again.tiles.tiles[last]]);
        let part = KeptAppend { rows: 0..2, offset, tiles, promised: &again.promised };
        let (before, pages) = (gpu.watched.counted(), gpu.executor.stats().pages.pages);
        assert!(gpu.executor.append_kept(&k, &v, &[part]).unwrap());
        let counts = gpu.watched.counted() - before;
        assert_eq!((counts.uploads_apart, counts.launches, counts.uploads), (0, 1, 1), "{what}");
        assert_eq!(gpu.executor.stats().pages.pages, pages, "{what}: the page is taken over");
    }
}

#[test]
fn a_promised_page_that_made_way_is_brought_by_nobody() {
    // As many pages as the blocks of one sequence take.
    let blocks = (BEFORE + ROWS).div_ceil(TOKENS);
    let page = TOKENS * HEADS.kv_heads * HEADS.head_dim * 2 * 2;
    let gpu = gpu((blocks * page).div_ceil(6) * 8);
    let mut growing = Growing::new(&gpu, KvDtype::F16);
    assert!(growing.append(&gpu).1);
    // Somebody else wants all of them.
    let mut other = Growing::new(&gpu, KvDtype::F16);
    other.write(false);
    other.by_host(Some(&gpu));
    let before = gpu.executor.stats().pages;
    let (counts, found) = growing.attend(&gpu);
    assert!(found.is_none());
    assert_eq!((counts.uploads_apart, counts.launches, counts.waits()), (0, 0, 0), "{counts:?}");
    assert_eq!(gpu.executor.stats().pages, before, "nothing made way for what cannot be");
    // By way of the host, once they are written.
    growing.write(true);
    assert_near(&growing.by_host(Some(&gpu)), &growing.by_host(None), 2e-3, "written");
}

#[test]
fn what_has_no_pages_is_told_and_leaves_nothing() {
    let own = gpu(1 << 26);
    let growing = Growing::new(&own, KvDtype::Int8);
    let (counts, made) = growing.append(&own);
    assert!(!made && counts == Counts::default(), "lists run over pages that are made of quantised tiles");
    // Rows of the host, and of another device.
    let growing = Growing::new(&own, KvDtype::F16);
    let host = Activations::from_host(growing.k.width(), growing.k.to_host().unwrap().into_owned());
    assert!(!own.executor.append_kept(&host, &growing.v, &[growing.part()]).unwrap());
    assert!(!gpu(1 << 26).executor.append_kept(&growing.k, &growing.v, &[growing.part()]).unwrap());
    // Pages for fewer blocks than there are.
    let small = gpu(4 * TOKENS * HEADS.kv_heads * HEADS.head_dim * 2 * 2);
    let growing = Growing::new(&small, KvDtype::F16);
    let (counts, made) = growing.append(&small);
    assert!(!made && counts.launches == 0, "{counts:?}");
    let refused = [&own, &small].map(|gpu| gpu.executor.stats().refused_appends);
    assert_eq!(refused, [0, 1], "only room is what it lacked");
}

#[test]
fn rows_that_do_not_fit_their_tiles_are_refused() {
    let gpu = gpu(1 << 26);
    let growing = Growing::new(&gpu, KvDtype::F16);
    let good = growing.part();
    let wrong = [
        KeptAppend { rows: 0..ROWS - 1, ..good.clone() },
        KeptAppend { rows: 1..ROWS, ..good.clone() },
        KeptAppend { offset: BEFORE % TOKENS + TOKENS, ..good.clone() },
        KeptAppend { tiles: good.tiles[1..].to_vec(), ..good.clone() },
        KeptAppend { promised: &good.promised[1..], ..good.clone() },
        KeptAppend { tiles: Vec::new(), promised: &[], ..good.clone() },
    ];
    for part in wrong {
        let error = gpu.executor.append_kept(&growing.k, &growing.v, &[part]).unwrap_err();
        assert!(error.kind() == Kind::InvalidInput && error.to_string().contains("parts"), "{error}");
    }
    let error = gpu.executor.append_kept(&growing.q, &growing.v, &[good]).unwrap_err();
    assert!(error.kind() == Kind::InvalidInput && error.to_string().contains("`k`"), "{error}");
}

#[test]
fn without_memory_nothing_is_promised_and_nothing_leaks() {
    for warm in [false, true] {
        let reached = (0..).take_while(|&number| refuses(warm, number)).count();
        assert!(reached >= if warm { 1 } else { 3 }, "{reached}");
    }
}

/// Appends without one allocation; whether there were so many.
fn refuses(warm: bool, number: usize) -> bool {
    let gpu = gpu(1 << 24);
    let mut growing = Growing::new(&gpu, KvDtype::F16);
    if warm {
        // The page of the open block is there.
        growing.by_host(Some(&gpu));
    }
    gpu.watched.refuse_allocation(number);
    let (_, made) = growing.append(&gpu);
    let reached = gpu.watched.has_refused();
    gpu.watched.refuse_allocation(usize::MAX);
    assert!(reached || made);
    assert_eq!(gpu.executor.stats().refused_appends, u64::from(!made));
    growing.write(made);
    assert_near(&growing.by_host(Some(&gpu)), &growing.by_host(None), 2e-3, "written");
    let watched = Arc::clone(&gpu.watched);
    drop((growing, gpu));
    assert_eq!(watched.used.load(Ordering::Relaxed), 0, "allocation {number} leaks");
    reached
}

const STRIPE: u32 = 4;
/// Blocks that are full before the rows, and with them.
const FULL: [u64; 2] = [(BEFORE / TOKENS) as u64, ((BEFORE + ROWS) / TOKENS) as u64];

/// Means of the full blocks, and the versions that their tiles get.
struct Means {
    summaries: Summaries,
    promised: PromisedMeans,
}

impl Means {
    fn new(growing: &Growing) -> Self {
        let mut summaries = Summaries::new(growing.tiles.shape, STRIPE, 0).unwrap();
        for block in 0..FULL[0] {
            summaries.push(block, &growing.tiles.tiles[block as usize]).unwrap();
        }
        let promised = summaries.promise(FULL[1]);
        assert_eq!(promised.tiles().len(), 2, "one stripe goes on, one begins");
        Self { summaries, promised }
    }

    fn append(&self, gpu: &Gpu, growing: &Growing) -> (Counts, bool) {
        let blocks = &growing.promised[..(FULL[1] - FULL[0]) as usize];
        let means = KeptMeans {
            tile: growing.tiles.shape,
            blocks,
            first_block: FULL[0],
            summaries: &self.summaries,
            visited: true,
            promised: self.promised.tiles(),
        };
        let before = gpu.watched.counted();
        let made = gpu.executor.append_means(&means).unwrap();
        (gpu.watched.counted() - before, made)
    }

    /// Makes the means of written tiles; with `kept`, under the promised versions.
    fn write(&mut self, growing: &Growing, kept: bool) {
        for block in FULL[0]..FULL[1] {
            self.summaries.push(block, &growing.tiles.tiles[block as usize]).unwrap();
        }
        let promised = std::mem::take(&mut self.promised);
        if kept {
            self.summaries.keep(promised).unwrap();
        }
    }

    /// Attention by a rule over rows that stay; also of the CPU, where everything is written.
    fn attend(&self, gpu: &Gpu, growing: &Growing) -> (Counts, Option<Vec<f32>>, Option<Vec<f32>>) {
        let rule = "blocks:scorer=row-normalised,selector=top-k,k=1,sink=0,local=0,dense_layers=0,min_positions=0,last_tiles=0";
        let policy = PrefillPolicy::parse(rule, None).unwrap();
        assert!(policy.chooses_by_means(0));
        let data = growing.q.to_host().unwrap();
        let queries = Queries { shape: HEADS, first_position: BEFORE as u64, scale: SCALE, data: &[] };
        let input = PlanInput {
            queries,
            layer: 0,
            kv: &growing.tiles,
            first_block: 0,
            summaries: &self.summaries,
            stripe_blocks: STRIPE,
            dense_from: (BEFORE + ROWS) as u64,
            spreads: None,
            cosines: None,
        };
        let promised = Promised { tiles: &growing.promised, means: self.promised.tiles() };
        let visits = KeptVisits::By { policy: &policy, input: &input, promised };
        let part = KeptPart { rows: 0..ROWS, first_position: BEFORE as u64, visits };
        let (counts, found) = gpu.attend(&growing.q, &[part]);
        let found = found.map(|rows| rows.to_host().unwrap().into_owned());
        let written = self.promised.tiles().is_empty().then(|| {
            let input = PlanInput { queries: Queries { data: &data, ..queries }, ..input };
            attend_by_lists(&CpuExecutor::serial(), &policy, &input).unwrap().finish()
        });
        (counts, found, written)
    }
}

#[test]
fn means_of_pages_serve_a_rule_before_any_tile_is_written() {
    for (dtype, limit) in [(KvDtype::F32, 1e-5), (KvDtype::F16, 2e-3), (KvDtype::Bf16, 8e-3)] {
        let (own, what) = (gpu(1 << 26), format!("{dtype:?}"));
        let mut growing = Growing::new(&own, dtype);
        let mut means = Means::new(&growing);
        assert!(growing.append(&own).1);
        let (counts, made) = means.append(&own, &growing);
        assert!(made && counts.waits() == 0, "{what}: {counts:?}");
        let (counts, ahead, _) = means.attend(&own, &growing);
        let ahead = ahead.expect("there is a page for everything");
        assert_eq!(counts.waits(), 0, "{what}");
        growing.write(true);
        means.write(&growing, true);
        // Over the same pages, and over pages that are made of the tiles: the same bits.
        let (counts, later, wanted) = means.attend(&own, &growing);
        assert_eq!(counts.uploads_apart, 0, "{what}: nothing of it goes up");
        assert!(later.as_deref() == Some(&ahead), "{what}");
        assert_near(&ahead, &wanted.unwrap(), limit, &what);
        let other = gpu(1 << 26);
        let host = Growing { q: Growing::new(&other, dtype).q, promised: Vec::new(), ..growing };
        let (counts, of_tiles, _) = means.attend(&other, &host);
        assert!(counts.uploads_apart >= host.tiles.tiles.len());
        assert!(of_tiles.as_deref() == Some(&ahead), "{what}");
    }
}

#[test]
fn means_without_pages_or_memory_are_none_and_nothing_leaks() {
    let reached = (0..).take_while(|&number| refuses_means(number)).count();
    assert!(reached >= 5, "{reached}");
    // Of blocks that have no pages, and of others than the next.
    let gpu = gpu(1 << 26);
    let growing = Growing::new(&gpu, KvDtype::F16);
    let mut means = Means::new(&growing);
    assert!(!means.append(&gpu, &growing).1, "nobody made their pages");
    assert_eq!(gpu.executor.stats().refused_means, 1);
    let all = std::mem::take(&mut means.promised);
    let wrong = KeptMeans {
        tile: growing.tiles.shape,
        blocks: &growing.promised[..4],
        first_block: FULL[0],
        summaries: &means.summaries,
        visited: false,
        promised: &all.tiles()[..1],
    };
    let tile = TileShape { block_tokens: 2 * TOKENS, ..wrong.tile };
    let others = [KeptMeans { first_block: 0, ..wrong }, KeptMeans { blocks: &[], ..wrong }];
    for wrong in others.into_iter().chain([wrong, KeptMeans { tile, promised: all.tiles(), ..wrong }]) {
        let error = gpu.executor.append_means(&wrong).unwrap_err();
        assert!(error.kind() == Kind::InvalidInput && error.to_string().contains("`means`"), "{error}");
    }
}

/// Makes means without one allocation; whether there were so many.
fn refuses_means(number: usize) -> bool {
    let gpu = gpu(1 << 24);
    let mut growing = Growing::new(&gpu, KvDtype::F16);
    let mut means = Means::new(&growing);
    assert!(growing.append(&gpu).1);
    gpu.watched.refuse_allocation(number);
    let (_, made) = means.append(&gpu, &growing);
    let reached = gpu.watched.has_refused();
    gpu.watched.refuse_allocation(usize::MAX);
    assert!(reached || made);
    assert_eq!(gpu.executor.stats().refused_means, u64::from(!made));
    growing.write(true);
    means.write(&growing, made);
    let (_, found, wanted) = means.attend(&gpu, &growing);
    assert_near(&found.unwrap(), &wanted.unwrap(), 2e-3, "written");
    let watched = Arc::clone(&gpu.watched);
    drop((growing, gpu));
    assert_eq!(watched.used.load(Ordering::Relaxed), 0, "allocation {number} leaks");
    reached
}

#[test]
fn reads_that_were_begun_are_waited_for_once_and_where_there_is_no_room_as_before() {
    let gpu = gpu(1 << 26);
    let growing = Growing::new(&gpu, KvDtype::F32);
    let (k, v) = (growing.k.to_host().unwrap().into_owned(), growing.v.to_host().unwrap().into_owned());
    for (full, waits) in [(false, 1), (true, 2)] {
        gpu.watched.fill_staging(full);
        let before = gpu.watched.counted();
        let begin = |rows: &Activations| rows.clone().begin_read().unwrap();
        let (first, second) = (begin(&growing.k), begin(&growing.v));
        assert_eq!((gpu.watched.counted() - before).waits(), 0);
        let read = longshore_model::RowsRead::finish_both(first, second).unwrap();
        assert!(read == (k.clone(), v.clone()));
        let counts = gpu.watched.counted() - before;
        assert_eq!((counts.waits(), counts.departures), (waits, if full { 0 } else { 2 }), "{counts:?}");
    }
    gpu.watched.fill_staging(false);
    // With something queued behind them the device has work while they are waited for; what is dropped is abandoned, with its rows.
    let before = gpu.watched.counted();
    let read = growing.k.clone().begin_read().unwrap();
    drop(growing.v.clone().begin_read().unwrap());
    growing.append(&gpu);
    drop(growing);
    assert_eq!(read.finish().unwrap(), k);
    assert_eq!((gpu.watched.counted() - before).waits(), 0);
}
