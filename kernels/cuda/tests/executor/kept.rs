//! Attention over rows that the forward pass left on the device: what the CPU makes of the same rows, and nobody waits.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use longshore_attention::{
    AttendItem, CpuExecutor, ExactBlock, Executor as _, Kind, KvDtype, PlanInput, PrefillPolicy, Queries,
    TileShape, WorkList, attend_by_lists,
};
use longshore_compute::ComputePool;
use longshore_cuda::{CudaBackend, CudaExecutor, Device, ModelOptions};
use longshore_model::testing::{TinyOptions, write_tiny_gguf};
use longshore_model::{
    Activations, Backend as _, KeptAttention as _, KeptPart, KeptVisits, LoadedModel, Promised,
};

use crate::counted::{Counts, Watched};
use crate::plan::{HEADS, Prompt};

pub(crate) const SCALE: f32 = 0.125;
const FIRST: usize = 37 * 16 + 7;
const ROWS: usize = 70;

/// A backend and an executor on one device.
pub(crate) struct Gpu {
    pub(crate) watched: Arc<Watched>,
    pub(crate) backend: CudaBackend,
    pub(crate) executor: CudaExecutor,
}

pub(crate) fn gpu(budget: usize) -> Gpu {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    let options =
        TinyOptions { query_heads: HEADS.query_heads(), kv_heads: 2, head_dim: 64, ..TinyOptions::default() };
    write_tiny_gguf(&path, &options).unwrap();
    let model = LoadedModel::open(&path, &|_| ()).unwrap();
    let watched = Watched::with_room(usize::MAX);
    let device: Arc<dyn Device> = watched.clone();
    let options = ModelOptions::new(ComputePool::serial());
    let config = model.info.config.clone();
    let backend = CudaBackend::load(Arc::clone(&device), config, &model.weights, &options, &|_| ()).unwrap();
    assert_eq!(backend.config().heads, HEADS);
    let executor = CudaExecutor::new(device, CpuExecutor::serial(), budget).with_choices_min(0);
    Gpu { watched, backend, executor }
}

impl Gpu {
    /// Queries of rows, on the device.
    fn queries(&self, rows: usize) -> Activations {
        let tokens: Vec<u32> = (0..rows as u32).map(|row| row * 7 % 200).collect();
        let positions: Vec<u64> = (0..rows).map(|row| (FIRST + row) as u64).collect();
        let x = self.backend.embed(&tokens).unwrap();
        self.backend.qkv_kept(0, &x, &positions).unwrap().q
    }

    pub(crate) fn attend(&self, q: &Activations, parts: &[KeptPart<'_>]) -> (Counts, Option<Activations>) {
        let before = self.watched.counted();
        let found = self.executor.attend_kept((HEADS, SCALE), q, parts).unwrap();
        (self.watched.counted() - before, found)
    }
}

fn shape(dtype: KvDtype, block_tokens: usize) -> TileShape {
    TileShape { block_tokens, kv_heads: HEADS.kv_heads, head_dim: HEADS.head_dim, dtype }
}

/// Rows that see all keys of a prompt up to their own.
fn all(prompt: &Prompt, rows: Range<usize>) -> KeptPart<'_> {
    KeptPart {
        rows,
        first_position: FIRST as u64,
        visits: KeptVisits::All { kv: prompt.tiles(), first_key: 0, promised: &[] },
    }
}

/// The same on the CPU, of rows of the host.
fn exactly(prompt: &Prompt, rows: &[f32]) -> Vec<f32> {
    let queries = Queries { shape: HEADS, first_position: FIRST as u64, scale: SCALE, data: rows };
    let (end, kv) = (FIRST + queries.rows(), prompt.tiles());
    let tokens = kv.shape.block_tokens;
    let block = |tile: usize| ExactBlock {
        tile: tile as u32,
        first_position: (tile * tokens) as u64,
        len: tokens.min(end - tile * tokens) as u32,
    };
    let work = WorkList { exact: (0..end.div_ceil(tokens)).map(block).collect(), ..WorkList::default() };
    let items = [AttendItem { queries, kv, work: &work, initial: None }];
    CpuExecutor::serial().attend(&items).unwrap().remove(0).finish()
}

