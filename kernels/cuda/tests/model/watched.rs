//! What the host waits for, and what it holds.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use longshore_attention::{KvDtype, TileShape};
use longshore_compute::ComputePool;
use longshore_cuda::{Append, Buffer, CudaBackend, Device, Error, KeptRows, Kind, ModelOptions};
use longshore_model::testing::{StoredType, TinyArchitecture, TinyOptions, tiny_gguf, write_tiny_gguf};
use longshore_model::{Backend as _, LoadProgress, LoadedModel};

use crate::counted::Watched;
use crate::device::Emulator;

pub(crate) fn model(options: &TinyOptions) -> LoadedModel {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    write_tiny_gguf(&path, options).unwrap();
    LoadedModel::open(&path, &|_| ()).unwrap()
}

pub(crate) fn load(
    device: Arc<dyn Device>,
    model: &LoadedModel,
    progress: &dyn Fn(LoadProgress),
) -> Result<CudaBackend, longshore_model::Error> {
    let options = ModelOptions::new(ComputePool::serial());
    CudaBackend::load(device, model.info.config.clone(), &model.weights, &options, progress)
}

#[test]
fn no_layer_waits_for_the_device() {
    let model = model(&TinyOptions { architecture: TinyArchitecture::Qwen2, ..TinyOptions::default() });
    let watched = Watched::with_room(usize::MAX);
    let device: Arc<dyn Device> = watched.clone();
    let backend = load(Arc::clone(&device), &model, &|_| ()).unwrap();
    let heads = backend.config().heads;
    let shape = TileShape {
        block_tokens: 16,
        kv_heads: heads.kv_heads,
        head_dim: heads.head_dim,
        dtype: KvDtype::Bf16,
    };
    let page = Buffer::from_slice(&device, &vec![0u8; 16 * 2 * heads.kv_heads * heads.head_dim * 2]).unwrap();
    let pages = Buffer::from_slice(&device, &[page.address()]).unwrap();
    let places = Buffer::from_slice(&device, &[0u64, 1, 2]).unwrap();
    let before = watched.counted();
    let mut x = backend.embed(&[1, 2, 3]).unwrap();
    let address = |x: &longshore_model::Activations| KeptRows::of(x).unwrap().buffer().address();
    let first = address(&x);
    for layer in 0..backend.config().layers {
        let append = Append { shape, pages: &pages, places: &places };
        let q = backend.qkv_append(layer, &x, &[0, 1, 2], &append).unwrap();
        // In place of attention: whatever has its shape.
        x = backend.finish_kept(layer, x, &q).unwrap();
        assert_eq!(address(&x), first, "rows that nobody shares are changed in place");
    }
    let counted = watched.counted() - before;
    assert_eq!(counted.waits(), 0, "{counted:?}");
    assert!(counted.launches > 10);
    // Shared rows are left alone.
    let shared = x.clone();
    let was = shared.to_host().unwrap().into_owned();
    let attention = longshore_model::Activations::from_host(64, vec![0.5; 3 * 64]);
    let after = backend.finish_kept(0, x, &attention).unwrap();
    assert_ne!(address(&after), first);
    assert_eq!(*shared.to_host().unwrap(), was);
    assert_ne!(*after.to_host().unwrap(), was);
    // The same from the host.
    let same = backend.finish(0, shared, &[0.5; 3 * 64]).unwrap();
    assert_eq!(same.to_host().unwrap(), after.to_host().unwrap());
    let host = longshore_model::Activations::from_host(64, was);
    let same = backend.finish(0, host, &[0.5; 3 * 64]).unwrap();
    assert_eq!(same.to_host().unwrap(), after.to_host().unwrap());
    let chosen = after.select(&[2, 0]).unwrap().to_host().unwrap().into_owned();
    let all = after.to_host().unwrap();
    assert_eq!(chosen, [&all[128..], &all[..64]].concat());
}

#[test]
fn loading_tells_how_far_it_is_and_gives_memory_back() {
    let model = model(&TinyOptions { tied_embeddings: false, ..TinyOptions::default() });
    let watched = Watched::with_room(usize::MAX);
    let seen = std::sync::Mutex::new(Vec::new());
    let backend = load(watched.clone(), &model, &|progress| seen.lock().unwrap().push(progress)).unwrap();
    let seen = seen.into_inner().unwrap();
    assert!(seen.is_sorted_by_key(|progress| progress.done_bytes) && seen.len() > 10);
    let last = seen.last().unwrap();
    assert_eq!(
        (last.done_bytes, last.total_bytes),
        (model.weights.total_bytes(), model.weights.total_bytes())
    );
    let expected = CudaBackend::expected_bytes(
        &model.info.config,
        &model.weights,
        &ModelOptions::new(ComputePool::serial()),
    );
    let used = watched.used.load(Ordering::Relaxed) as u64;
    assert_eq!(expected.unwrap(), used, "all that lies on the device is counted beforehand");
    assert!(backend.memory_bytes() <= used && backend.memory_bytes() > used * 9 / 10);
    drop(backend);
    assert_eq!(watched.used.load(Ordering::Relaxed), 0);
}

