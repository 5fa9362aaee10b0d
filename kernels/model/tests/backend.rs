//! The CPU backend on the default model, token by token: with one key, attention is that key's value, so that whole passes
//! need no executor.

#[path = "support/default_model.rs"]
mod default_model;

use std::sync::Arc;
use std::time::Instant;

use longshore_compute::{ComputePool, PoolOptions};
use longshore_model::{Activations, Backend as _, CpuBackend, CpuOptions, Linear};

use default_model::MODEL;

fn backend(pool: &Arc<ComputePool>, linear: Linear) -> CpuBackend {
    let options = CpuOptions { pool: Arc::clone(pool), linear };
    CpuBackend::new(MODEL.info.config.clone(), &MODEL.weights, options, &|_| ()).expect("the backend loads")
}

/// The residual stream after all layers, each row a sequence of its own.
fn pass(backend: &CpuBackend, tokens: &[u32]) -> Activations {
    let heads = backend.config().heads;
    let mut x = backend.embed(tokens).expect("tokens of the vocabulary");
    for layer in 0..backend.config().layers {
        let qkv = backend.qkv(layer, &x, &vec![0; tokens.len()]).expect("a layer of the model");
        let values = qkv.v.chunks_exact(heads.head_dim);
        let attention: Vec<f32> = values.flat_map(|value| value.repeat(heads.group)).collect();
        x = backend.finish(layer, x, &attention).expect("attention of all rows");
    }
    x
}

fn logits(backend: &CpuBackend, tokens: &[u32]) -> Vec<f32> {
    let rows: Vec<usize> = (0..tokens.len()).collect();
    backend.logits(&pass(backend, tokens), &rows).expect("rows that are there")
}

#[test]
fn int8_activations_stay_close_to_f32_at_the_size_of_the_file() {
    let pool = ComputePool::new(&PoolOptions::default()).unwrap();
    let (int8, exact) = (backend(&pool, Linear::Auto), backend(&pool, Linear::F32));
    assert!(
        int8.linear_description().starts_with("Q4_1 x 210: int8 activations; Q8_0 x 1: int8 activations (")
    );
    assert!(
        exact.linear_description().starts_with("Q4_1 x 210: f32, dequantised; Q8_0 x 1: f32, dequantised (")
    );
    assert!(int8.memory_bytes() < MODEL.info.file_bytes, "{} bytes", int8.memory_bytes());
    let tokens = [504, 28, 3575, 282, 260, 1029, 17, 49_000, 1, 2];
    let (found, expected) = (logits(&int8, &tokens), logits(&exact, &tokens));
    let vocabulary = MODEL.info.config.vocabulary;
    let errors = found.chunks(vocabulary).zip(expected.chunks(vocabulary)).map(|(found, expected)| {
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let error = norm(&mut found.iter().zip(expected).map(|(a, b)| f64::from(a - b)));
        error / norm(&mut expected.iter().map(|x| f64::from(*x)))
    });
    let mut errors: Vec<f64> = errors.collect();
    errors.sort_unstable_by(f64::total_cmp);
    // First tokens of a sequence, as all are here, have outliers that quantise worse than what follows them.
    assert!(errors[5] < 2e-2 && errors[9] < 0.1 && errors[0] > 1e-6, "relative errors {errors:?}");
}

#[test]
fn bits_do_not_depend_on_rows_or_threads() {
    let [one, three] = [1, 3].map(|threads| ComputePool::new(&PoolOptions { threads, pin: vec![] }).unwrap());
    let (alone, together) = (backend(&one, Linear::Auto), backend(&three, Linear::Auto));
    let tokens: Vec<u32> = (0..45).map(|i| i * 1_077).collect();
    let whole = pass(&together, &tokens);
    for (rows, size) in [(0..1, 1), (1..2, 1), (2..20, 18), (20..45, 5)] {
        let mut found = Vec::new();
        for tokens in tokens[rows.clone()].chunks(size) {
            found.extend_from_slice(pass(&alone, tokens).host());
        }
        let expected = &whole.host()[rows.start * 576..rows.end * 576];
        let same = found.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "rows {rows:?} in calls of {size}");
    }
}

/// Run by hand: `cargo test --release -p longshore-model --test backend -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn measures_steps() {
    let pool = ComputePool::new(&PoolOptions::default()).unwrap();
    let start = Instant::now();
    let backend = backend(&pool, Linear::Auto);
    println!("loading: {:.0} ms, {} bytes", start.elapsed().as_secs_f64() * 1e3, backend.memory_bytes());
    let milliseconds = |times: usize, work: &mut dyn FnMut()| {
        let time = |_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64() * 1e3
        };
        (0..times).map(time).fold(f64::INFINITY, f64::min)
    };
    for rows in [1, 2, 4, 8, 16, 64, 512] {
        let (tokens, times) = (vec![1000; rows], if rows < 64 { 30 } else { 5 });
        let layers = milliseconds(times, &mut || drop(pass(&backend, &tokens)));
        let x = pass(&backend, &tokens);
        let chosen: Vec<usize> = (0..rows.min(16)).collect();
        let head = milliseconds(10, &mut || drop(backend.logits(&x, &chosen).unwrap()));
        println!("{rows} rows: {layers:.2} ms; logits of {} rows: {head:.2} ms", chosen.len());
    }
}
