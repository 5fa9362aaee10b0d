//! Whole passes of tiny random models against the CPU backend, with attention by the CPU executor.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use longshore_attention::{
    AttendItem, CpuExecutor, ExactBlock, Executor as _, KvDtype, Queries, Tile, TileShape, Tiles, WorkList,
};
use longshore_compute::ComputePool;
use longshore_model::testing::{StoredType, TinyArchitecture, TinyOptions, write_tiny_gguf};
use longshore_model::{Backend, CpuBackend, CpuOptions, Error, Linear, LoadedModel, RopeScaling};

use super::{case, distance, wide};
use crate::Device;
use crate::model::backend::CudaBackend;
use crate::model::load::ModelOptions;
use crate::model::programs::Precision;
use crate::selftest::Case;

const BLOCK_TOKENS: usize = 16;
/// Rows of the prompt: more than go through `multiply_few`.
const PROMPT: usize = 37;
const GENERATED: usize = 6;
/// Position of the first token: RoPE must be exact far out.
const FIRST_POSITION: u64 = (1 << 31) - 48;

/// Heads that do not fill a warp, and a rest in every dimension of every matrix.
fn odd(architecture: TinyArchitecture, tied_embeddings: bool) -> TinyOptions {
    TinyOptions {
        architecture,
        hidden: 72,
        query_heads: 6,
        kv_heads: 2,
        head_dim: 20,
        ffn: 100,
        tied_embeddings,
        ..TinyOptions::default()
    }
}

fn even(architecture: TinyArchitecture, stored: StoredType) -> TinyOptions {
    TinyOptions { architecture, stored, ..TinyOptions::default() }
}

fn scalings() -> Vec<RopeScaling> {
    vec![
        RopeScaling::Linear { factor: 4.0 },
        RopeScaling::Ntk { factor: 4.0 },
        RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        },
        RopeScaling::Yarn {
            factor: 4.0,
            original_context: 4096,
            attention_factor: None,
            beta_fast: 32.0,
            beta_slow: 1.0,
        },
        RopeScaling::Factors((0..8).map(|i| 1.0 + i as f32).collect()),
    ]
}

pub(super) fn cases() -> Vec<Case> {
    use TinyArchitecture::{Llama, Qwen2, Qwen3};
    let mut cases = Vec::new();
    let mut add = |options: TinyOptions, precision: Precision, scaling: RopeScaling| {
        let shape =
            format!("{} of {}, {:?} weights", options.architecture.name(), options.hidden, options.stored);
        let rope = match scaling {
            RopeScaling::None => String::new(),
            ref scaled => format!(", {}", format!("{scaled:?}").split([' ', '(']).next().unwrap_or_default()),
        };
        let name = format!("{} pass, {shape}{rope}", precision.name());
        cases.push(case(name, precision.bound(), move |device| {
            pass(device, &options, precision, scaling.clone())
        }));
    };
    for (architecture, tied) in [(Llama, true), (Qwen2, false), (Qwen3, true)] {
        let stored = [StoredType::F32, StoredType::F16, StoredType::Bf16];
        for (precision, stored) in Precision::ALL.into_iter().zip(stored) {
            add(TinyOptions { stored, ..odd(architecture, tied) }, precision, RopeScaling::None);
        }
    }
    add(even(Llama, StoredType::F16), Precision::F16, RopeScaling::None);
    add(even(Qwen2, StoredType::Bf16), Precision::Bf16, RopeScaling::None);
    add(even(Qwen3, StoredType::Q8_0), Precision::F16, RopeScaling::None);
    add(even(Llama, StoredType::Q8_0), Precision::F32, RopeScaling::None);
    for scaling in scalings() {
        add(even(Llama, StoredType::F32), Precision::F32, scaling);
    }
    cases
}

/// A tiny model out of a file that is removed at once.
pub(super) fn open(options: &TinyOptions) -> Result<LoadedModel, Error> {
    static FILES: AtomicU64 = AtomicU64::new(0);
    let name =
        format!("longshore-selftest-{}-{}.gguf", std::process::id(), FILES.fetch_add(1, Ordering::Relaxed));
    let path: PathBuf = std::env::temp_dir().join(name);
    let opened = match write_tiny_gguf(&path, options) {
        Ok(()) => LoadedModel::open(&path, &|_| ()),
        Err(source) => Err(Error::Io { path: path.clone(), source }),
    };
    // The file stays mapped; if it stays on disk too, it is small.
    let _ = std::fs::remove_file(&path);
    opened
}

pub(super) fn backend(
    device: &Arc<dyn Device>,
    model: &LoadedModel,
    precision: Precision,
) -> Result<CudaBackend, Error> {
    let options = ModelOptions { precision: Some(precision), ..ModelOptions::new(ComputePool::serial()) };
    CudaBackend::load(Arc::clone(device), model.info.config.clone(), &model.weights, &options, &|_| ())
}

