//! Steps of an engine whose backend and executor are on one device, which the emulator is here: keys and values become pages where they were
//! computed, tiles follow a layer behind, and everything is as if they had come first.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test's functions may fail and report like its body"
)]

#[path = "../../kernels/cuda/tests/emulator/compiler.rs"]
mod compiler;
#[path = "../../kernels/cuda/tests/emulator/counted.rs"]
mod counted;
#[path = "../../kernels/cuda/tests/emulator/device.rs"]
mod device;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use longshore_attention::{CpuExecutor, Error as AttentionError, HeadShape, KvDtype, PrefillPolicy};
use longshore_compute::ComputePool;
use longshore_cuda::{CudaBackend, CudaExecutor, Device, ModelOptions};
use longshore_engine::testing::{Bodies, TestCluster};
use longshore_engine::{Engine, EngineOptions, Error, Logits, Sequence, StepInput, StepObserver};
use longshore_fabric::{CallContext, Code};
use longshore_model::testing::{TinyOptions, write_tiny_gguf};
use longshore_model::{Activations, KeptAttention, KeptPart, LoadedModel, RowLogits};

use counted::{Counts, Watched};

/// How keys and values become pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Where they are, before their tiles.
    Promised,
    /// Out of tiles, with rows that stay.
    Tiles,
    /// Out of tiles, with queries of the host.
    Host,
}

/// Takes rows where they are, and makes no pages of keys.
#[derive(Debug)]
struct WithoutPages(Arc<CudaExecutor>);

impl KeptAttention for WithoutPages {
    fn attend_kept(
        &self,
        shape: (HeadShape, f32),
        q: &Activations,
        parts: &[KeptPart<'_>],
    ) -> Result<Option<Activations>, AttentionError> {
        self.0.attend_kept(shape, q, parts)
    }
}

/// An engine on a device, and what is counted of it.
struct World {
    watched: Arc<Watched>,
    executor: Arc<CudaExecutor>,
    engine: Engine,
    cluster: TestCluster,
}

const PAGE_BYTES: usize = 1 << 26;

fn options(layers: usize) -> TinyOptions {
    TinyOptions { layers, query_heads: 6, kv_heads: 2, head_dim: 64, ..TinyOptions::default() }
}

impl World {
    /// Must be made on a runtime.
    fn new(way: Way, dtype: KvDtype, layers: usize, page_bytes: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        write_tiny_gguf(&path, &options(layers)).unwrap();
        let model = LoadedModel::open(&path, &|_| ()).unwrap();
        let watched = Watched::with_room(usize::MAX);
        let device: Arc<dyn Device> = watched.clone();
        let options = ModelOptions::new(ComputePool::serial());
        let config = model.info.config.clone();
        let backend = CudaBackend::load(Arc::clone(&device), config, &model.weights, &options, &|_| ());
        let executor = CudaExecutor::new(device, CpuExecutor::serial(), page_bytes).with_choices_min(0);
        let (backend, executor) = (Arc::new(backend.unwrap()), Arc::new(executor));
        let options = EngineOptions { kv_dtype: dtype, ..EngineOptions::default() };
        let cluster = TestCluster::with_options(0, options);
        let geometry = cluster.engine.geometry();
        let engine =
            Engine::new(backend, executor.clone(), ComputePool::serial(), geometry, options).unwrap();
        let engine = match way {
            Way::Promised => engine.with_kept(executor.clone()),
            Way::Tiles => engine.with_kept(Arc::new(WithoutPages(executor.clone()))),
            Way::Host => engine,
        };
        Self { watched, executor, engine, cluster }
    }

    fn empty(&self) -> Sequence {
        Sequence::new(&self.engine, self.cluster.identity(b""), self.cluster.links())
    }

    fn step(&self, sequence: &mut Sequence, tokens: &[u32], logits: Logits) -> (Counts, Option<Vec<f32>>) {
        let before = self.watched.counted();
        let batch = &mut [StepInput { sequence, tokens, logits }];
        let mut outputs = self.engine.step(&CallContext::new("test"), batch, &mut ()).unwrap();
        let logits = outputs.remove(0).unwrap().map(RowLogits::into_all);
        assert_eq!(self.watched.departing(), 0, "every read is over when the step is");
        (self.watched.counted() - before, logits)
    }

