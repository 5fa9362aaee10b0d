//! A backend that keeps its rows, and an executor beside it that takes them: queries come to the host only where a shard is asked or lists
//! are looked at, and the answers are the same.

#[path = "support/world.rs"]
mod support;

use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use longshore_attention::{
    AttendItem, CpuExecutor, Error as AttentionError, ExactBlock, Executor as _, HeadShape, KvDtype, PagedKv,
    PrefillPolicy, Promise, Queries, Tile, Tiles, WorkList, attend_by_lists,
};
use longshore_compute::ComputePool;
use longshore_engine::{
    AttentionProbe, Engine, Logits, Sequence, StepInput, StepObserver,
    testing::{TinyModel, tokens},
};
use longshore_fabric::{CallContext, Code};
use longshore_model::{
    Activations, Backend, DeviceRead, DeviceRows, Error, KeptAppend, KeptAttention, KeptPart, KeptQkv,
    KeptVisits, ModelConfig, Qkv, RowLogits,
};

use support::{BLOCK, World};

/// Rows that a device keeps; whoever reads them on the host is counted.
#[derive(Debug)]
struct Rows {
    data: Vec<f32>,
    width: usize,
    reads: Arc<AtomicUsize>,
}

impl DeviceRows for Rows {
    fn select(&self, rows: &[usize]) -> Result<Arc<dyn DeviceRows>, Error> {
        let data = rows.iter().flat_map(|row| &self.data[row * self.width..][..self.width]).copied();
        Ok(Arc::new(Self { data: data.collect(), width: self.width, reads: Arc::clone(&self.reads) }))
    }

    fn read(&self) -> Result<Vec<f32>, Error> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        Ok(self.data.clone())
    }

    fn begin_read(self: Arc<Self>) -> Result<Box<dyn DeviceRead>, Error> {
        Ok(Box::new(Coming(self)))
    }
}

#[derive(Debug)]
struct Coming(Arc<Rows>);

impl DeviceRead for Coming {
    fn finish(self: Box<Self>) -> Result<Vec<f32>, Error> {
        self.0.read()
    }
}

fn keep(width: usize, data: Vec<f32>, reads: &Arc<AtomicUsize>) -> Activations {
    let rows = data.len() / width;
    Activations::from_device(rows, width, Arc::new(Rows { data, width, reads: Arc::clone(reads) }))
}

fn kept(rows: &Activations) -> Option<&Rows> {
    let rows: &dyn Any = &**rows.on_device()?;
    rows.downcast_ref()
}

/// Keeps queries, keys and values.
#[derive(Debug)]
struct Keeping {
    model: Arc<TinyModel>,
    refusals: Arc<Refusals>,
    reads_of_queries: Arc<AtomicUsize>,
    reads_of_keys: Arc<AtomicUsize>,
}

impl Backend for Keeping {
    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn memory_bytes(&self) -> u64 {
        self.model.memory_bytes()
    }

    fn embed(&self, tokens: &[u32]) -> Result<Activations, Error> {
        self.model.embed(tokens)
    }

    fn qkv(&self, layer: usize, x: &Activations, positions: &[u64]) -> Result<Qkv, Error> {
        self.model.qkv(layer, x, positions)
    }

    fn finish(&self, layer: usize, x: Activations, attention: &[f32]) -> Result<Activations, Error> {
        self.model.finish(layer, x, attention)
    }

    fn logits(&self, x: &Activations, rows: &[usize]) -> Result<Vec<f32>, Error> {
        self.model.logits(x, rows)
    }

    fn qkv_kept(&self, layer: usize, x: &Activations, positions: &[u64]) -> Result<KeptQkv, Error> {
        if refuses(&self.refusals, layer) {
            return Err(Error::Device { exhausted: true, source: "of this test".into() });
        }
        let (Qkv { q, k, v }, heads) = (self.model.qkv(layer, x, positions)?, self.config().heads);
        let (q_width, kv_width) = (heads.query_heads() * heads.head_dim, heads.kv_heads * heads.head_dim);
        Ok(KeptQkv {
            q: keep(q_width, q, &self.reads_of_queries),
            k: keep(kv_width, k, &self.reads_of_keys),
            v: keep(kv_width, v, &self.reads_of_keys),
        })
    }