/// A model whose first layer's gates and ups have different types, and whose feed-forward width is no multiple of what takes turns.
fn mixed() -> LoadedModel {
    let options = TinyOptions { ffn: 100, stored: StoredType::F16, ..TinyOptions::default() };
    let mut writer = tiny_gguf(&options);
    let gate = writer.tensors.iter_mut().find(|tensor| tensor.name == "blk.0.ffn_gate.weight");
    let gate = gate.expect("the first layer has gates");
    let data: Vec<f32> = (0..100 * 64).map(|index| (index % 17) as f32 / 64.0 - 0.125).collect();
    (gate.kind, gate.bytes) = (StoredType::Q8_0.id(), StoredType::Q8_0.encode(&data));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mixed.gguf");
    std::fs::write(&path, writer.bytes()).unwrap();
    LoadedModel::open(&path, &|_| ()).unwrap()
}

#[test]
fn gates_and_ups_of_different_types_are_counted_as_they_are_stored() {
    let model = mixed();
    let options = ModelOptions::new(ComputePool::serial());
    let expected = CudaBackend::expected_bytes(&model.info.config, &model.weights, &options).unwrap();
    let watched = Watched::with_room(usize::MAX);
    let backend = load(watched.clone(), &model, &|_| ()).unwrap();
    assert_eq!(watched.used.load(Ordering::Relaxed) as u64, expected);
    drop(backend);
    let backend = load(Watched::with_room(expected as usize), &model, &|_| ());
    assert!(backend.is_ok(), "what is said to be enough is enough");
}

#[test]
fn a_device_without_room_says_what_the_model_needs() {
    let model = model(&TinyOptions::default());
    let whole = CudaBackend::expected_bytes(
        &model.info.config,
        &model.weights,
        &ModelOptions::new(ComputePool::serial()),
    );
    let whole = whole.unwrap();
    for room in [0, whole as usize / 2, whole as usize - 1] {
        let watched = Watched::with_room(room);
        let error = load(watched.clone(), &model, &|_| ()).unwrap_err();
        assert_eq!(error.kind(), longshore_model::Kind::Exhausted, "{error}");
        assert!(
            error.retryable() && error.to_string().contains(&format!("no room for {whole} bytes")),
            "{error}"
        );
        assert_eq!(watched.used.load(Ordering::Relaxed), 0, "what was taken is given back");
    }
    // Room for the weights, none for a step: the step can be tried again.
    let backend = load(Watched::with_room(whole as usize), &model, &|_| ()).unwrap();
    let error = backend.embed(&[1]).unwrap_err();
    assert!(error.retryable() && error.kind() == longshore_model::Kind::Exhausted, "{error}");
    let source = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<Error>());
    assert_eq!(source.map(Error::kind), Some(Kind::Exhausted));
}

#[test]
fn rows_go_through_in_passes_without_a_trace() {
    let model = model(&TinyOptions { architecture: TinyArchitecture::Qwen3, ..TinyOptions::default() });
    let tokens: Vec<u32> = (0..75).map(|i| i * 3).collect();
    let positions: Vec<u64> = (0..75).map(|i| i * 1_000_003).collect();
    let passes = [32, 2048].map(|pass_rows| {
        let device = Emulator::device();
        let options = ModelOptions {
            pass_rows,
            precision: Some(longshore_cuda::Precision::F16),
            ..ModelOptions::new(ComputePool::serial())
        };
        let config = model.info.config.clone();
        let backend =
            CudaBackend::load(Arc::clone(&device), config, &model.weights, &options, &|_| ()).unwrap();
        let heads = backend.config().heads;
        let shape = TileShape {
            block_tokens: 256,
            kv_heads: heads.kv_heads,
            head_dim: heads.head_dim,
            dtype: KvDtype::F32,
        };
        let page =
            Buffer::from_slice(&device, &vec![0u8; 256 * 2 * heads.kv_heads * heads.head_dim * 4]).unwrap();
        let pages = Buffer::from_slice(&device, &[page.address()]).unwrap();
        let places: Vec<u64> = (0..75).map(|row| 255 - row).collect();
        let places = Buffer::from_slice(&device, &places).unwrap();
        let x = backend.embed(&tokens).unwrap();
        let append = Append { shape, pages: &pages, places: &places };
        let q = backend.qkv_append(1, &x, &positions, &append).unwrap();
        let kept = backend.qkv_kept(1, &x, &positions).unwrap();
        assert_eq!(q.to_host().unwrap(), kept.q.to_host().unwrap());
        let x = backend.finish_kept(1, x, &q).unwrap();
        let rows = [&kept.k, &kept.v, &x].map(|rows| rows.to_host().unwrap().into_owned());
        (rows, page.to_vec::<f32>().unwrap(), backend.logits(&x, &(0..75).collect::<Vec<_>>()).unwrap())
    });
    assert!(passes[0] == passes[1], "rows, pages and logits are the same bits");
}