/// Distance of the logits of a prompt and of some generated tokens, all together; infinite where greedy tokens differ in f32.
fn pass(
    device: &Arc<dyn Device>,
    options: &TinyOptions,
    precision: Precision,
    scaling: RopeScaling,
) -> Result<f64, Error> {
    let mut model = open(options)?;
    model.info.config.rope.scaling = scaling;
    let config = model.info.config.clone();
    let cpu = CpuOptions { pool: ComputePool::serial(), linear: Linear::F32 };
    let cpu = CpuBackend::new(config, &model.weights, cpu, &|_| ())?;
    let cuda = backend(device, &model, precision)?;
    let (mut expected, mut found) = (Walk::new(&cpu), Walk::new(&cuda));
    let vocabulary = cpu.config().vocabulary;
    let mut tokens: Vec<u32> = (0..PROMPT).map(|i| (i * 37 % vocabulary) as u32).collect();
    let (mut all, mut all_expected, mut differ) = (Vec::new(), Vec::new(), 0.0);
    for step in 0..=GENERATED {
        let (a, b) = (found.append(&tokens)?, expected.append(&tokens)?);
        let [own, next] = [&a, &b].map(|logits| greedy(&logits[logits.len() - vocabulary..]));
        if precision == Precision::F32 && own != next {
            return Ok(f64::INFINITY);
        }
        if step == 0 {
            differ += likeliest_differ(&cuda, &found, own)?;
        }
        tokens = vec![next];
        all.extend(a);
        all_expected.extend(wide(&b));
    }
    Ok(differ + distance(&all, &all_expected))
}

fn greedy(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i)));
    best.map_or(0, |(token, _)| token as u32)
}

/// Whether the device chooses another token than its logits say: 0, or infinity.
fn likeliest_differ(cuda: &CudaBackend, walk: &Walk<'_>, token: u32) -> Result<f64, Error> {
    let x = walk.last.as_ref().expect("rows were appended");
    let chosen = cuda.likeliest(x, &[x.rows() - 1], 4)?;
    Ok(if chosen[0].best[0].0 == token { 0.0 } else { f64::INFINITY })
}

/// One sequence, computed by a plain loop over the layers.
struct Walk<'a> {
    backend: &'a dyn Backend,
    tokens: usize,
    layers: Vec<Tiles>,
    /// The residual stream of the last rows.
    last: Option<longshore_model::Activations>,
}

impl<'a> Walk<'a> {
    fn new(backend: &'a dyn Backend) -> Self {
        let config = backend.config();
        let (kv_heads, head_dim) = (config.heads.kv_heads, config.heads.head_dim);
        let shape = TileShape { block_tokens: BLOCK_TOKENS, kv_heads, head_dim, dtype: KvDtype::F32 };
        let layers = (0..config.layers).map(|_| Tiles { shape, tiles: Vec::new() }).collect();
        Self { backend, tokens: 0, layers, last: None }
    }

    /// Appends tokens; returns the logits of all of them.
    fn append(&mut self, tokens: &[u32]) -> Result<Vec<f32>, Error> {
        let first = self.tokens;
        self.tokens += tokens.len();
        let positions: Vec<u64> = (first..self.tokens).map(|token| FIRST_POSITION + token as u64).collect();
        let mut x = self.backend.embed(tokens)?;
        for layer in 0..self.layers.len() {
            let qkv = self.backend.qkv(layer, &x, &positions)?;
            let width = qkv.k.len() / tokens.len();
            for (row, (k, v)) in qkv.k.chunks_exact(width).zip(qkv.v.chunks_exact(width)).enumerate() {
                self.write(layer, first + row, k, v);
            }
            let attention = self.attend(layer, first, &qkv.q);
            x = self.backend.finish(layer, x, &attention)?;
        }
        let rows: Vec<usize> = (0..tokens.len()).collect();
        let logits = self.backend.logits(&x, &rows)?;
        self.last = Some(x);
        Ok(logits)
    }

    fn write(&mut self, layer: usize, token: usize, k: &[f32], v: &[f32]) {
        let kv = &mut self.layers[layer];
        if token == kv.tiles.len() * BLOCK_TOKENS {
            kv.tiles.push(Tile::zeroed(kv.shape));
        }
        kv.tiles[token / BLOCK_TOKENS].write(token % BLOCK_TOKENS, k, v).expect("a token of the tile");
    }

    fn attend(&self, layer: usize, first: usize, q: &[f32]) -> Vec<f32> {
        let config = self.backend.config();
        let kv = &self.layers[layer];
        let (first_position, scale) = (FIRST_POSITION + first as u64, config.attention_scale());
        let queries = Queries { shape: config.heads, first_position, scale, data: q };
        let block = |tile: usize| ExactBlock {
            tile: tile as u32,
            first_position: FIRST_POSITION + (tile * BLOCK_TOKENS) as u64,
            len: (self.tokens - tile * BLOCK_TOKENS).min(BLOCK_TOKENS) as u32,
        };
        let work = WorkList { exact: (0..kv.tiles.len()).map(block).collect(), ..WorkList::default() };
        let item = AttendItem { queries, kv, work: &work, initial: None };
        let partials = CpuExecutor::serial().attend(&[item]).expect("a list of the sequence");
        partials.into_iter().next().expect("a partial for the item").finish()
    }
}
