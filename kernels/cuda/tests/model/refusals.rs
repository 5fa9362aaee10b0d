//! Input that can never work: what the CPU refuses, in the CPU's words.

use std::fmt::Debug;

use longshore_attention::{KvDtype, TileShape};
use longshore_compute::ComputePool;
use longshore_cuda::{Append, Buffer, CudaBackend, CudaLinear, ModelOptions, Precision};
use longshore_model::testing::{StoredType, TinyOptions, tiny_gguf};
use longshore_model::{
    Activations, Backend, CpuBackend, CpuOptions, Kind, Linear, LoadedModel, RopeScaling, TensorType,
    WantedRow,
};

use crate::device::Emulator;
use crate::watched::{load, model};

fn refused<T: Debug>(result: Result<T, longshore_model::Error>) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidInput, "{error}");
    error.to_string()
}

#[test]
fn hostile_calls_are_refused_in_the_cpus_words() {
    let model = model(&TinyOptions::default());
    let cuda = load(Emulator::device(), &model, &|_| ()).unwrap();
    let cpu = CpuOptions { pool: ComputePool::serial(), linear: Linear::Auto };
    let cpu = CpuBackend::new(model.info.config.clone(), &model.weights, cpu, &|_| ()).unwrap();
    let hostile = |backend: &dyn Backend| -> Vec<String> {
        let x = backend.embed(&[1, 2]).unwrap();
        let narrow = Activations::from_host(63, vec![0.0; 63]);
        vec![
            refused(backend.embed(&[0, 267])),
            refused(backend.embed(&[u32::MAX])),
            refused(backend.qkv(2, &x, &[0, 1])),
            refused(backend.qkv(usize::MAX, &x, &[0, 1])),
            refused(backend.qkv(0, &x, &[0])),
            refused(backend.qkv(0, &narrow, &[0])),
            refused(backend.finish(2, x.clone(), &[0.0; 128])),
            refused(backend.finish(0, x.clone(), &[0.0; 127])),
            refused(backend.finish(0, narrow.clone(), &[0.0; 64])),
            refused(backend.logits(&x, &[0, 2])),
            refused(backend.logits(&narrow, &[0])),
        ]
    };
    assert_eq!(hostile(&cuda), hostile(&cpu));
    let x = cuda.embed(&[1, 2]).unwrap();
    let wanted = [WantedRow { row: 2, candidates: Some(1) }];
    assert!(refused(cuda.candidates(&x, &wanted)).starts_with("`rows[0]` is 2"));
    let attention = Activations::from_host(32, vec![0.0; 128]);
    assert!(refused(cuda.finish_kept(0, x, &attention)).starts_with("`attention` has 4 rows of 32"));
}

#[test]
fn nothing_is_computed_of_no_rows() {
    let cuda = load(Emulator::device(), &model(&TinyOptions::default()), &|_| ()).unwrap();
    let x = cuda.embed(&[]).unwrap();
    let qkv = cuda.qkv(0, &x, &[]).unwrap();
    assert!(qkv.q.is_empty() && qkv.k.is_empty() && qkv.v.is_empty());
    let x = cuda.finish(0, x, &[]).unwrap();
    assert_eq!((x.rows(), x.width()), (0, 64));
    assert!(cuda.logits(&x, &[]).unwrap().is_empty() && cuda.candidates(&x, &[]).unwrap().is_empty());
}