    /// Logits of a prompt in chunks, and the tiles of its full blocks; a decode step ends it.
    fn run(&self, sequence: &mut Sequence, prompt: &[u32], chunks: &[usize]) -> (Vec<f32>, Bodies) {
        let (mut rest, mut all) = (prompt, Vec::new());
        for &chunk in chunks {
            let (now, later) = rest.split_at(chunk);
            all.extend(self.step(sequence, now, Logits::Last).1.unwrap());
            rest = later;
        }
        all.extend(self.step(sequence, &[5], Logits::Last).1.unwrap());
        (all, tiles(sequence))
    }
}

/// Bodies of the tiles of full blocks.
fn tiles(sequence: &Sequence) -> Bodies {
    let tiles = (0..sequence.full_blocks()).flat_map(|block| sequence.block_messages(block).unwrap());
    tiles.map(|tile| ((tile.key, tile.layer as usize), tile.data.to_vec())).collect()
}

fn prompt(count: usize) -> Vec<u32> {
    (0..count as u32).map(|token| (token * 37 + token / 7) % 200).collect()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn distance(found: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let square = |x: f64| x * x;
    let off: f64 = found.iter().zip(wanted).map(|(f, w)| square(f64::from(*f) - f64::from(*w))).sum();
    (off / wanted.iter().map(|w| square(f64::from(*w))).sum::<f64>()).sqrt()
}

fn likeliest(logits: &[f32], vocabulary: usize) -> Vec<usize> {
    let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
    logits.chunks_exact(vocabulary).map(best).collect()
}

const FLOATS: [(KvDtype, f64); 3] = [(KvDtype::F32, 1e-5), (KvDtype::F16, 2e-3), (KvDtype::Bf16, 8e-3)];
/// Ends within blocks, begins within blocks, and has blocks that one chunk fills and others that several do.
const CHUNKS: [usize; 3] = [53, 20, 39];
const PROMPT: usize = 53 + 20 + 39;

#[test]
fn tiles_and_logits_are_those_of_the_way_by_tiles_bit_for_bit() {
    let (runtime, prompt) = (runtime(), prompt(PROMPT));
    let _on_runtime = runtime.enter();
    for (dtype, limit) in FLOATS.into_iter().chain([(KvDtype::Int8, 8e-3)]) {
        let run = |way| {
            let world = World::new(way, dtype, 3, PAGE_BYTES);
            let (logits, tiles) = world.run(&mut world.empty(), &prompt, &CHUNKS);
            let vocabulary = world.engine.backend().config().vocabulary;
            (likeliest(&logits, vocabulary), logits, tiles, world.executor.stats().pages)
        };
        let (promised, by_tiles, host) = (run(Way::Promised), run(Way::Tiles), run(Way::Host));
        assert_eq!(bits(&promised.1), bits(&by_tiles.1), "{dtype:?}");
        assert!(promised.2 == by_tiles.2, "{dtype:?}");
        let apart = distance(&promised.1, &host.1);
        println!("{dtype:?}: {apart:.2e} from queries of the host");
        assert!(apart <= limit && promised.0 == host.0, "{dtype:?}: {apart:e}");
        // A block has one page in a layer, whoever made it, where pages are not made of tiles anew with every write.
        let blocks = (PROMPT + 1).div_ceil(16) * 3;
        if dtype != KvDtype::Int8 {
            assert_eq!(promised.3.pages, blocks, "{dtype:?}");
            assert!(by_tiles.3.pages > blocks, "{dtype:?}");
        }
    }
}

#[test]
fn waits_do_not_grow_with_layers_and_no_tile_of_a_prompt_goes_up() {
    let (runtime, prompt) = (runtime(), prompt(PROMPT));
    let _on_runtime = runtime.enter();
    for layers in [2, 5] {
        let world = World::new(Way::Promised, KvDtype::F16, layers, PAGE_BYTES);
        let mut sequence = world.empty();
        // The last layer has nothing behind it; of a row with logits its queries, what it attends to and its logits are waited for.
        for (part, logits, waits) in [
            (&prompt[..53], Logits::None, 1),
            (&prompt[53..73], Logits::None, 1),
            (&prompt[73..], Logits::Last, 3),
        ] {
            let (counts, _) = world.step(&mut sequence, part, logits);
            assert_eq!((counts.waits(), counts.uploads_apart), (waits, 0), "{layers} layers: {counts:?}");
            assert_eq!(counts.departures, 2 * layers, "{counts:?}");
        }
        // A decode step has its row on the host in every layer.
        let (counts, _) = world.step(&mut sequence, &[7], Logits::Last);
        assert_eq!(
            (counts.waits(), counts.uploads_apart),
            (2 * layers + 1, 0),
            "{layers} layers: {counts:?}"
        );
        // By tiles every layer is waited for, once.
        let world = World::new(Way::Tiles, KvDtype::F16, layers, PAGE_BYTES);
        let (counts, _) = world.step(&mut world.empty(), &prompt[..53], Logits::None);
        assert_eq!(counts.waits(), layers, "{counts:?}");
        assert_eq!(counts.uploads_apart, (layers - 1) * 4, "{counts:?}");
    }
}

#[test]
fn several_sequences_go_together() {
    let (runtime, prompt) = (runtime(), prompt(PROMPT));
    let _on_runtime = runtime.enter();
    let run = |way| {
        let world = World::new(way, KvDtype::Bf16, 2, PAGE_BYTES);
        let mut sequences = [world.empty(), world.empty()];
        world.step(&mut sequences[0], &prompt[..21], Logits::None);
        let [one, other] = &mut sequences;
        let mut batch = [
            StepInput { sequence: one, tokens: &prompt[21..60], logits: Logits::Last },
            StepInput { sequence: other, tokens: &prompt[..32], logits: Logits::Last },
        ];
        let outputs = world.engine.step(&CallContext::new("test"), &mut batch, &mut ()).unwrap();
        let logits: Vec<Vec<f32>> =
            outputs.into_iter().map(|output| output.unwrap().unwrap().into_all()).collect();
        (bits(&logits.concat()), sequences.each_ref().map(tiles))
    };
    assert!(run(Way::Promised) == run(Way::Tiles));
}

#[test]
fn a_policy_is_followed_over_the_same_pages_without_waits() {
    let (runtime, prompt) = (runtime(), prompt(260));
    let _on_runtime = runtime.enter();
    for (rule, dtype, ahead) in [
        (
            "scorer=row-normalised,selector=top-k,k=2,sink=1,local=1,dense_layers=0,min_positions=0",
            KvDtype::F16,
            true,
        ),
        (
            "scorer=pooled,selector=mass,gamma=0.6,correction=off,dense_layers=0,min_positions=0",
            KvDtype::F32,
            true,
        ),
        // Cosines are those of the host.
        ("scorer=pooled,selector=top-k,k=2,escape=0.7,dense_layers=0,min_positions=0", KvDtype::Bf16, false),
    ] {
        let policy = Arc::new(PrefillPolicy::parse(&format!("blocks:{rule}"), None).unwrap());
        let run = |way, layers: usize| {
            let world = World::new(way, dtype, layers, PAGE_BYTES);
            let mut sequence = world.empty();
            sequence.set_prefill(Arc::clone(&policy), 260).unwrap();
            let (first, _) = world.step(&mut sequence, &prompt[..75], Logits::None);
            let (second, _) = world.step(&mut sequence, &prompt[75..140], Logits::None);
            let (_, logits) = world.step(&mut sequence, &prompt[140..], Logits::Last);
            (bits(&logits.unwrap()), tiles(&sequence), [first.waits(), second.waits()], second.uploads_apart)
        };
        let (promised, by_tiles) = (run(Way::Promised, 3), run(Way::Tiles, 3));
        assert!(promised.0 == by_tiles.0 && promised.1 == by_tiles.1, "{rule}");
        let more = run(Way::Promised, 5);
        // Behind the rows of the last layer are the means of its blocks.
        assert_eq!(promised.2, if ahead { [0, 0] } else { [3, 3] }, "{rule}");
        assert_eq!(more.2, if ahead { [0, 0] } else { [5, 5] }, "{rule}");
        if ahead {
            // Zeros of a stripe that begins, for scores and, where means are visited in another type, for these.
            assert!(promised.3 <= 2 * 2 * 2, "{rule}: {} tiles", promised.3);
        }
    }
}

#[test]
fn without_staging_memory_rows_are_waited_for_as_before() {
    let (runtime, prompt) = (runtime(), prompt(PROMPT));
    let _on_runtime = runtime.enter();
    let world = World::new(Way::Promised, KvDtype::F16, 3, PAGE_BYTES);
    let wanted = world.run(&mut world.empty(), &prompt, &CHUNKS);
    assert_eq!(world.executor.stats().refused_departures, 0);
    world.watched.fill_staging(true);
    let found = world.run(&mut world.empty(), &prompt, &CHUNKS);
    assert_eq!(
        world.executor.stats().refused_departures,
        2 * 3 * 4,
        "keys and values of each layer and step"
    );
    assert_eq!(bits(&found.0), bits(&wanted.0));
    assert!(found.1 == wanted.1);
}

#[test]
fn with_too_few_pages_tiles_are_written_first() {
    let (runtime, prompt) = (runtime(), prompt(PROMPT));
    let _on_runtime = runtime.enter();
    let wanted = World::new(Way::Host, KvDtype::F16, 2, PAGE_BYTES);
    let (wanted, _) = wanted.run(&mut wanted.empty(), &prompt, &CHUNKS);
    // For 5 blocks: the last chunks have more. For one block, and for less than one.
    let page = 16 * 2 * 2 * 64 * 2;
    for pages in [5 * page * 8 / 6 + 8, page * 8 / 6 + 8, page / 2] {
        let [(found, tiles), (by_tiles, same)] = [Way::Promised, Way::Tiles].map(|way| {
            let world = World::new(way, KvDtype::F16, 2, pages);
            let run = world.run(&mut world.empty(), &prompt, &CHUNKS);
            let stats = world.executor.stats();
            assert!(stats.refused_appends + stats.to_lists > 0, "{way:?}, {pages} bytes of pages");
            run
        });
        assert!(distance(&found, &wanted) <= 2e-3, "{pages} bytes of pages");
        println!("{pages} bytes of pages: {:.2e} from the way by tiles", distance(&found, &by_tiles));
        assert_eq!(tiles.len(), 7 * 2);
        assert!(tiles == same, "{pages} bytes of pages");
    }
}

/// Notes layers, and the tiles that are final as they are told of; stops a step at a layer.
struct Observer {
    layers: Vec<usize>,
    tiles: Bodies,
    fails_at: Option<usize>,
    cancels_at: Option<(usize, CallContext)>,
}

impl Observer {
    fn new() -> Self {
        Self { layers: Vec::new(), tiles: Bodies::new(), fails_at: None, cancels_at: None }
    }
}

impl StepObserver for Observer {
    fn layer_done(&mut self, layer: usize, batch: &[StepInput<'_>]) -> Result<(), Error> {
        self.layers.push(layer);
        for input in batch {
            for block in input.sequence.filling() {
                let tile = input.sequence.tile_message(block, layer).unwrap();
                self.tiles.insert((tile.key, layer), tile.data.to_vec());
            }
        }
        if let Some((_, ctx)) = self.cancels_at.as_ref().filter(|(at, _)| *at == layer) {
            ctx.cancel.cancel();
        }
        match self.fails_at == Some(layer) {
            true => Err(Error::Invalid { field: "observer", problem: "says so".to_owned() }),
            false => Ok(()),
        }
    }
}

#[test]
fn layers_are_told_of_in_order_and_their_tiles_are_final_then() {
    let (runtime, prompt) = (runtime(), prompt(PROMPT));
    let _on_runtime = runtime.enter();
    let world = World::new(Way::Promised, KvDtype::F16, 4, PAGE_BYTES);
    let (mut sequence, mut observer) = (world.empty(), Observer::new());
    for part in prompt.chunks(40) {
        let batch = &mut [StepInput { sequence: &mut sequence, tokens: part, logits: Logits::None }];
        world.engine.step(&CallContext::new("test"), batch, &mut observer).unwrap();
    }
    assert_eq!(observer.layers, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]);
    assert!(observer.tiles == tiles(&sequence));
}

#[test]
fn steps_that_end_early_leave_nothing_under_way() {
    let (runtime, prompt) = (runtime(), prompt(PROMPT));
    let _on_runtime = runtime.enter();
    let world = World::new(Way::Promised, KvDtype::F16, 4, PAGE_BYTES);
    let wanted = world.run(&mut world.empty(), &prompt, &CHUNKS);
    for (fails_at, cancels_at) in
        [(Some(0), None), (Some(2), None), (Some(3), None), (None, Some(0)), (None, Some(1))]
    {
        let (ctx, mut sequence) = (CallContext::new("test"), world.empty());
        let cancels_at = cancels_at.map(|layer| (layer, ctx.clone()));
        let mut observer = Observer { fails_at, cancels_at, ..Observer::new() };
        let batch = &mut [StepInput { sequence: &mut sequence, tokens: &prompt, logits: Logits::Last }];
        let error = world.engine.step(&ctx, batch, &mut observer).unwrap_err();
        let code = if fails_at.is_some() { Code::InvalidArgument } else { Code::Cancelled };
        assert_eq!(error.kind(), code, "{error}");
        assert_eq!(world.watched.departing(), 0);
        assert!(sequence.broken().is_some());
        let batch = &mut [StepInput { sequence: &mut sequence, tokens: &[1], logits: Logits::Last }];
        assert!(
            world.engine.step(&CallContext::new("test"), batch, &mut ()).is_err(),
            "it can only be closed"
        );
    }
    let found = world.run(&mut world.empty(), &prompt, &CHUNKS);
    assert_eq!(bits(&found.0), bits(&wanted.0), "others go on as if nothing had been");
    assert!(found.1 == wanted.1);
}

#[test]
fn without_memory_a_step_says_so_or_is_right_and_nothing_leaks() {
    let (runtime, prompt) = (runtime(), prompt(41));
    let _on_runtime = runtime.enter();
    let wanted = {
        let world = World::new(Way::Host, KvDtype::F16, 2, PAGE_BYTES);
        world.step(&mut world.empty(), &prompt, Logits::Last).1.unwrap()
    };
    let (mut right, mut told) = (0, 0);
    for number in 0.. {
        let world = World::new(Way::Promised, KvDtype::F16, 2, PAGE_BYTES);
        let mut sequence = world.empty();
        world.watched.refuse_allocation(number);
        let batch = &mut [StepInput { sequence: &mut sequence, tokens: &prompt, logits: Logits::Last }];
        let outcome = world.engine.step(&CallContext::new("test"), batch, &mut ());
        let reached = world.watched.has_refused();
        world.watched.refuse_allocation(usize::MAX);
        assert_eq!(world.watched.departing(), 0);
        match outcome {
            Ok(mut outputs) => {
                let logits = outputs.remove(0).unwrap().unwrap().into_all();
                assert!(distance(&logits, &wanted) <= 2e-3, "without allocation {number}");
                right += 1;
            }
            Err(error) => {
                assert_eq!(error.kind(), Code::ResourceExhausted, "{error}");
                told += 1;
            }
        }
        let watched = Arc::clone(&world.watched);
        drop((sequence, world));
        assert_eq!(watched.used.load(Ordering::Relaxed), 0, "allocation {number} leaks");
        if !reached {
            break;
        }
    }
    // Weights and rows of the forward pass have no other place; pages and tables do.
    assert!(right > 10 && told > 5, "{right} were right, {told} were told");
}