    fn finish_kept(
        &self,
        layer: usize,
        x: Activations,
        attention: &Activations,
    ) -> Result<Activations, Error> {
        match kept(attention) {
            Some(rows) => self.model.finish(layer, x, &rows.data),
            None => self.model.finish(layer, x, attention.host()),
        }
    }
}

/// A layer whose queries, keys and values a device has no room for, and how many times.
type Refusals = Mutex<(usize, usize)>;

fn refuses(refusals: &Refusals, layer: usize) -> bool {
    let mut refusals = refusals.lock().expect("nobody panics with it");
    let refused = refusals.0 == layer && refusals.1 > 0;
    refusals.1 -= usize::from(refused);
    refused
}

/// Takes rows of [`Keeping`], and counts them.
#[derive(Debug)]
struct Beside {
    cpu: CpuExecutor,
    rows: AtomicUsize,
    /// Whether it makes pages, which are tiles here, by the versions that were promised.
    makes_pages: AtomicBool,
    pages: Mutex<HashMap<u64, Tile>>,
    /// Reads of keys and values when attention was asked for.
    reads_before: Mutex<Vec<usize>>,
    reads_of_keys: Arc<AtomicUsize>,
}

impl Beside {
    fn attend(
        &self,
        (shape, scale): (HeadShape, f32),
        part: &KeptPart<'_>,
        data: &[f32],
    ) -> Result<Vec<f32>, AttentionError> {
        let queries = Queries { shape, first_position: part.first_position, scale, data };
        self.rows.fetch_add(queries.rows(), Ordering::SeqCst);
        match part.visits {
            KeptVisits::All { kv, first_key, promised } => {
                let kv = &self.with_pages(kv, promised);
                let end = part.first_position + queries.rows() as u64;
                let block = |(tile, first_position): (usize, u64)| ExactBlock {
                    tile: tile as u32,
                    first_position,
                    len: (end - first_position).min(BLOCK as u64) as u32,
                };
                let exact = (first_key..end).step_by(BLOCK).enumerate().map(block).collect();
                let work = WorkList { exact, ..WorkList::default() };
                let items = [AttendItem { queries, kv, work: &work, initial: None }];
                Ok(self.cpu.attend(&items)?.remove(0).finish())
            }
            KeptVisits::By { policy, input, .. } => {
                assert!(input.queries.data.is_empty(), "the queries are where they were left");
                let mut input = *input;
                input.queries = queries;
                Ok(attend_by_lists(&self.cpu, policy, &input)?.finish())
            }
        }
    }
}

impl Beside {
    /// The tiles, the last of them those that were promised: these are not looked at on the host.
    fn with_pages(&self, kv: &dyn PagedKv, promised: &[Promise]) -> Tiles {
        let written = (0..kv.len() - promised.len()).map(|tile| kv.tile(tile).clone());
        let pages = self.pages.lock().expect("nobody panics with it");
        let tiles = written.chain(promised.iter().map(|promise| pages[&promise.version()].clone()));
        Tiles { shape: kv.shape(), tiles: tiles.collect() }
    }
}

