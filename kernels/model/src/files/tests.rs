//! Whole GGUF models, opened as a user opens them, sound and damaged.

use std::path::Path;

use super::*;
use crate::Kind;
use crate::testing::{GgufWriter, StoredType, TinyArchitecture, TinyOptions, tiny_gguf, write_tiny_gguf};

fn open(path: &Path) -> Result<LoadedModel, Error> {
    LoadedModel::open(path, &|_| ())
}

fn open_gguf_bytes(writer: &GgufWriter) -> Result<LoadedModel, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, writer.bytes()).unwrap();
    open(&path)
}

#[test]
fn tiny_models_of_every_architecture_and_type_open() {
    let dir = tempfile::tempdir().unwrap();
    for architecture in [TinyArchitecture::Llama, TinyArchitecture::Qwen2, TinyArchitecture::Qwen3] {
        for stored in [StoredType::F32, StoredType::F16, StoredType::Bf16, StoredType::Q8_0] {
            let options =
                TinyOptions { architecture, stored, tied_embeddings: false, ..TinyOptions::default() };
            let path = dir.path().join("tiny.gguf");
            write_tiny_gguf(&path, &options).unwrap();
            let model = open(&path).unwrap();
            assert_eq!(model.info.config.architecture, architecture.name());
            let writer = tiny_gguf(&options);
            assert_eq!(model.info.tensors, writer.tensors.len());
            let exact = tiny_gguf(&TinyOptions { stored: StoredType::F32, ..options });
            let expected: Vec<f32> =
                exact.tensors[1].bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            let matrix = model.weights.tensor(WeightName::Output).unwrap();
            assert_eq!((matrix.rows, matrix.cols), (267, 64));
            let far = matrix.data.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(far < 5e-3, "{stored:?}: {far}");
        }
    }
}

#[test]
fn missing_misshaped_and_foreign_tensors_are_named() {
    for architecture in [TinyArchitecture::Llama, TinyArchitecture::Qwen2, TinyArchitecture::Qwen3] {
        let options = TinyOptions { architecture, tied_embeddings: true, ..TinyOptions::default() };
        let whole = tiny_gguf(&options);
        for index in 0..whole.tensors.len() {
            let mut writer = whole.clone();
            let missing = writer.tensors.remove(index).name;
            let error = open_gguf_bytes(&writer).unwrap_err();
            // Without its first bias, a qwen2 file still is one.
            assert_eq!(error.kind(), Kind::Corrupt, "{error}");
            assert!(error.to_string().ends_with(&format!("`{missing}` is missing")), "{error}");
            let mut writer = whole.clone();
            let tensor = &mut writer.tensors[index];
            tensor.sizes.push(1);
            let error = open_gguf_bytes(&writer).unwrap_err();
            assert!(error.to_string().contains(&tensor_name(&whole, index)), "{error}");
        }
    }
    let mut writer = tiny_gguf(&TinyOptions::default());
    writer.tensor("blk.0.attn_output.bias", &[64], StoredType::F32, &[0.0; 64]);
    let error = open_gguf_bytes(&writer).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("`blk.0.attn_output.bias`"), "{error}");
}

fn tensor_name(writer: &GgufWriter, index: usize) -> String {
    // A misshaped embedding is noticed as a vocabulary of another size.
    if index == 0 { String::new() } else { writer.tensors[index].name.clone() }
}

#[test]
fn weights_that_are_not_finite_are_refused_when_read() {
    let mut writer = tiny_gguf(&TinyOptions::default());
    let tensor = writer.tensors.iter_mut().find(|tensor| tensor.name == "output_norm.weight").unwrap();
    tensor.bytes[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
    let model = open_gguf_bytes(&writer).unwrap();
    let error = model.weights.tensor(WeightName::OutputNorm).unwrap_err();
    assert!(error.to_string().contains("`output_norm.weight` holds a value that is not finite"), "{error}");
    assert!(model.weights.tensor(WeightName::Embedding).is_ok());
}

#[test]
fn a_vocabulary_larger_than_the_embedding_is_refused() {
    let mut writer = tiny_gguf(&TinyOptions::default());
    writer.tensors[0].sizes[1] = 200;
    writer.tensors[0].bytes.truncate(200 * 64 * 4);
    let error = open_gguf_bytes(&writer).unwrap_err();
    assert!(
        error.to_string().contains("`tokenizer` has 267 tokens, where the embedding has 200 rows"),
        "{error}"
    );
}

#[test]
fn what_is_no_model_is_a_typed_error() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(open(&dir.path().join("absent.gguf")).unwrap_err().kind(), Kind::Io);
    assert_eq!(open(dir.path()).unwrap_err().kind(), Kind::Io);
    let text = dir.path().join("text.gguf");
    std::fs::write(&text, "hello").unwrap();
    let error = open(&text).unwrap_err();
    assert!(error.to_string().contains("`magic` is `hell`, where `GGUF` is expected"), "{error}");
}
