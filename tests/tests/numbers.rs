//! Our numbers against a float64 NumPy forward pass over the same weights (`tests/reference/forward.py`, which shares no code
//! with ours): residual streams, logits and greedy tokens of real text. The model and the attention primitive are driven
//! directly, by a plain loop over the layers.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test's functions may fail and report like its body"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

use longshore_attention::{
    AttendItem, CpuExecutor, ExactBlock, Executor as _, KvDtype, Partials, Queries, Tile, TileShape, Tiles,
    WorkList,
};
use longshore_compute::{ComputePool, PoolOptions};
use longshore_model::testing::{StoredType, TinyArchitecture, TinyOptions, write_tiny_gguf};
use longshore_model::{
    Backend as _, CpuBackend, CpuOptions, Linear, LoadedModel, ModelInfo, Sampler, SamplerParams,
};
use longshore_tests::server::{model, python};

const GENERATED: usize = 16;
const BLOCK_TOKENS: usize = 64;
/// Smaller than the real one, so that 600 tokens already need merges.
const STRIPE_BLOCKS: usize = 4;

/// One sequence, computed by a plain loop.
struct Sequence<'a> {
    backend: &'a CpuBackend,
    tokens: usize,
    layers: Vec<Tiles>,
}

impl<'a> Sequence<'a> {
    fn new(backend: &'a CpuBackend, dtype: KvDtype) -> Self {
        let config = backend.config();
        let (kv_heads, head_dim) = (config.heads.kv_heads, config.heads.head_dim);
        let shape = TileShape { block_tokens: BLOCK_TOKENS, kv_heads, head_dim, dtype };
        let layers = (0..config.layers).map(|_| Tiles { shape, tiles: Vec::new() }).collect();
        Self { backend, tokens: 0, layers }
    }

    /// Appends tokens; returns their residual stream after the last layer and their logits.
    fn append(&mut self, tokens: &[u32]) -> (Vec<f32>, Vec<f32>) {
        let first = self.tokens;
        self.tokens += tokens.len();
        let positions: Vec<u64> = (first as u64..self.tokens as u64).collect();
        let mut x = self.backend.embed(tokens).unwrap();
        for layer in 0..self.layers.len() {
            let qkv = self.backend.qkv(layer, &x, &positions).unwrap();
            write_rows(&mut self.layers[layer], first, &qkv.k, &qkv.v);
            let attention = self.attend(layer, first, &qkv.q);
            x = self.backend.finish(layer, x, &attention).unwrap();
        }
        let rows: Vec<usize> = (0..tokens.len()).collect();
        let logits = self.backend.logits(&x, &rows).unwrap();
        (x.host().to_vec(), logits)
    }

    /// Attention of rows from position `first` on over everything written: a partial per stripe, merged in order.
    fn attend(&self, layer: usize, first: usize, q: &[f32]) -> Vec<f32> {
        let config = self.backend.config();
        let kv = &self.layers[layer];
        let scale = config.attention_scale();
        let queries = Queries { shape: config.heads, first_position: first as u64, scale, data: q };
        let blocks: Vec<ExactBlock> = (0..kv.tiles.len())
            .map(|tile| ExactBlock {
                tile: tile as u32,
                first_position: (tile * BLOCK_TOKENS) as u64,
                len: (self.tokens - tile * BLOCK_TOKENS).min(BLOCK_TOKENS) as u32,
            })
            .collect();
        let mut whole = Partials::identity(queries.rows(), config.heads.query_heads(), config.heads.head_dim);
        for stripe in blocks.chunks(STRIPE_BLOCKS) {
            let work = WorkList { exact: stripe.to_vec(), ..WorkList::default() };
            let partials = CpuExecutor::serial()
                .attend(&[AttendItem { queries, kv, work: &work, initial: None }])
                .unwrap();
            whole.merge(&partials[0]).unwrap();
        }
        whole.finish()
    }
}