impl KeptAttention for Beside {
    fn append_kept(
        &self,
        k: &Activations,
        v: &Activations,
        parts: &[KeptAppend<'_>],
    ) -> Result<bool, AttentionError> {
        if !self.makes_pages.load(Ordering::SeqCst) {
            return Ok(false);
        }
        let (k, v) = (kept(k).expect("it keeps keys"), kept(v).expect("and values"));
        for part in parts {
            let (mut token, width) = (part.offset, k.width);
            assert_eq!(part.tiles.len(), part.promised.len());
            for (block, (tile, promise)) in part.tiles.iter().zip(part.promised).enumerate() {
                let (mut page, done) = ((*tile).clone(), token - part.offset);
                let count = ((block + 1) * BLOCK - token).min(part.rows.len() - done);
                let rows = (part.rows.start + done) * width..(part.rows.start + done + count) * width;
                page.write(token % BLOCK, &k.data[rows.clone()], &v.data[rows])?;
                self.pages.lock().expect("nobody panics with it").insert(promise.version(), page);
                token += count;
            }
            assert_eq!(token - part.offset, part.rows.len(), "all rows have a tile");
        }
        Ok(true)
    }

    fn attend_kept(
        &self,
        shape: (HeadShape, f32),
        q: &Activations,
        parts: &[KeptPart<'_>],
    ) -> Result<Option<Activations>, AttentionError> {
        let Some(rows) = kept(q) else { return Ok(None) };
        self.reads_before
            .lock()
            .expect("nobody panics with it")
            .push(self.reads_of_keys.load(Ordering::SeqCst));
        let mut output = Vec::new();
        for part in parts {
            let data = &rows.data[part.rows.start * rows.width..part.rows.end * rows.width];
            output.extend(self.attend(shape, part, data)?);
        }
        Ok(Some(keep(rows.width, output, &rows.reads)))
    }
}

/// An engine whose backend keeps its rows, and what is counted of it.
struct Device {
    engine: Engine,
    beside: Arc<Beside>,
    refusals: Arc<Refusals>,
    reads_of_queries: Arc<AtomicUsize>,
    reads_of_keys: Arc<AtomicUsize>,
}

impl Device {
    fn new(world: &World) -> Self {
        let reads = [(); 2].map(|()| Arc::new(AtomicUsize::new(0)));
        let [reads_of_queries, reads_of_keys] = reads.clone();
        let refusals = Arc::new(Refusals::default());
        let (model, own) = (Arc::clone(&world.cluster.model), Arc::clone(&refusals));
        let backend = Keeping { model, refusals: own, reads_of_queries, reads_of_keys };
        let beside = Arc::new(Beside {
            cpu: CpuExecutor::serial(),
            rows: AtomicUsize::new(0),
            makes_pages: AtomicBool::new(false),
            pages: Mutex::default(),
            reads_before: Mutex::default(),
            reads_of_keys: Arc::clone(&reads[1]),
        });
        let like = &world.cluster.engine;
        let executor = Arc::new(CpuExecutor::serial());
        let pool = ComputePool::serial();
        let engine = Engine::new(Arc::new(backend), executor, pool, like.geometry(), *like.options());
        let engine =
            engine.expect("the model is the same").with_kept(Arc::clone(&beside) as Arc<dyn KeptAttention>);
        let [reads_of_queries, reads_of_keys] = reads;
        Self { engine, beside, refusals, reads_of_queries, reads_of_keys }
    }

    /// Rows that the executor took, and reads of queries and of keys or values since.
    fn counts(&self) -> [usize; 3] {
        [&self.beside.rows, &*self.reads_of_queries, &*self.reads_of_keys]
            .map(|count| count.swap(0, Ordering::SeqCst))
    }
}

fn step(
    engine: &Engine,
    sequences: &mut [(Sequence, &[u32])],
    observer: &mut dyn StepObserver,
) -> Vec<Vec<f32>> {
    let inputs = sequences.iter_mut();
    let mut batch: Vec<StepInput<'_>> =
        inputs.map(|(sequence, tokens)| StepInput { sequence, tokens, logits: Logits::Last }).collect();
    let outputs = engine.step(&CallContext::new("test"), &mut batch, observer).expect("the step runs");
    let logits =
        |output: Result<Option<RowLogits>, _>| output.expect("nothing fails").expect("wanted").into_all();
    outputs.into_iter().map(logits).collect()
}

#[track_caller]
fn assert_near(found: &[f32], wanted: &[f32]) {
    let near = |(f, w): (&f32, &f32)| (f - w).abs() <= 1e-4 * (1.0 + w.abs());
    assert!(found.len() == wanted.len() && found.iter().zip(wanted).all(near), "{found:?} {wanted:?}");
}

/// Layers of the model.
const LAYERS: usize = 3;

#[test]
fn queries_of_exact_rows_never_come_to_the_host() {
    let world = World::new(0, KvDtype::F32);
    let device = Device::new(&world);
    let prompts = [tokens(3, 70), tokens(4, 41)];
    let wanted = prompts.each_ref().map(|prompt| world.reference(prompt).1);
    // One sequence in chunks, then two together; of the last layer only the rows whose logits are wanted.
    let mut sequence = world.empty();
    for part in prompts[0].chunks(30) {
        let mut one = [(sequence, part)];
        let logits = step(&device.engine, &mut one, &mut ());
        [(sequence, _)] = one;
        assert_eq!(device.counts(), [2 * part.len() + 1, 0, 2 * LAYERS]);
        if sequence.position() == 70 {
            assert_near(&logits[0], &wanted[0]);
        }
    }
    let mut both = prompts.each_ref().map(|prompt| (world.empty(), &prompt[..]));
    for (found, wanted) in step(&device.engine, &mut both, &mut ()).iter().zip(&wanted) {
        assert_near(found, wanted);
    }
    assert_eq!(device.counts(), [2 * (70 + 41) + 2, 0, 2 * LAYERS]);
}

/// Looks at lists.
struct Looks(usize);

impl StepObserver for Looks {
    fn layer_done(&mut self, _: usize, _: &[StepInput<'_>]) -> Result<(), longshore_engine::Error> {
        Ok(())
    }

    fn probes(&self) -> bool {
        true
    }

    fn probe(&mut self, _: &AttentionProbe<'_>) {
        self.0 += 1;
    }
}

#[test]
fn rows_by_a_policy_stay_unless_somebody_looks_at_lists() {
    let text =
        "blocks:scorer=row-normalised,selector=top-k,k=1,sink=0,local=0,dense_layers=1,min_positions=64";
    let policy = Arc::new(PrefillPolicy::parse(text, None).expect("a policy"));
    let world = World::new(0, KvDtype::F32);
    let device = Device::new(&world);
    let prompt = tokens(5, 160);
    let sparse = || {
        let mut sequence = world.empty();
        sequence.set_prefill(Arc::clone(&policy), 160).expect("stripes are small");
        sequence
    };
    let wanted = step(&world.cluster.engine, &mut [(sparse(), &prompt[..])], &mut ());
    let found = step(&device.engine, &mut [(sparse(), &prompt[..])], &mut ());
    assert_near(&found[0], &wanted[0]);
    assert_eq!(device.counts(), [2 * 160 + 1, 0, 2 * LAYERS]);
    let mut looks = Looks(0);
    let found = step(&device.engine, &mut [(sparse(), &prompt[..])], &mut looks);
    assert_near(&found[0], &wanted[0]);
    assert_eq!((looks.0, device.counts()), (LAYERS, [0, LAYERS, 2 * LAYERS]));
}

#[test]
fn queries_to_shards_travel() {
    let world = World::new(2, KvDtype::F32);
    let device = Device::new(&world);
    let prompt = tokens(6, 9 * BLOCK + 5);
    world.store(&prompt);
    let (_, wanted) = world.reference(&prompt);
    let opened = world.open(&prompt[..4 * BLOCK]);
    let found = step(&device.engine, &mut [(opened, &prompt[4 * BLOCK..])], &mut ());
    assert_near(&found[0], &wanted);
    assert_eq!(device.counts(), [0, LAYERS, 2 * LAYERS]);
    // Beside a sequence with blocks on shards all go the way of the host.
    let mut both = [(world.open(&prompt[..4 * BLOCK]), &prompt[4 * BLOCK..]), (world.empty(), &prompt[..])];
    for found in step(&device.engine, &mut both, &mut ()) {
        assert_near(&found, &wanted);
    }
    assert_eq!(device.counts(), [0, LAYERS, 2 * LAYERS]);
}

/// Notes layers.
#[derive(Default)]
struct Notes(Vec<usize>);

impl StepObserver for Notes {
    fn layer_done(&mut self, layer: usize, _: &[StepInput<'_>]) -> Result<(), longshore_engine::Error> {
        self.0.push(layer);
        Ok(())
    }
}

#[test]
fn tiles_follow_a_layer_behind_where_pages_are_made_of_rows() {
    let world = World::new(0, KvDtype::F32);
    let device = Device::new(&world);
    device.beside.makes_pages.store(true, Ordering::SeqCst);
    let prompts = [tokens(3, 70), tokens(4, 41)];
    let wanted = prompts.each_ref().map(|prompt| world.reference(prompt));
    let (mut sequence, mut notes) = (world.empty(), Notes::default());
    for part in prompts[0].chunks(30) {
        let mut one = [(sequence, part)];
        let logits = step(&device.engine, &mut one, &mut notes);
        [(sequence, _)] = one;
        // Of the layer before nothing was read when attention was queued.
        assert_eq!(
            std::mem::take(&mut *device.beside.reads_before.lock().expect("nobody panics with it")),
            [0, 0, 2]
        );
        assert_eq!(device.counts(), [2 * part.len() + 1, 0, 2 * LAYERS]);
        if sequence.position() == 70 {
            assert_near(&logits[0], &wanted[0].1);
        }
    }
    assert_eq!(notes.0, [0, 1, 2].repeat(3));
    // The tiles of full blocks have what the last pages have that were promised for them.
    let pages = device.beside.pages.lock().expect("nobody panics with it");
    for (place, body) in support::tiles(&sequence, 0) {
        assert!(pages.values().any(|page| page.as_bytes() == body), "{place:?}");
    }
    drop(pages);
    let mut both = prompts.each_ref().map(|prompt| (world.empty(), &prompt[..]));
    for (found, wanted) in step(&device.engine, &mut both, &mut ()).iter().zip(&wanted) {
        assert_near(found, &wanted.1);
    }
}

#[test]
fn layers_that_are_behind_make_room_for_the_next() {
    let world = World::new(0, KvDtype::F32);
    let device = Device::new(&world);
    device.beside.makes_pages.store(true, Ordering::SeqCst);
    let prompt = tokens(3, 70);
    let (_, wanted) = world.reference(&prompt);
    let refuse = |layer: usize, times: usize| {
        *device.refusals.lock().expect("nobody panics with it") = (layer, times);
    };
    refuse(1, 1);
    let (mut one, mut notes) = ([(world.empty(), &prompt[..])], Notes::default());
    assert_near(&step(&device.engine, &mut one, &mut notes)[0], &wanted);
    // The first layer was settled before the second was attended to, the second after the third was.
    let reads = std::mem::take(&mut *device.beside.reads_before.lock().expect("nobody panics with it"));
    assert_eq!((reads, notes.0), (vec![0, 2, 2], vec![0, 1, 2]));
    // Where nothing is behind, or the room is still too small, it is told.
    for (layer, times, told) in [(0, 1, vec![]), (1, 2, vec![0]), (2, 2, vec![0, 1])] {
        refuse(layer, times);
        let (mut sequence, mut notes) = (world.empty(), Notes::default());
        let mut batch = [StepInput { sequence: &mut sequence, tokens: &prompt, logits: Logits::Last }];
        let outcome = device.engine.step(&CallContext::new("test"), &mut batch, &mut notes);
        let error = outcome.expect_err("there is no room");
        assert_eq!((error.kind(), notes.0), (Code::ResourceExhausted, told), "{error}");
        assert!(!refuses(&device.refusals, layer), "it is tried once more, not more often");
    }
}

#[test]
fn what_needs_tiles_has_them_first() {
    let world = World::new(2, KvDtype::F32);
    let device = Device::new(&world);
    device.beside.makes_pages.store(true, Ordering::SeqCst);
    let prompt = tokens(6, 9 * BLOCK + 5);
    world.store(&prompt);
    let (_, wanted) = world.reference(&prompt);
    // Blocks on shards.
    let opened = world.open(&prompt[..4 * BLOCK]);
    let found = step(&device.engine, &mut [(opened, &prompt[4 * BLOCK..])], &mut ());
    assert_near(&found[0], &wanted);
    assert_eq!(device.counts(), [0, LAYERS, 2 * LAYERS]);
    // Somebody who looks at lists, and a policy.
    let text =
        "blocks:scorer=row-normalised,selector=top-k,k=1,sink=0,local=0,dense_layers=1,min_positions=64";
    let policy = Arc::new(PrefillPolicy::parse(text, None).expect("a policy"));
    let sparse = || {
        let mut sequence = world.empty();
        sequence.set_prefill(Arc::clone(&policy), prompt.len() as u64).expect("stripes are small");
        sequence
    };
    let wanted = step(&world.cluster.engine, &mut [(sparse(), &prompt[..])], &mut ());
    device.beside.reads_before.lock().expect("nobody panics with it").clear();
    assert_near(&step(&device.engine, &mut [(sparse(), &prompt[..])], &mut ())[0], &wanted[0]);
    assert_eq!(
        *device.beside.reads_before.lock().expect("nobody panics with it"),
        [2, 4, 6],
        "means are made of tiles"
    );
    let mut looks = Looks(0);
    assert_near(&step(&device.engine, &mut [(sparse(), &prompt[..])], &mut looks)[0], &wanted[0]);
    assert_eq!(looks.0, LAYERS);
}
