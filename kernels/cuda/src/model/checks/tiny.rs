//! Whole passes of tiny random models against the CPU backend, with attention by the CPU executor.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use longshore_attention::{CpuExecutor, KvDtype};
use longshore_compute::ComputePool;
use longshore_model::testing::{StoredType, TinyArchitecture, TinyOptions, tiny_gguf};
use longshore_model::{
    Activations, Backend, CpuBackend, CpuOptions, Error, Linear, LoadedModel, RopeScaling, RowLogits,
    WantedRow,
};

use super::{case, distance, wide};
use crate::Device;
use crate::model::backend::CudaBackend;
use crate::model::load::ModelOptions;
use crate::model::programs::Precision;
use crate::selftest::{Case, Walk, likeliest};

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
pub(crate) fn open(options: &TinyOptions) -> Result<LoadedModel, Error> {
    open_bytes(&tiny_gguf(options).bytes())
}

/// The same of the bytes of a file.
pub(crate) fn open_bytes(bytes: &[u8]) -> Result<LoadedModel, Error> {
    static FILES: AtomicU64 = AtomicU64::new(0);
    let name =
        format!("longshore-selftest-{}-{}.gguf", std::process::id(), FILES.fetch_add(1, Ordering::Relaxed));
    let path: PathBuf = std::env::temp_dir().join(name);
    let opened = match std::fs::write(&path, bytes) {
        Ok(()) => LoadedModel::open(&path, &|_| ()),
        Err(source) => Err(Error::Io { path: path.clone(), source }),
    };
    // The file stays mapped; if it stays on disk too, it is small.
    let _ = std::fs::remove_file(&path);
    opened
}

pub(crate) fn backend(
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
    let (executor, kv) = (CpuExecutor::serial(), (KvDtype::F32, FIRST_POSITION));
    let (mut expected, mut found) = (Walk::new(&cpu, &executor, kv), Walk::new(&cuda, &executor, kv));
    let vocabulary = cpu.config().vocabulary;
    let mut tokens: Vec<u32> = (0..PROMPT).map(|i| (i * 37 % vocabulary) as u32).collect();
    let (mut all, mut all_expected, mut differ) = (Vec::new(), Vec::new(), 0.0);
    for step in 0..=GENERATED {
        let x = found.append(&tokens)?;
        let rows: Vec<usize> = (0..tokens.len()).collect();
        let (a, b) = (cuda.logits(&x, &rows)?, expected.logits(&tokens)?);
        let [own, next] = [&a, &b].map(|logits| likeliest(&logits[logits.len() - vocabulary..]));
        if precision == Precision::F32 && own != next {
            return Ok(f64::INFINITY);
        }
        if step == 0 {
            differ += likeliest_differ(&cuda, &x, own)?;
        }
        tokens = vec![next];
        all.extend(a);
        all_expected.extend(wide(&b));
    }
    Ok(differ + distance(&all, &all_expected))
}

/// Whether the device chooses another token than its logits say: 0, or infinity.
fn likeliest_differ(cuda: &CudaBackend, x: &Activations, token: u32) -> Result<f64, Error> {
    let wanted = WantedRow { row: x.rows() - 1, candidates: Some(4) };
    let chosen = cuda.candidates(x, &[wanted])?;
    let same = matches!(&chosen[..], [RowLogits::Likeliest(chosen)] if chosen.best[0].0 == token);
    Ok(if same { 0.0 } else { f64::INFINITY })
}