/// Writes rows from position `first` on into their tiles.
fn write_rows(kv: &mut Tiles, mut first: usize, k: &[f32], v: &[f32]) {
    let width = kv.shape.kv_heads * kv.shape.head_dim;
    let (mut k, mut v) = (k, v);
    while !k.is_empty() {
        let offset = first % BLOCK_TOKENS;
        if offset == 0 {
            kv.tiles.push(Tile::zeroed(kv.shape));
        }
        let elements = ((BLOCK_TOKENS - offset) * width).min(k.len());
        kv.tiles[first / BLOCK_TOKENS].write(offset, &k[..elements], &v[..elements]).unwrap();
        (k, v) = (&k[elements..], &v[elements..]);
        first += elements / width;
    }
}

/// Greedy tokens after `logits` of the last prompt token.
fn generate(sequence: &mut Sequence<'_>, mut logits: Vec<f32>) -> Vec<u32> {
    let sampler = Sampler::new(SamplerParams::greedy()).unwrap();
    let mut tokens = Vec::new();
    while tokens.len() < GENERATED {
        tokens.push(sampler.sample(&logits, tokens.len() as u64).unwrap().token);
        if tokens.len() < GENERATED {
            logits = sequence.append(&tokens[tokens.len() - 1..]).1;
        }
    }
    tokens
}

/// What the reference says of one prompt.
struct Expected {
    name: String,
    prompt: Vec<u32>,
    hidden: Vec<f32>,
    logits: Vec<f32>,
    generated: Vec<u32>,
}

fn reference_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("reference")
}

/// Runs the reference over a file of prompts, and lets it go on with so many greedy tokens.
fn reference(model: &Path, prompts: &Path, generated: usize) -> Vec<Expected> {
    let out = tempfile::tempdir().unwrap();
    let mut command = Command::new(python());
    command
        .arg(reference_folder().join("forward.py"))
        .arg(model)
        .arg("--prompts")
        .arg(prompts)
        .arg("--out")
        .arg(out.path());
    command.args(["--generate", &generated.to_string()]);
    let output = command.output().unwrap_or_else(|error| panic!("cannot start `{}`: {error}", python()));
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "the reference failed; hint: it needs Python with numpy and gguf, which `tests/run` provisions \
         (LONGSHORE_TEST_PYTHON is `{}`)\n{complaint}",
        python()
    );
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
    };
    let json =
        |path: &Path| -> serde_json::Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    let prompts = json(prompts);
    let of = |(name, prompt): (&String, &serde_json::Value)| Expected {
        name: name.clone(),
        prompt: ids(prompt),
        hidden: read_npy(&out.path().join(format!("{name}.hidden.npy"))),
        logits: read_npy(&out.path().join(format!("{name}.logits.npy"))),
        generated: ids(&json(&out.path().join(format!("{name}.json")))["tokens"]),
    };
    prompts.as_object().unwrap().iter().map(of).collect()
}

/// Elements of a little-endian f32 NumPy array.
fn read_npy(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00", "{}", path.display());
    let header = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let text = String::from_utf8_lossy(&bytes[10..header]);
    assert!(text.contains("'descr': '<f4', 'fortran_order': False"), "{text}");
    bytes[header..].as_chunks().0.iter().map(|element| f32::from_le_bytes(*element)).collect()
}

/// How far rows are from the reference: relative L2 distances, and the largest error of any element.
struct Distance {
    worst_row: f64,
    mean: f64,
    last: f64,
    max_error: f64,
}

impl std::fmt::Display for Distance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { worst_row, mean, last, max_error } = self;
        write!(
            f,
            "relative L2 worst {worst_row:.2e}, mean {mean:.2e}, last {last:.2e}; max error {max_error:.2e}"
        )
    }
}