#[test]
fn pages_of_another_shape_are_refused() {
    let device = Emulator::device();
    let cuda = load(device.clone(), &model(&TinyOptions::default()), &|_| ()).unwrap();
    let x = cuda.embed(&[1, 2]).unwrap();
    let shape = TileShape { block_tokens: 16, kv_heads: 2, head_dim: 16, dtype: KvDtype::F16 };
    let [pages, places, short] =
        [&[4096u64][..], &[0, 1], &[0]].map(|words| Buffer::from_slice(&device, words).unwrap());
    let none = Buffer::new(&device, 0).unwrap();
    let good = Append { shape, pages: &pages, places: &places };
    let bad = [
        (Append { shape: TileShape { head_dim: 17, ..shape }, ..good }, "`append.shape` has 2 heads of 17"),
        (Append { shape: TileShape { block_tokens: 24, ..shape }, ..good }, "`append.shape` is no shape"),
        (Append { places: &short, ..good }, "`append.places` has 8 bytes for 2 rows"),
        (Append { pages: &none, ..good }, "`append.pages` has 0 bytes"),
    ];
    for (append, problem) in bad {
        let told = refused(cuda.qkv_append(0, &x, &[0, 1], &append));
        assert!(told.starts_with(problem), "{told}");
    }
}

#[test]
fn configurations_that_do_not_fit_are_refused() {
    let model = model(&TinyOptions::default());
    let options = ModelOptions::new(ComputePool::serial());
    let bend = |bend: &dyn Fn(&mut longshore_model::ModelConfig)| {
        let mut config = model.info.config.clone();
        bend(&mut config);
        refused(CudaBackend::load(Emulator::device(), config, &model.weights, &options, &|_| ()))
    };
    assert_eq!(bend(&|config| config.layers = 0), "`layers` is 0");
    assert!(bend(&|config| config.rope.dim = 18).starts_with("`rope.dim` is 18, a head has 16"));
    assert!(bend(&|config| config.hidden = 65).contains("has shape [267, 64], must be [267, 65]"));
    let scaling = RopeScaling::Linear { factor: 0.5 };
    assert!(bend(&|config| config.rope.scaling = scaling.clone()).starts_with("`rope.scaling.factor`"));
}

#[test]
fn weights_that_are_no_numbers_or_too_large_are_refused() {
    let open = |bad: f32| {
        let mut writer = tiny_gguf(&TinyOptions::default());
        let mut data = vec![0.1; 128 * 64];
        data[77] = bad;
        writer.tensors.retain(|tensor| tensor.name != "blk.1.ffn_up.weight");
        writer.tensor("blk.1.ffn_up.weight", &[128, 64], StoredType::F32, &data);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bad.gguf");
        std::fs::write(&path, writer.bytes()).unwrap();
        LoadedModel::open(&path, &|_| ()).unwrap()
    };
    let load = |bad: f32, precision| {
        let model = open(bad);
        let options = ModelOptions { precision: Some(precision), ..ModelOptions::new(ComputePool::serial()) };
        CudaBackend::load(Emulator::device(), model.info.config.clone(), &model.weights, &options, &|_| ())
    };
    for precision in Precision::ALL {
        let error = load(f32::NAN, precision).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        assert!(
            error.to_string().contains("`blk.1.ffn_up.weight` holds a value that is not finite"),
            "{error}"
        );
    }
    let told = refused(load(70_000.0, Precision::F16));
    assert!(told.starts_with("`precision` is f16, where `Layer(1, Up)` holds 70000"), "{told}");
    assert!(load(70_000.0, Precision::Bf16).is_ok() && load(70_000.0, Precision::F32).is_ok());
}

#[test]
fn layers_of_wrong_sizes_are_refused() {
    let options = ModelOptions::new(ComputePool::serial());
    let new = |kind, shape, bytes: usize| {
        let error = CudaLinear::new(&Emulator::device(), &options, kind, shape, &vec![0; bytes]).unwrap_err();
        assert_eq!(error.kind(), longshore_cuda::Kind::InvalidInput, "{error}");
        error.to_string()
    };
    assert!(new(TensorType::Q8_0, [3, 33], 34).starts_with("`shape` is [3, 33]"));
    assert!(new(TensorType::F16, [0, 32], 0).starts_with("`shape`"));
    assert!(new(TensorType::Q8_0, [3, 32], 34).starts_with("`bytes` has 34, must have 102"));
}
