//! The backend against the plain formulas in f64, on tiny random models of every variant, and its independence of rows bit
//! for bit.

use std::cell::RefCell;
use std::collections::BTreeMap;

use longshore_attention::HeadShape;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::files::StoredMatrix;
use crate::{LayerWeight, Matrix, RopeConfig, RopeScaling, RopeStyle, TensorType, WeightName};

const SEED: u64 = 20;

/// Random weights, kept in f32.
#[derive(Debug)]
struct Tiny {
    config: ModelConfig,
    weights: BTreeMap<WeightName, Matrix>,
}

impl load::Source for Tiny {
    fn stored(&self, name: WeightName) -> Result<StoredMatrix<'_>, Error> {
        let Some(Matrix { rows, cols, data }) = self.weights.get(&name) else {
            return Err(invalid(&format!("{name:?}"), "is missing".to_owned()));
        };
        let bytes = data.iter().flat_map(|x| x.to_le_bytes()).collect();
        Ok(StoredMatrix { kind: TensorType::F32, rows: *rows, cols: *cols, bytes })
    }

    fn bytes(&self, name: WeightName) -> u64 {
        self.weights[&name].data.len() as u64 * 4
    }

    fn release(&self, name: WeightName) {
        assert!(self.weights.contains_key(&name));
    }

    fn not_finite(&self, name: WeightName) -> Error {
        invalid(&format!("{name:?}"), "is not finite".to_owned())
    }
}

/// What variants differ in.
#[derive(Debug, Clone, Copy)]
struct Variant {
    style: RopeStyle,
    tied: bool,
    bias: bool,
    norm: bool,
}

const PLAIN: Variant = Variant { style: RopeStyle::Interleaved, tied: true, bias: false, norm: false };
const VARIANTS: [Variant; 4] = [
    PLAIN,
    Variant { tied: false, ..PLAIN },
    Variant { style: RopeStyle::Halves, bias: true, ..PLAIN },
    Variant { style: RopeStyle::Halves, tied: false, norm: true, ..PLAIN },
];

impl Tiny {
    /// Two layers; no width is a multiple of a panel, and the heads together are wider than the residual stream.
    fn new(variant: Variant) -> Self {
        let config = ModelConfig {
            architecture: "llama".to_owned(),
            name: "tiny".to_owned(),
            layers: 2,
            hidden: 20,
            heads: HeadShape { kv_heads: 2, group: 2, head_dim: 6 },
            ffn: 37,
            vocabulary: 51,
            norm_eps: 1e-5,
            context_tokens: 1 << 22,
            rope: RopeConfig { style: variant.style, theta: 10_000.0, dim: 4, scaling: RopeScaling::None },
            tied_embeddings: variant.tied,
            qkv_bias: variant.bias,
            qk_norm: variant.norm,
        };
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        let (hidden, ffn, vocabulary) = (config.hidden, config.ffn, config.vocabulary);
        let mut weights = BTreeMap::new();
        let mut put = |name, rows, cols, centre: f32| {
            let data = (0..rows * cols).map(|_| centre + rng.random_range(-0.5..0.5)).collect();
            weights.insert(name, Matrix { rows, cols, data });
        };
        put(WeightName::Embedding, vocabulary, hidden, 0.0);
        put(WeightName::OutputNorm, 1, hidden, 1.0);
        if !variant.tied {
            put(WeightName::Output, vocabulary, hidden, 0.0);
        }
        for (layer, weight) in
            (0..2).flat_map(|l| LayerWeight::ALL.map(|w| (l, w))).filter(|(_, w)| w.used_by(&config))
        {
            let (rows, cols, centre) = match weight {
                LayerWeight::AttnNorm | LayerWeight::FfnNorm => (1, hidden, 1.0),
                LayerWeight::QNorm | LayerWeight::KNorm => (1, 6, 1.0),
                LayerWeight::QBias => (1, 24, 0.0),
                LayerWeight::KBias | LayerWeight::VBias => (1, 12, 0.0),
                LayerWeight::Q => (24, hidden, 0.0),
                LayerWeight::K | LayerWeight::V => (12, hidden, 0.0),
                LayerWeight::AttnOut => (hidden, 24, 0.0),
                LayerWeight::Gate | LayerWeight::Up => (ffn, hidden, 0.0),
                LayerWeight::Down => (hidden, ffn, 0.0),
            };
            put(WeightName::Layer(layer, weight), rows, cols, centre);
        }
        Self { config, weights }
    }

    fn backend(&self) -> CpuBackend {
        load::load(self.config.clone(), self, serial(), &|_| ()).unwrap()
    }

    fn wide(&self, name: WeightName) -> Vec<f64> {
        self.weights[&name].data.iter().copied().map(f64::from).collect()
    }

    fn layer(&self, weight: LayerWeight) -> Vec<f64> {
        self.wide(WeightName::Layer(1, weight))
    }

