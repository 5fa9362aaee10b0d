//! Attention by a policy whose lists stay on the device, against lists of the CPU: the same answers, one wait, and nothing of the lists on the
//! bus.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use longshore_attention::{
    CpuExecutor, Error, Executor as _, HeadShape, Kind, KvDtype, Partials, PlanInput, PrefillPolicy,
    TileShape, attend_by_lists,
};
use longshore_cuda::{Buffer, CudaExecutor, Device, Shortage, VisitBuilder, VisitCall};

use crate::counted::{Counts, Moment, Watched};
use crate::plan::{HEADS, Prompt};

const RULES: [&str; 7] = [
    "scorer=row-normalised,selector=mass,gamma=0.6",
    "scorer=pooled,selector=mass,gamma=0.8,correction=off",
    "scorer=row-normalised,selector=top-k,k=5,escape=0.7",
    "scorer=row-normalised,selector=top-k,k=5,sink=1,local=2",
    "scorer=pooled,selector=alpha,alpha=0.1,max_blocks=3",
    "scorer=row-normalised,selector=mass,gamma=1,max_blocks=5,peak=0.25",
    "scorer=row-normalised,selector=alpha,alpha=0.3,sink=0,local=0",
];

fn policy(rule: &str) -> PrefillPolicy {
    let text = format!("blocks:{rule},dense_layers=0,min_positions=0,last_tiles=0");
    PrefillPolicy::parse(&text, None).unwrap()
}

fn shape(dtype: KvDtype, block_tokens: usize) -> TileShape {
    TileShape { block_tokens, kv_heads: HEADS.kv_heads, head_dim: HEADS.head_dim, dtype }
}

fn executor(room: usize, budget: usize) -> (Arc<Watched>, CudaExecutor) {
    let watched = Watched::with_room(room);
    let device: Arc<dyn Device> = watched.clone();
    (watched, CudaExecutor::new(device, CpuExecutor::serial(), budget).with_choices_min(0))
}

/// On the CPU, by lists.
fn wanted(prompt: &Prompt, policy: &PrefillPolicy) -> Partials {
    prompt.with_input(|input| attend_by_lists(&CpuExecutor::serial(), policy, input)).unwrap()
}

#[track_caller]
fn assert_near(found: &Partials, wanted: &Partials, limit: f64, what: &str) {
    let (found, wanted) = (found.clone().finish(), wanted.clone().finish());
    let square = |x: f64| x * x;
    let off: f64 = found.iter().zip(&wanted).map(|(f, w)| square(f64::from(*f) - f64::from(*w))).sum();
    let all: f64 = wanted.iter().map(|w| square(f64::from(*w))).sum();
    let distance = (off / all).sqrt();
    assert!(found.len() == wanted.len() && distance <= limit, "{what}: {distance:e} above {limit:e}");
}

fn attend(
    (watched, executor): &(Arc<Watched>, CudaExecutor),
    prompt: &Prompt,
    policy: &PrefillPolicy,
) -> (Counts, Partials) {
    let before = watched.counted();
    let found = prompt.with_input(|input| executor.attend_by(policy, input)).unwrap();
    (watched.counted() - before, found)
}

/// Bytes of the partials of a prompt, as they are read.
fn record_bytes(rows: usize) -> usize {
    (rows * HEADS.query_heads() * (2 + HEADS.head_dim) * size_of::<f32>()).next_multiple_of(256)
}

#[test]
fn answers_are_those_of_lists_of_the_cpu() {
    // Blocks shorter than a visit, as long, and longer; rows that begin and end within a tile, and so are exact.
    for (dtype, tokens, limit) in [
        (KvDtype::F32, 16, 1e-5),
        (KvDtype::F16, 32, 2e-3),
        (KvDtype::Bf16, 16, 8e-3),
        (KvDtype::F16, 64, 2e-3),
        (KvDtype::F32, 128, 1e-5),
        (KvDtype::Int8, 16, 8e-3),
    ] {
        let prompt = Prompt::of(shape(dtype, tokens), 37 * 16 + 7, 150, false);
        let own = executor(usize::MAX, 1 << 26);
        for rule in RULES {
            let policy = policy(rule);
            let (counts, found) = attend(&own, &prompt, &policy);
            let what = format!("{dtype:?} in blocks of {tokens}, {rule}");
            assert_eq!((counts.waits(), counts.downloads), (1, 1), "{what}: {counts:?}");
            assert_eq!(counts.downloaded_bytes, record_bytes(150), "{what}");
            assert_near(&found, &wanted(&prompt, &policy), limit, &what);
        }
        assert!(Shortage::ALL.iter().all(|&shortage| own.1.stats().fallbacks.of(shortage) == 0));
    }
}

/// Kernels of attention among what was launched.
fn attends(watched: &Watched) -> Vec<&'static str> {
    watched.take_launched().into_iter().filter(|entry| entry.starts_with("attend_")).collect()
}