fn distance(found: &[f32], expected: &[f32], width: usize) -> Distance {
    assert_eq!(found.len(), expected.len());
    let square = |x: f64| x * x;
    let row = |(found, expected): (&[f32], &[f32])| {
        let error: f64 = found.iter().zip(expected).map(|(f, e)| square(f64::from(*f) - f64::from(*e))).sum();
        let norm: f64 = expected.iter().map(|e| square(f64::from(*e))).sum();
        (error / norm).sqrt()
    };
    let rows: Vec<f64> = found.chunks(width).zip(expected.chunks(width)).map(row).collect();
    // Unlike `f64::max`, a comparison that must hold lets no NaN through.
    assert!(rows.iter().all(|row| row.is_finite()), "rows are not finite");
    let errors = found.iter().zip(expected).map(|(f, e)| (f64::from(*f) - f64::from(*e)).abs());
    Distance {
        worst_row: rows.iter().copied().fold(0.0, f64::max),
        mean: rows.iter().sum::<f64>() / rows.len() as f64,
        last: rows[rows.len() - 1],
        max_error: errors.fold(0.0, f64::max),
    }
}

/// Compares all rows of all prompts; `limit` bounds the relative L2 distance of every row.
fn compare(backend: &CpuBackend, expected: &[Expected], dtype: KvDtype, limit: f64) {
    let config = backend.config();
    for Expected { name, prompt, hidden, logits, generated } in expected {
        let mut sequence = Sequence::new(backend, dtype);
        let (found_hidden, found_logits) = sequence.append(prompt);
        let of_hidden = distance(&found_hidden, hidden, config.hidden);
        let of_logits = distance(&found_logits, logits, config.vocabulary);
        let what = format!("{name}, {} tokens, {} KV", prompt.len(), dtype.name());
        let report = format!("{what}: hidden states {of_hidden}\n{what}: logits {of_logits}");
        println!("{report}");
        assert!(
            of_hidden.worst_row < limit && of_logits.worst_row < limit,
            "a row is off by over {limit}\n{report}"
        );
        if dtype == KvDtype::F32 {
            let last = found_logits[found_logits.len() - config.vocabulary..].to_vec();
            assert_eq!(generate(&mut sequence, last), *generated, "{name}: greedy tokens");
        }
    }
}

fn backend(model: &Path, linear: Linear) -> CpuBackend {
    let LoadedModel { info, weights } = LoadedModel::open(model, &|_| ()).unwrap();
    let pool = ComputePool::new(&PoolOptions::default()).unwrap();
    let expected = CpuBackend::expected_bytes(&info.config, &weights, linear).unwrap();
    let backend = CpuBackend::new(info.config, &weights, CpuOptions { pool, linear }, &|_| ()).unwrap();
    assert_eq!(backend.memory_bytes(), expected, "what is checked before packing is what packing takes");
    backend
}

/// ln of the probabilities of one row of logits.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let wide = |x: &f32| f64::from(*x);
    let top = logits.iter().map(wide).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| (wide(x) - top).exp()).sum();
    logits.iter().map(|x| wide(x) - top - sum.ln()).collect()
}

/// How far predictions are apart.
struct Divergence {
    /// Mean and worst Kullback–Leibler divergence of a row from the reference, nats.
    mean: f64,
    worst: f64,
    /// Perplexity of the prompt over that of the reference.
    perplexity: f64,
}

fn divergence(found: &[f32], expected: &[f32], prompt: &[u32], vocabulary: usize) -> Divergence {
    let (mut kls, mut surprise) = (Vec::new(), 0.0);
    let rows = found.chunks(vocabulary).zip(expected.chunks(vocabulary)).enumerate();
    for (row, (found, expected)) in rows {
        let (q, p) = (log_softmax(found), log_softmax(expected));
        kls.push(p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>());
        if let Some(next) = prompt.get(row + 1) {
            surprise += p[*next as usize] - q[*next as usize];
        }
    }
    assert!(kls.iter().all(|kl| kl.is_finite()), "rows are not finite");
    Divergence {
        mean: kls.iter().sum::<f64>() / kls.len() as f64,
        worst: kls.iter().copied().fold(0.0, f64::max),
        perplexity: (surprise / (prompt.len() - 1) as f64).exp(),
    }
}