    /// q, k and v of one row in layer 1.
    fn qkv(&self, x: &[f64], position: u64) -> [Vec<f64>; 3] {
        let normed = norm(x, &self.layer(LayerWeight::AttnNorm));
        let project = |weight, bias| {
            let mut y = product(&self.layer(weight), &normed);
            if self.config.qkv_bias {
                y.iter_mut().zip(self.layer(bias)).for_each(|(y, b)| *y += b);
            }
            y
        };
        let shape = |y: Vec<f64>, weight| -> Vec<f64> {
            let head = |head: &[f64]| match self.config.qk_norm {
                true => rotated(&norm(head, &self.layer(weight)), position, self.config.rope.style),
                false => rotated(head, position, self.config.rope.style),
            };
            y.chunks(6).flat_map(head).collect()
        };
        [
            shape(project(LayerWeight::Q, LayerWeight::QBias), LayerWeight::QNorm),
            shape(project(LayerWeight::K, LayerWeight::KBias), LayerWeight::KNorm),
            project(LayerWeight::V, LayerWeight::VBias),
        ]
    }

    /// One row after layer 1.
    fn finish(&self, x: &[f64], attention: &[f64]) -> Vec<f64> {
        let x = sum(x, &product(&self.layer(LayerWeight::AttnOut), attention));
        let normed = norm(&x, &self.layer(LayerWeight::FfnNorm));
        let gate = product(&self.layer(LayerWeight::Gate), &normed);
        let up = product(&self.layer(LayerWeight::Up), &normed);
        let gated: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        sum(&x, &product(&self.layer(LayerWeight::Down), &gated))
    }

    fn logits(&self, x: &[f64]) -> Vec<f64> {
        let output = if self.config.tied_embeddings { WeightName::Embedding } else { WeightName::Output };
        product(&self.wide(output), &norm(x, &self.wide(WeightName::OutputNorm)))
    }
}

fn serial() -> CpuOptions {
    CpuOptions { pool: ComputePool::serial(), linear: Linear::Auto }
}

fn norm(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().zip(weight).map(|(x, w)| x / (mean + 1e-5).sqrt() * w).collect()
}

fn product(weights: &[f64], x: &[f64]) -> Vec<f64> {
    weights.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// A head of 6 of which 4 are rotated, with base 10,000: the pairs turn by 1 and 0.01 a position.
fn rotated(head: &[f64], position: u64, style: RopeStyle) -> Vec<f64> {
    let mut turned = head.to_vec();
    let pairs = match style {
        RopeStyle::Interleaved => [(0, 1), (2, 3)],
        RopeStyle::Halves => [(0, 2), (1, 3)],
    };
    for ((a, b), frequency) in pairs.into_iter().zip([1.0, 0.01]) {
        let (sin, cos) = (position as f64 * frequency).sin_cos();
        turned[a] = head[a] * cos - head[b] * sin;
        turned[b] = head[a] * sin + head[b] * cos;
    }
    turned
}

fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

#[track_caller]
fn check_close(found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*found) - expected).abs();
        assert!(
            error < 2e-5 * (1.0 + expected.abs()),
            "seed {SEED}, {what}[{i}]: {found} must be {expected}"
        );
    }
}

#[test]
fn every_variant_agrees_with_the_formulas() {
    for variant in VARIANTS {
        let model = Tiny::new(variant);
        let backend = model.backend();
        let positions = [0, 3, 70_001, 3_000_000];
        let x = Activations::from_host(20, random(80, 1));
        let attention = random(4 * 24, 2);
        let qkv = backend.qkv(1, &x, &positions).unwrap();
        let finished = backend.finish(1, x.clone(), &attention).unwrap();
        let logits = backend.logits(&x, &[3, 1]).unwrap();
        for (r, position) in positions.into_iter().enumerate() {
            let row = wide(&x.host()[r * 20..][..20]);
            let [q, k, v] = model.qkv(&row, position);
            check_close(&qkv.q[r * 24..][..24], &q, &format!("{variant:?} q of row {r}"));
            check_close(&qkv.k[r * 12..][..12], &k, &format!("{variant:?} k of row {r}"));
            check_close(&qkv.v[r * 12..][..12], &v, &format!("{variant:?} v of row {r}"));
            let expected = model.finish(&row, &wide(&attention[r * 24..][..24]));
            check_close(
                &finished.host()[r * 20..][..20],
                &expected,
                &format!("{variant:?} finish of row {r}"),
            );
        }
        for (logits, r) in logits.chunks(51).zip([3, 1]) {
            let expected = model.logits(&wide(&x.host()[r * 20..][..20]));
            check_close(logits, &expected, &format!("{variant:?} logits of row {r}"));
        }
    }
}

#[test]
fn embeddings_are_the_table() {
    for variant in VARIANTS {
        let model = Tiny::new(variant);
        let x = model.backend().embed(&[50, 0, 17, 17]).unwrap();
        let table = &model.weights[&WeightName::Embedding].data;
        let expected: Vec<f32> =
            [50, 0, 17, 17].into_iter().flat_map(|t| &table[t * 20..][..20]).copied().collect();
        assert_eq!(x.host(), expected);
        assert_eq!((x.rows(), x.width()), (4, 20));
    }
}