#[test]
fn one_kernel_attends_by_lists_of_the_device_and_of_the_host() {
    for (dtype, tokens, limit) in
        [(KvDtype::F16, 16, 2e-3), (KvDtype::Bf16, 64, 8e-3), (KvDtype::Int8, 32, 8e-3)]
    {
        let prompt = Prompt::of(shape(dtype, tokens), 37 * 16 + 7, 150, false);
        for (wgmma, entry) in [(false, "attend_prefill"), (true, "attend_prefill_wgmma")] {
            let (watched, executor) = executor(usize::MAX, 1 << 26);
            let own = (watched, executor.with_wgmma(wgmma));
            for rule in [RULES[0], RULES[1], RULES[4]] {
                let (policy, what) = (policy(rule), format!("{dtype:?} by `{entry}`, {rule}"));
                let (counts, found) = attend(&own, &prompt, &policy);
                assert_eq!((counts.waits(), attends(&own.0)), (1, vec![entry]), "{what}");
                assert_near(&found, &wanted(&prompt, &policy), limit, &what);
                let lists = prompt.with_input(|input| attend_by_lists(&own.1, &policy, input)).unwrap();
                assert_eq!(attends(&own.0), [entry], "{what}, lists of the host");
                assert_near(&lists, &wanted(&prompt, &policy), limit, &what);
            }
        }
    }
}

#[test]
fn where_no_block_can_be_chosen_the_host_plans() {
    // All rows lie in the first block.
    let prompt = Prompt::of(shape(KvDtype::F16, 64), 0, 40, false);
    for rule in RULES {
        let (policy, own) = (policy(rule), executor(usize::MAX, 1 << 24));
        let (_, found) = attend(&own, &prompt, &policy);
        assert_near(&found, &wanted(&prompt, &policy), 2e-3, rule);
    }
}

#[test]
fn visits_without_room_are_a_fault_and_not_written() {
    let device: Arc<dyn Device> = Watched::with_room(usize::MAX);
    // Four blocks of 16 keys, of which all are visited: four visits.
    let bits = Buffer::from_slice(&device, &[0b1111_u32]).unwrap();
    let ends = Buffer::from_slice(&device, &[0_u32, 4]).unwrap();
    let row_ends = Buffer::from_slice(&device, &[64_u32]).unwrap();
    let counts = Buffer::new(&device, 4).unwrap();
    let offsets = Buffer::new(&device, 16).unwrap();
    let call = VisitCall {
        bits: bits.whole(),
        ends: ends.whole(),
        row_ends: row_ends.whole(),
        lists: 1,
        tiles: 1,
        words: 1,
        block_tokens: 16,
        keys: 16,
        means: None,
    };
    let visits = Buffer::from_slice(&device, &[[7_u64; 2]; 5]).unwrap();
    let launch = |room: usize| {
        let room = visits.span(0, room * 16).unwrap();
        VisitBuilder::new(&device).launch(&call, counts.whole(), offsets.whole(), room)
    };
    let problem = launch(3).and_then(|()| device.synchronize()).unwrap_err().to_string();
    assert!(problem.contains("expand_visits") && problem.contains("room"), "{problem}");
    assert_eq!(visits.to_vec::<[u64; 2]>().unwrap()[3..], [[7; 2]; 2]);
    launch(4).unwrap();
    let written = visits.to_vec::<[u64; 2]>().unwrap();
    assert!(written[..4].iter().all(|visit| *visit != [7; 2]) && written[4] == [7; 2], "{written:?}");
}

#[test]
fn lists_cost_neither_a_wait_nor_a_copy() {
    let prompt = Prompt::of(shape(KvDtype::F16, 16), 40 * 16, 96, false);
    let (policy, own) = (policy(RULES[0]), executor(usize::MAX, 1 << 26));
    let (first, partials) = attend(&own, &prompt, &policy);
    let (again, same) = attend(&own, &prompt, &policy);
    // All of it is three whole tiles: energies, bits, counts, offsets, visits, items, attention, and merges of lists that were cut.
    assert_eq!((again.launches, again.waits(), again.uploads_apart), (8, 1, 0), "{again:?}");
    assert!(first.uploads_apart > 0 && partials == same);
    // Queries, pages, means to choose by and to visit, ends of blocks and of rows; items and the two tables of merges.
    assert_eq!(again.uploads, 9, "{again:?}");
    // The same by lists of the host: a wait more, and the bits.
    let before = own.0.counted();
    prompt.with_input(|input| attend_by_lists(&own.1, &policy, input)).unwrap();
    let lists = own.0.counted() - before;
    let bits = HEADS.kv_heads * 3 * 44_usize.div_ceil(32) * size_of::<u32>();
    assert_eq!((lists.waits(), lists.downloaded_bytes), (2, record_bytes(96) + bits), "{lists:?}");
}