#[track_caller]
pub(crate) fn assert_near(found: &[f32], wanted: &[f32], limit: f64, what: &str) {
    let off: f64 = found.iter().zip(wanted).map(|(f, w)| (f64::from(*f) - f64::from(*w)).powi(2)).sum();
    let norm: f64 = wanted.iter().map(|w| f64::from(*w).powi(2)).sum();
    let distance = (off / norm).sqrt();
    assert!(found.len() == wanted.len() && distance <= limit, "{what}: {distance:e} above {limit:e}");
}

#[test]
fn rows_that_stay_get_what_the_cpu_says_and_nobody_waits() {
    for (dtype, tokens, limit) in [
        (KvDtype::F32, 16, 1e-5),
        (KvDtype::F16, 64, 2e-3),
        (KvDtype::Bf16, 16, 8e-3),
        (KvDtype::Int8, 32, 8e-3),
    ] {
        let (gpu, what) = (gpu(1 << 26), format!("{dtype:?} in blocks of {tokens}"));
        let prompt = Prompt::of(shape(dtype, tokens), FIRST, ROWS, false);
        let q = gpu.queries(ROWS);
        let rows = q.to_host().unwrap().into_owned();
        let (counts, found) = gpu.attend(&q, &[all(&prompt, 0..ROWS)]);
        assert_eq!((counts.waits(), counts.downloaded_bytes), (0, 0), "{what}: {counts:?}");
        let found = found.expect("there is room");
        assert_eq!((found.rows(), found.width()), (q.rows(), q.width()));
        assert_near(&found.to_host().unwrap(), &exactly(&prompt, &rows), limit, &what);
        // The rows stay on the device: `finish_kept` takes them there.
        let x = gpu.backend.embed(&vec![3; ROWS]).unwrap();
        let before = gpu.watched.counted();
        gpu.backend.finish_kept(0, x, &found).unwrap();
        let counts = gpu.watched.counted() - before;
        assert_eq!((counts.waits(), counts.uploads), (0, 0), "{what}: {counts:?}");
    }
}

#[test]
fn warp_groups_take_rows_that_stay_where_they_are_asked_for() {
    let prompt = Prompt::of(shape(KvDtype::F16, 32), FIRST, ROWS, false);
    let rule =
        "blocks:scorer=row-normalised,selector=mass,gamma=0.6,dense_layers=0,min_positions=0,last_tiles=0";
    let policy = PrefillPolicy::parse(rule, None).unwrap();
    for (wgmma, entry) in [(false, "attend_prefill"), (true, "attend_prefill_wgmma")] {
        let gpu = gpu(1 << 26);
        let gpu = Gpu { executor: gpu.executor.with_wgmma(wgmma), ..gpu };
        let q = gpu.queries(ROWS);
        let rows = q.to_host().unwrap().into_owned();
        let launched = || -> Vec<_> {
            let all = gpu.watched.take_launched();
            all.into_iter().filter(|entry| entry.starts_with("attend_")).collect()
        };
        launched();
        let (_, found) = gpu.attend(&q, &[all(&prompt, 0..ROWS)]);
        assert_eq!(launched(), [entry], "all keys");
        assert_near(&found.unwrap().to_host().unwrap(), &exactly(&prompt, &rows), 2e-3, entry);
        let prompt = Prompt::of(shape(KvDtype::F16, 32), FIRST, ROWS, false).with_rows(rows);
        let found = prompt.with_input(|input| {
            let part = KeptPart {
                rows: 0..ROWS,
                first_position: FIRST as u64,
                visits: KeptVisits::By { policy: &policy, input, promised: Promised::default() },
            };
            gpu.attend(&q, &[part]).1
        });
        assert_eq!(launched(), [entry], "by a policy");
        let wanted = prompt.with_input(|input| attend_by_lists(&CpuExecutor::serial(), &policy, input));
        assert_near(&found.unwrap().to_host().unwrap(), &wanted.unwrap().finish(), 2e-3, entry);
    }
}