/// Rows in calls of 1, 7, 64 and all at once give the same bits at every step.
#[test]
fn rows_do_not_depend_on_their_neighbours() {
    for variant in VARIANTS {
        let backend = Tiny::new(variant).backend();
        let rows = 600;
        let (x, attention) = (random(rows * 20, 5), random(rows * 24, 6));
        let positions: Vec<u64> = (0..rows as u64).map(|r| r * 977).collect();
        let pass = |size: usize| {
            let (mut qkv, mut finished, mut logits) = (Vec::new(), Vec::new(), Vec::new());
            let parts = x.chunks(size * 20).zip(positions.chunks(size)).zip(attention.chunks(size * 24));
            for ((x, positions), attention) in parts {
                let x = Activations::from_host(20, x.to_vec());
                let Qkv { q, k, v } = backend.qkv(1, &x, positions).unwrap();
                for (r, q) in q.chunks(24).enumerate() {
                    qkv.extend([q, &k[r * 12..][..12], &v[r * 12..][..12]].concat());
                }
                let x = backend.finish(1, x, attention).unwrap();
                finished.extend_from_slice(x.host());
                logits.extend(backend.logits(&x, &(0..x.rows()).collect::<Vec<_>>()).unwrap());
            }
            [qkv, finished, logits].map(|numbers| numbers.into_iter().map(f32::to_bits).collect::<Vec<_>>())
        };
        let whole = pass(rows);
        for size in [1, 7, 64] {
            assert!(pass(size) == whole, "{variant:?} in calls of {size} rows");
        }
    }
}

#[test]
fn empty_calls_give_nothing() {
    let backend = Tiny::new(PLAIN).backend();
    let x = backend.embed(&[]).unwrap();
    assert_eq!(backend.qkv(0, &x, &[]).unwrap(), Qkv { q: vec![], k: vec![], v: vec![] });
    assert_eq!(backend.finish(0, x.clone(), &[]).unwrap().rows(), 0);
    assert_eq!(backend.logits(&x, &[]).unwrap(), Vec::<f32>::new());
}

#[test]
fn calls_that_cannot_work_are_refused_by_name() {
    let backend = Tiny::new(PLAIN).backend();
    let x = backend.embed(&[1, 2]).unwrap();
    let narrow = Activations::from_host(19, vec![0.0; 38]);
    let check = |field: &str, error: Error| {
        assert!(error.to_string().starts_with(&format!("`{field}` ")), "{field}: {error}");
        assert_eq!(error.kind(), crate::Kind::InvalidInput);
    };
    check("tokens[1]", backend.embed(&[50, 51]).unwrap_err());
    check("layer", backend.qkv(2, &x, &[0, 1]).unwrap_err());
    check("x", backend.qkv(0, &narrow, &[0, 1]).unwrap_err());
    check("positions", backend.qkv(0, &x, &[0]).unwrap_err());
    check("layer", backend.finish(usize::MAX, x.clone(), &[0.0; 48]).unwrap_err());
    check("x", backend.finish(0, narrow.clone(), &[0.0; 48]).unwrap_err());
    check("attention", backend.finish(0, x.clone(), &[0.0; 47]).unwrap_err());
    check("x", backend.logits(&narrow, &[0]).unwrap_err());
    check("rows[1]", backend.logits(&x, &[1, 2]).unwrap_err());
}

#[test]
fn weights_that_do_not_fit_are_refused_by_name() {
    let load =
        |model: &Tiny| load::load(model.config.clone(), model, serial(), &|_| ()).unwrap_err().to_string();
    let mut model = Tiny::new(PLAIN);
    let name = WeightName::Layer(1, LayerWeight::Up);
    model.weights.get_mut(&name).unwrap().rows = 36;
    assert_eq!(load(&model), "`Layer(1, Up)` has shape [36, 20], must be [37, 20]");
    let mut model = Tiny::new(PLAIN);
    model.weights.get_mut(&name).unwrap().data[37] = f32::NAN;
    assert_eq!(load(&model), "`Layer(1, Up)` is not finite");
    let mut model = Tiny::new(PLAIN);
    model.config.rope.dim = 8;
    assert!(load(&model).starts_with("`rope.dim` is 8"));
    model.config.ffn = 0;
    assert!(load(&model).starts_with("`ffn` is 0"));
}

#[test]
fn progress_ends_at_the_total() {
    for variant in VARIANTS {
        let (model, seen) = (Tiny::new(variant), RefCell::new(Vec::new()));
        load::load(model.config.clone(), &model, serial(), &|progress| seen.borrow_mut().push(progress))
            .unwrap();
        let seen = seen.into_inner();
        assert_eq!(seen.len(), model.weights.len());
        assert!(seen.is_sorted_by_key(|progress| progress.done_bytes));
        let total: u64 = model.weights.values().map(|matrix| matrix.data.len() as u64 * 4).sum();
        assert_eq!(*seen.last().unwrap(), LoadProgress { done_bytes: total, total_bytes: total });
    }
}