#[test]
fn what_has_no_page_for_every_block_goes_by_lists() {
    let prompt = Prompt::of(shape(KvDtype::F16, 16), 40 * 16, 96, false);
    let (policy, page) = (policy(RULES[2]), shape(KvDtype::F16, 16).bytes());
    let wanted = wanted(&prompt, &policy);
    for pages in [20, 45, 47, 60] {
        // Six eighths are for tiles, of which there are 46; one has room for the f32 means of both stripes from 48 pages on.
        let own = executor(usize::MAX, (pages * page).div_ceil(6) * 8);
        let stays = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stays);
        own.0.before(Moment::Launch("place_items"), move || seen.store(true, Ordering::Relaxed));
        let (_, found) = attend(&own, &prompt, &policy);
        assert_near(&found, &wanted, 2e-3, &format!("{pages} pages"));
        assert_eq!(stays.load(Ordering::Relaxed), pages == 60, "{pages} pages");
    }
    // What is small is planned on the CPU.
    let (watched, few) = executor(usize::MAX, 1 << 26);
    let few = (watched, few.with_choices_min(1 << 14));
    let (counts, found) = attend(&few, &prompt, &policy);
    assert_near(&found, &wanted, 2e-3, "few");
    assert_eq!((counts.waits(), counts.downloaded_bytes), (1, record_bytes(96)), "{counts:?}");
    // Policies that no kernel knows.
    let antidiagonal = self::policy("scorer=antidiagonal,stride=8,selector=mass,gamma=0.9");
    let (_, found) = attend(&few, &prompt, &antidiagonal);
    assert_near(&found, &self::wanted(&prompt, &antidiagonal), 2e-3, "antidiagonal");
}

#[test]
fn a_prefix_that_would_not_stay_is_not_brought_whole() {
    let [one, other] = [(); 2].map(|()| Prompt::of(shape(KvDtype::F16, 16), 40 * 16, 96, false));
    let (policy, page) = (policy(RULES[2]), shape(KvDtype::F16, 16).bytes());
    // Room for the 46 blocks of one layer, and not of two.
    let own = executor(usize::MAX, (60 * page).div_ceil(6) * 8);
    let wanted = wanted(&one, &policy);
    let attend = |prompt: &Prompt, layer: usize| {
        own.0.take_launched();
        let found = prompt.with_input(|input| own.1.attend_by(&policy, &PlanInput { layer, ..*input }));
        assert_near(&found.unwrap(), &wanted, 2e-3, &format!("layer {layer}"));
        own.0.take_launched().contains("place_items")
    };
    assert!(attend(&one, 0), "there is room");
    assert!(attend(&one, 1), "no block is missing");
    assert_eq!(own.1.stats().to_lists, 0);
    assert!(!attend(&other, 1), "all blocks are, and two layers have no room");
    assert_eq!(own.1.stats().to_lists, 1);
}

#[test]
fn whatever_memory_is_refused_the_answer_is_the_same() {
    let prompt = Prompt::of(shape(KvDtype::F16, 16), 12 * 16, 40, false);
    let policy = policy(RULES[0]);
    let wanted = wanted(&prompt, &policy);
    let mut number = 0;
    loop {
        let own = executor(usize::MAX, 1 << 24);
        own.0.refuse_allocation(number);
        let (_, found) = attend(&own, &prompt, &policy);
        let reached = own.0.has_refused();
        own.0.refuse_allocation(usize::MAX);
        assert_near(&found, &wanted, 2e-3, &format!("without allocation {number}"));
        let (watched, executor) = own;
        drop(executor);
        assert_eq!(watched.used.load(Ordering::Relaxed), 0, "allocation {number} leaks");
        if !reached {
            break;
        }
        number += 1;
    }
    assert!(number > 15, "{number}");
}

#[test]
fn what_the_cpu_refuses_is_refused() {
    let prompt = Prompt::of(shape(KvDtype::F16, 16), 20 * 16, 64, false);
    let (_, executor) = executor(usize::MAX, 1 << 24);
    let refused = |change: &dyn Fn(&mut PlanInput<'_>), rule: &str| -> Error {
        let attend = |input: &PlanInput<'_>| {
            let mut input = *input;
            change(&mut input);
            executor.attend_by(&policy(rule), &input)
        };
        prompt.with_input(attend).unwrap_err()
    };
    let scale = refused(&|input| input.queries.scale = f32::NAN, RULES[0]);
    let first = refused(&|input| input.first_block = 1, RULES[0]);
    let cosines = refused(&|input| input.cosines = None, RULES[2]);
    let heads = refused(&|input| input.queries.shape = HeadShape { kv_heads: 1, ..HEADS }, RULES[0]);
    let none = refused(&|input| input.queries.shape = HeadShape { group: 0, ..HEADS }, RULES[0]);
    let heads = [(heads, "queries"), (none, "queries")];
    let others = [(scale, "scale"), (first, "first_block"), (cosines, "cosines")];
    for (error, field) in others.into_iter().chain(heads) {
        assert!(error.kind() == Kind::InvalidInput && error.to_string().contains(field), "{error}");
    }
}