#[test]
fn rows_by_a_policy_stay_too() {
    let prompt = Prompt::of(shape(KvDtype::F16, 16), FIRST, ROWS, false);
    let gpu = gpu(1 << 26);
    let q = gpu.queries(ROWS);
    let prompt = prompt.with_rows(q.to_host().unwrap().into_owned());
    for (rule, stays) in [
        ("scorer=row-normalised,selector=mass,gamma=0.6", true),
        ("scorer=pooled,selector=top-k,k=3,correction=off,escape=0.7", true),
        ("scorer=antidiagonal,stride=8,selector=mass,gamma=0.9", false),
    ] {
        let text = format!("blocks:{rule},dense_layers=0,min_positions=0,last_tiles=0");
        let policy = PrefillPolicy::parse(&text, None).unwrap();
        let (counts, found) = prompt.with_input(|input| {
            let mut input = *input;
            input.queries.data = &[];
            let visits = KeptVisits::By { policy: &policy, input: &input, promised: Promised::default() };
            gpu.attend(&q, &[KeptPart { rows: 0..ROWS, first_position: FIRST as u64, visits }])
        });
        assert_eq!((counts.waits(), counts.downloaded_bytes), (0, 0), "{rule}: {counts:?}");
        assert_eq!(found.is_some(), stays, "{rule}");
        let Some(found) = found else { continue };
        let wanted =
            prompt.with_input(|input| attend_by_lists(&CpuExecutor::serial(), &policy, input)).unwrap();
        assert_near(&found.to_host().unwrap(), &wanted.finish(), 2e-3, rule);
    }
}

#[test]
fn parts_of_several_sequences_are_attended_to_apart() {
    let gpu = gpu(1 << 26);
    let (one, other) = (
        Prompt::of(shape(KvDtype::F16, 16), FIRST, 30, false),
        Prompt::of(shape(KvDtype::F16, 16), FIRST, 40, true),
    );
    let q = gpu.queries(ROWS);
    let rows = q.to_host().unwrap().into_owned();
    let (_, found) = gpu.attend(&q, &[all(&one, 0..30), all(&other, 30..70)]);
    let width = q.width();
    let wanted = [exactly(&one, &rows[..30 * width]), exactly(&other, &rows[30 * width..])].concat();
    assert_near(&found.unwrap().to_host().unwrap(), &wanted, 2e-3, "two sequences");
}

#[test]
fn what_is_not_for_it_goes_the_way_of_the_host() {
    let prompt = Prompt::of(shape(KvDtype::F16, 16), FIRST, ROWS, false);
    let own = gpu(1 << 26);
    let q = own.queries(ROWS);
    let launches = |counts: Counts| counts.launches;
    // Rows of the host, rows of another device, and few rows.
    let host = Activations::from_host(q.width(), q.to_host().unwrap().into_owned());
    let elsewhere = gpu(1 << 26).queries(ROWS);
    for rows in [&host, &elsewhere] {
        let (counts, found) = own.attend(rows, &[all(&prompt, 0..ROWS)]);
        assert!(found.is_none() && launches(counts) == 0);
    }
    let (counts, found) = own.attend(&own.queries(10), &[all(&prompt, 0..10)]);
    assert!(found.is_none() && launches(counts) == 0);
    // Keys that are not there, and pages for fewer blocks than there are.
    let short = Prompt::of(shape(KvDtype::F16, 16), FIRST - 16, ROWS, false);
    let (counts, found) = own.attend(&q, &[all(&short, 0..ROWS)]);
    assert!(found.is_none() && launches(counts) == 0);
    let small = gpu(20 * shape(KvDtype::F16, 16).bytes());
    let (_, found) = small.attend(&small.queries(ROWS), &[all(&prompt, 0..ROWS)]);
    assert!(found.is_none());
}