/// The default of quantised files: weights as they are, activations rounded to 8 bits.
#[test]
fn int8_activations_stay_close_to_float64() {
    let path = model();
    let expected = reference(&path, &reference_folder().join("prompts.json"), 0);
    let backend = backend(&path, Linear::Auto);
    let vocabulary = backend.config().vocabulary;
    // bf16 has 8 bits of mantissa, and int8 rounds K and V once more: they bring an error of their own.
    for (dtype, limit) in
        [(KvDtype::F32, 2e-2), (KvDtype::F16, 2e-2), (KvDtype::Bf16, 2.6e-2), (KvDtype::Int8, 3.7e-2)]
    {
        // Over one short prompt a perplexity says little.
        let (mut surprise, mut predictions) = (0.0, 0.0);
        for Expected { name, prompt, logits, .. } in &expected {
            let (_, found) = Sequence::new(&backend, dtype).append(prompt);
            let whole = distance(&found, logits, found.len()).last;
            let rows = distance(&found, logits, vocabulary);
            let Divergence { mean, worst, perplexity } = divergence(&found, logits, prompt, vocabulary);
            let report = format!(
                "{name}, {} KV: logits {whole:.2e} as a whole, {rows}; KL mean {mean:.2e}, worst {worst:.2e}; \
                 perplexity x {perplexity:.5}",
                dtype.name()
            );
            println!("{report}");
            assert!(whole < limit && mean < 0.01, "{report}");
            surprise += perplexity.ln() * (prompt.len() - 1) as f64;
            predictions += (prompt.len() - 1) as f64;
        }
        let perplexity = f64::exp(surprise / predictions);
        println!("{} KV: perplexity of all prompts x {perplexity:.5}", dtype.name());
        assert!((perplexity - 1.0).abs() < 0.01, "{}: {perplexity}", dtype.name());
    }
}

#[test]
fn hidden_states_logits_and_greedy_tokens_agree_with_float64() {
    let path = model();
    let expected = reference(&path, &reference_folder().join("prompts.json"), GENERATED);
    let lengths: Vec<usize> = expected.iter().map(|expected| expected.prompt.len()).collect();
    assert_eq!(lengths, [20, 197, 600], "prompts of the reference");
    let backend = backend(&path, Linear::F32);
    compare(&backend, &expected, KvDtype::F32, 1e-3);
    compare(&backend, &expected, KvDtype::F16, 1e-2);
}

/// Biases, norms of heads, both pairings of the rotation, tied and untied outputs, heads wider together than the stream.
#[test]
fn every_architecture_agrees_with_float64() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("prompts.json");
    let tokens: Vec<u32> = (0..150).map(|i| (i * 71 + 5) % 260).collect();
    std::fs::write(&prompts, serde_json::json!({ "tokens": tokens }).to_string()).unwrap();
    for (architecture, tied_embeddings, stored) in [
        (TinyArchitecture::Llama, false, StoredType::F16),
        (TinyArchitecture::Qwen2, true, StoredType::Q8_0),
        (TinyArchitecture::Qwen3, false, StoredType::F32),
    ] {
        let path = folder.path().join(format!("{}.gguf", architecture.name()));
        let options =
            TinyOptions { architecture, tied_embeddings, stored, query_heads: 6, ..TinyOptions::default() };
        write_tiny_gguf(&path, &options).unwrap();
        println!("{options:?}");
        compare(&backend(&path, Linear::F32), &reference(&path, &prompts, GENERATED), KvDtype::F32, 1e-4);
    }
}

/// Plans are found by the digest of the files: one that is shipped under a wrong digest would be for nobody.
#[test]
fn the_shipped_plan_is_for_the_default_model() {
    let info = ModelInfo::open(&model()).unwrap();
    let digest: String = info.digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let table = include_str!("../../services/longshore/src/head_plan.rs");
    assert!(table.contains(&digest), "no plan is shipped for {digest}");
}
