//! The files load, the heads look where they should, and text prompts work. Whole prompts are asked in `eval`.

use longshore_compute::ComputePool;
use longshore_model::{Backend, CpuBackend, CpuOptions, Linear, LoadedModel, SpecialTokens};

use super::*;

fn made(options: &RecallOptions) -> LoadedModel {
    let folder = tempfile::tempdir().unwrap();
    make_recall(folder.path(), options).unwrap();
    LoadedModel::open(folder.path(), &|_| ()).unwrap()
}

fn backend(model: &LoadedModel) -> CpuBackend {
    let options = CpuOptions { pool: ComputePool::serial(), linear: Linear::Auto };
    CpuBackend::new(model.info.config.clone(), &model.weights, options, &|_| ()).unwrap()
}

fn small() -> RecallOptions {
    RecallOptions { keys: 40, values: 30, fillers: 8, kv_heads: 2, group: 3, ..RecallOptions::default() }
}

#[test]
fn text_becomes_whole_words() {
    let model = made(&small());
    let (tokenizer, vocabulary) = (&model.info.tokenizer, RecallVocabulary::of(&small()));
    assert_eq!(RecallVocabulary::read(tokenizer).unwrap(), vocabulary);
    let ids = tokenizer.encode("k3 v12 w7 k30 k3", SpecialTokens::Add).unwrap();
    let key = |i: u32| vocabulary.keys.start + i;
    let (value, filler) = (vocabulary.values.start + 12, vocabulary.fillers.start + 7);
    assert_eq!(ids, [vocabulary.bos, key(3), value, filler, key(30), key(3)]);
    assert_eq!(tokenizer.decode(&[value]).trim(), "v12");
    // What is no word is spelled.
    assert!(tokenizer.encode("kettle", SpecialTokens::Skip).unwrap().iter().all(|id| *id < vocabulary.bos));
}

#[test]
fn other_models_are_no_recall_models() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    let options = longshore_model::testing::TinyOptions::default();
    longshore_model::testing::write_tiny_gguf(&path, &options).unwrap();
    let tiny = LoadedModel::open(&path, &|_| ()).unwrap();
    let message = RecallVocabulary::read(&tiny.info.tokenizer).unwrap_err().to_string();
    assert!(message.contains("make-recall"), "{message}");
}

#[test]
fn equal_options_make_equal_models() {
    assert_eq!(made(&small()).info.digest, made(&small()).info.digest);
    assert_ne!(made(&small()).info.digest, made(&RecallOptions { seed: 2, ..small() }).info.digest);
}

#[test]
fn impossible_options_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    for (options, field) in [
        (RecallOptions { keys: 0, ..small() }, "--keys"),
        (RecallOptions { layers: 1, ..small() }, "--layers"),
        (RecallOptions { head_dim: 80, ..small() }, "--head-size"),
        (RecallOptions { sharpness: f32::NAN, ..small() }, "--sharpness"),
    ] {
        let message = make_recall(folder.path(), &options).unwrap_err().to_string();
        assert!(message.contains(field), "{message}");
    }
}

/// Logits of one head of one layer in base 2, of the row at `position` with keys of `others`; q and k as the model makes them
/// out of embeddings, which only the previous-token layers see.
fn logits_of_first_layer(model: &LoadedModel, position: u64, others: &[u64]) -> Vec<f64> {
    let backend = backend(model);
    let vocabulary = RecallVocabulary::read(&model.info.tokenizer).unwrap();
    let x = backend.embed(&vec![vocabulary.fillers.start; others.len() + 1]).unwrap();
    let positions: Vec<u64> = [&[position], others].concat();
    let qkv = backend.qkv(0, &x, &positions).unwrap();
    let heads = model.info.config.heads;
    let q = &qkv.q[..heads.head_dim];
    let keys = qkv.k.chunks(heads.kv_heads * heads.head_dim).skip(1);
    let product = |k: &[f32]| q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>();
    let scale = f64::from(model.info.config.attention_scale()) * std::f64::consts::LOG2_E;
    keys.map(|k| product(&k[..heads.head_dim]) * scale).collect()
}

#[test]
fn the_previous_token_outweighs_all_others_at_any_position() {
    for head_dim in [64, 128] {
        let model = made(&RecallOptions { head_dim, layers: 2, ..small() });
        for position in [5_000u64, 2_000_000] {
            // Every distance up to 4,000, and some of every further size.
            let near = (0..=4_000u64).filter(|distance| *distance != 1);
            let far = (0..2_000).map(|i| 4_000 + i * (position / 2_001)).filter(|d| *d <= position);
            let others: Vec<u64> = near.chain(far).map(|distance| position - distance).collect();
            let peak = logits_of_first_layer(&model, position, &[position - 1])[0];
            let rest = logits_of_first_layer(&model, position, &others);
            let lost: f64 = rest.iter().map(|logit| (logit - peak).exp2()).sum();
            assert!(lost < 1e-3, "head size {head_dim}, position {position}: {lost} of the mass");
        }
    }
}