#[test]
fn rows_that_could_not_stay_are_tried_once_and_counted() {
    let gpu = gpu(20 * shape(KvDtype::F16, 16).bytes());
    let q = gpu.queries(ROWS);
    let prompt = Prompt::of(shape(KvDtype::F16, 16), FIRST, ROWS, false);
    let (_, found) = gpu.attend(&q, &[all(&prompt, 0..ROWS)]);
    assert!(found.is_none());
    assert_eq!(gpu.executor.stats().to_lists, 1, "all keys");
    let rule = "blocks:scorer=pooled,selector=top-k,k=3,dense_layers=0,min_positions=0,last_tiles=0";
    let policy = PrefillPolicy::parse(rule, None).unwrap();
    let prompt = prompt.with_rows(q.to_host().unwrap().into_owned());
    prompt.with_input(|input| {
        let kept = PlanInput { queries: Queries { data: &[], ..input.queries }, ..*input };
        let visits = KeptVisits::By { policy: &policy, input: &kept, promised: Promised::default() };
        let part = KeptPart { rows: 0..ROWS, first_position: FIRST as u64, visits };
        assert!(gpu.attend(&q, &[part]).1.is_none());
        assert_eq!(gpu.executor.stats().to_lists, 2, "by a policy");
        let wanted = attend_by_lists(&CpuExecutor::serial(), &policy, input).unwrap().finish();
        // The same rows by way of the host, and another time.
        for attempts in [2, 3] {
            let found = gpu.executor.attend_by(&policy, input).unwrap();
            assert_near(&found.finish(), &wanted, 2e-3, "by lists");
            assert_eq!(gpu.executor.stats().to_lists, attempts);
        }
    });
}

#[test]
fn parts_that_do_not_make_the_rows_are_refused() {
    let prompt = Prompt::of(shape(KvDtype::F16, 16), FIRST, ROWS, false);
    let gpu = gpu(1 << 26);
    let q = gpu.queries(ROWS);
    let wrong: [&[(usize, usize)]; 5] =
        [&[(0, 69)], &[(1, 70)], &[(0, 40), (41, 70)], &[(0, 70), (70, 70)], &[]];
    for rows in wrong {
        let parts: Vec<KeptPart<'_>> = rows.iter().map(|&(first, end)| all(&prompt, first..end)).collect();
        let error = gpu.executor.attend_kept((HEADS, SCALE), &q, &parts).unwrap_err();
        assert!(error.kind() == Kind::InvalidInput && error.to_string().contains("parts"), "{error}");
    }
}

#[test]
fn without_memory_the_host_is_asked_and_nothing_leaks() {
    let rule = "blocks:scorer=pooled,selector=top-k,k=3,dense_layers=0,min_positions=0,last_tiles=0";
    let policy = PrefillPolicy::parse(rule, None).unwrap();
    for by_rule in [false, true] {
        let reached = (0..).take_while(|&number| refuses(&policy, by_rule, number)).count();
        assert!(reached > if by_rule { 10 } else { 4 }, "{reached}");
    }
}

/// Attends without one allocation; whether there were so many.
fn refuses(policy: &PrefillPolicy, by_rule: bool, number: usize) -> bool {
    let gpu = gpu(1 << 24);
    let q = gpu.queries(ROWS);
    let rows = q.to_host().unwrap().into_owned();
    let prompt = Prompt::of(shape(KvDtype::F16, 16), FIRST, ROWS, false).with_rows(rows.clone());
    gpu.watched.refuse_allocation(number);
    let (found, wanted) = prompt.with_input(|input| {
        if !by_rule {
            return (gpu.attend(&q, &[all(&prompt, 0..ROWS)]).1, exactly(&prompt, &rows));
        }
        let kept = PlanInput { queries: Queries { data: &[], ..input.queries }, ..*input };
        let visits = KeptVisits::By { policy, input: &kept, promised: Promised::default() };
        let part = KeptPart { rows: 0..ROWS, first_position: FIRST as u64, visits };
        let wanted = attend_by_lists(&CpuExecutor::serial(), policy, input).unwrap();
        (gpu.attend(&q, &[part]).1, wanted.finish())
    });
    let reached = gpu.watched.has_refused();
    gpu.watched.refuse_allocation(usize::MAX);
    if let Some(found) = &found {
        assert_near(&found.to_host().unwrap(), &wanted, 2e-3, "without an allocation");
    }
    assert!(reached || found.is_some());
    assert_eq!(gpu.executor.stats().to_lists, u64::from(found.is_none()));
    let watched = Arc::clone(&gpu.watched);
    drop((found, q, gpu));
    assert_eq!(watched.used.load(Ordering::Relaxed), 0, "allocation {number} leaks");
    reached
}
