//! GGUF files that are cut, bent, or lie: each gives a typed error that names the field, and none allocates by a number that
//! it made up.

use proptest::prelude::*;

use super::*;
use crate::testing::{
    GgufWriter, MetadataValue, StoredType, TinyArchitecture, TinyOptions, WrittenTensor, tiny_gguf,
};
use crate::{ModelConfig, RopeScaling, RopeStyle};

fn tiny() -> GgufWriter {
    tiny_gguf(&TinyOptions::default())
}

fn config(writer: &GgufWriter) -> Result<ModelConfig, Fault> {
    let bytes = writer.bytes();
    let gguf = Gguf::parse(&bytes)?;
    model_config(&gguf, &bytes, "stem")
}

/// The field that the parser blames.
fn blamed(bytes: &[u8]) -> String {
    match Gguf::parse(bytes).map(|gguf| model_config(&gguf, bytes, "stem")) {
        Err(Fault::Corrupt { field, .. }) | Ok(Err(Fault::Corrupt { field, .. })) => field,
        other => panic!("a corrupt file was expected, found {other:?}"),
    }
}

#[test]
fn a_whole_file_is_read_back() {
    let mut writer = tiny();
    writer.set("general.alignment", 32);
    let bytes = writer.bytes();
    let gguf = Gguf::parse(&bytes).unwrap();
    assert_eq!(gguf.tensors.len(), writer.tensors.len());
    for tensor in &writer.tensors {
        let stored = &gguf.tensors[&tensor.name];
        assert_eq!(bytes[stored.start..stored.start + stored.bytes], tensor.bytes, "{}", tensor.name);
        let sizes: Vec<u64> = stored.shape.iter().rev().map(|size| *size as u64).collect();
        assert_eq!(sizes, tensor.sizes);
    }
    let mut version_2 = bytes.clone();
    version_2[4] = 2;
    assert!(Gguf::parse(&version_2).is_ok());
}

#[test]
fn a_file_cut_at_any_field_is_refused() {
    let (bytes, boundaries) = tiny().bytes_and_boundaries();
    assert!(boundaries.len() > 100);
    for end in boundaries.into_iter().flat_map(|at| [at, at.saturating_sub(1), at + 1]) {
        let fault = Gguf::parse(&bytes[..end]).unwrap_err();
        assert!(matches!(fault, Fault::Corrupt { .. }), "cut at {end}: {fault:?}");
    }
    for missing in 1..200 {
        let fault = Gguf::parse(&bytes[..bytes.len() - missing]).unwrap_err();
        assert!(
            matches!(&fault, Fault::Corrupt { problem, .. } if problem.contains("beyond the end")),
            "{fault:?}"
        );
    }
}

#[test]
fn corrupted_header_fields_are_named() {
    let bytes = tiny().bytes();
    let bent = |at: usize, with: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        bytes
    };
    let absurd = (1u64 << 60).to_le_bytes();
    assert_eq!(blamed(&bent(0, b"GGML")), "magic");
    assert_eq!(blamed(&bent(4, &9u32.to_le_bytes())), "version");
    assert_eq!(blamed(&bent(8, &absurd)), "tensor_count");
    assert_eq!(blamed(&bent(8, &u64::MAX.to_le_bytes())), "tensor_count");
    assert_eq!(blamed(&bent(16, &absurd)), "metadata_kv_count");
    assert_eq!(blamed(&bent(24, &absurd)), "key of metadata entry 0");
    for version in [1u32, 2u32.swap_bytes(), 3u32.swap_bytes()] {
        let fault = Gguf::parse(&bent(4, &version.to_le_bytes())).unwrap_err();
        assert!(matches!(fault, Fault::Unsupported { .. }), "{fault:?}");
    }
    assert_eq!(blamed(b""), "magic");
    assert_eq!(blamed(b"{\"a\": 1}        "), "magic");
}

/// Bends the bytes right after a metadata key.
fn bend_after_key(key: &str, bend: impl Fn(&mut [u8])) -> Vec<u8> {
    let mut bytes = tiny().bytes();
    let at = bytes.windows(key.len()).position(|window| window == key.as_bytes()).unwrap() + key.len();
    bend(&mut bytes[at..]);
    bytes
}

#[test]
fn corrupted_metadata_values_are_named() {
    let put = |at: usize, with: &'static [u8]| {
        move |bytes: &mut [u8]| bytes[at..at + with.len()].copy_from_slice(with)
    };
    let cases = [
        ("tokenizer.ggml.model", bend_after_key("tokenizer.ggml.model", put(0, &[13, 0, 0, 0]))),
        ("tokenizer.ggml.model", bend_after_key("tokenizer.ggml.model", put(4, &[0xff; 8]))),
        ("tokenizer.ggml.model", bend_after_key("tokenizer.ggml.model", put(12, &[0xff; 4]))),
        ("tokenizer.ggml.tokens", bend_after_key("tokenizer.ggml.tokens", put(4, &[99, 0, 0, 0]))),
        ("tokenizer.ggml.tokens", bend_after_key("tokenizer.ggml.tokens", put(8, &[0xff; 8]))),
        (
            "tokenizer.ggml.tokens",
            bend_after_key("tokenizer.ggml.tokens", put(8, &[0, 0, 0, 0, 0, 0, 0, 16])),
        ),
        ("tokenizer.ggml.token_type", bend_after_key("tokenizer.ggml.token_type", put(8, &[0xff; 8]))),
        ("tokenizer.ggml.add_bos_token", bend_after_key("tokenizer.ggml.add_bos_token", put(4, &[2]))),
        ("llama.block_count", bend_after_key("llama.block_count", put(0, &[6, 0, 0, 0]))),
    ];
    for (field, bytes) in cases {
        assert_eq!(blamed(&bytes), field);
    }
    let mut twice = tiny();
    twice.metadata.push(("general.name".into(), "other".into()));
    assert_eq!(blamed(&twice.bytes()), "general.name");
}

#[test]
fn corrupted_tensor_entries_are_named() {
    let with = |edit: &dyn Fn(&mut WrittenTensor)| {
        let mut writer = tiny();
        let tensor = writer.tensors.iter_mut().find(|tensor| tensor.name == "output_norm.weight").unwrap();
        edit(tensor);
        writer.bytes()
    };
    let absurd = 1u64 << 60;
    let lies: [&dyn Fn(&mut WrittenTensor); 9] = [
        &|tensor| tensor.sizes = vec![],
        &|tensor| tensor.sizes = vec![1; 5],
        &|tensor| tensor.sizes = vec![0],
        &|tensor| tensor.sizes = vec![64, 0],
        &|tensor| tensor.sizes = vec![absurd],
        &|tensor| tensor.sizes = vec![absurd, absurd],
        &|tensor| tensor.sizes = vec![u64::MAX, 2],
        &|tensor| (tensor.kind, tensor.sizes) = (8, vec![31]),
        &|tensor| (tensor.kind, tensor.sizes) = (12, vec![64]),
    ];
    for (index, lie) in lies.into_iter().enumerate() {
        assert_eq!(blamed(&with(lie)), "output_norm.weight", "lie {index}");
    }
    for (id, name) in [(4, "unknown"), (10, "Q2_K"), (16, "IQ2_XXS"), (u32::MAX, "unknown")] {
        let fault = Gguf::parse(&with(&|tensor| tensor.kind = id)).unwrap_err();
        let Fault::Unsupported { feature, hint } = fault else { panic!("{fault:?}") };
        assert_eq!(feature, format!("tensor `output_norm.weight` of type {id} ({name})"));
        assert!(hint.contains("Q4_K"), "{hint}");
    }
    let mut twice = tiny();
    twice.tensors.push(twice.tensors[3].clone());
    assert_eq!(blamed(&twice.bytes()), twice.tensors[3].name);
}

#[test]
fn tensors_beyond_the_end_or_over_one_another_are_named() {
    // The offset of a tensor lies right after its type, at the end of its entry.
    let with_offset = |name: &str, offset: u64| {
        let mut bytes = tiny().bytes();
        let name_at = bytes.windows(name.len()).position(|window| window == name.as_bytes()).unwrap();
        let dimensions = u32::from_le_bytes(bytes[name_at + name.len()..][..4].try_into().unwrap()) as usize;
        let at = name_at + name.len() + 4 + 8 * dimensions + 4;
        bytes[at..at + 8].copy_from_slice(&offset.to_le_bytes());
        bytes
    };
    for offset in [33, 1 << 40, 1 << 60, u64::MAX - 31, u64::MAX] {
        assert_eq!(blamed(&with_offset("output_norm.weight", offset)), "output_norm.weight", "{offset}");
    }
    let fault = Gguf::parse(&with_offset("output_norm.weight", 64)).unwrap_err();
    assert_eq!(fault, Fault::corrupt("output_norm.weight", "overlaps `token_embd.weight`"));
    for alignment in [0u32, 3, 4, 48, 1 << 21] {
        let mut writer = tiny();
        writer.set("general.alignment", alignment);
        assert_eq!(blamed(&writer.bytes()), "general.alignment", "{alignment}");
    }
}

#[test]
fn configurations_that_cannot_work_are_named() {
    let float = MetadataValue::F32;
    let whole = MetadataValue::U64;
    let cases = [
        ("general.architecture", None, "general.architecture"),
        ("llama.block_count", None, "llama.block_count"),
        ("llama.block_count", Some(whole(0)), "block_count"),
        ("llama.block_count", Some(whole(1 << 60)), "block_count"),
        ("llama.embedding_length", Some(whole(1 << 60)), "embedding_length"),
        ("llama.feed_forward_length", Some(whole(0)), "feed_forward_length"),
        ("llama.context_length", Some(whole(0)), "context_length"),
        ("llama.context_length", Some(whole(u64::MAX)), "context_length"),
        ("llama.attention.head_count", Some(whole(0)), "llama.attention.head_count"),
        ("llama.attention.head_count", Some(whole(3)), "llama.attention.head_count"),
        ("llama.attention.head_count", Some(whole(1 << 60)), "attention.head_count"),
        ("llama.attention.head_count_kv", Some(whole(0)), "llama.attention.head_count_kv"),
        ("llama.attention.head_count_kv", Some(MetadataValue::I32(-2)), "llama.attention.head_count_kv"),
        ("llama.rope.dimension_count", Some(whole(0)), "rope.dimension_count"),
        ("llama.rope.dimension_count", Some(whole(15)), "rope.dimension_count"),
        ("llama.rope.dimension_count", Some(whole(32)), "rope.dimension_count"),
        ("llama.rope.freq_base", Some(float(0.0)), "rope.freq_base"),
        ("llama.rope.freq_base", Some(float(-1.0)), "rope.freq_base"),
        ("llama.rope.freq_base", Some(float(f32::NAN)), "rope.freq_base"),
        ("llama.rope.freq_base", Some(float(f32::INFINITY)), "rope.freq_base"),
        ("llama.rope.freq_base", Some("ten".into()), "llama.rope.freq_base"),
        ("llama.attention.layer_norm_rms_epsilon", None, "llama.attention.layer_norm_rms_epsilon"),
        ("llama.attention.layer_norm_rms_epsilon", Some(float(0.0)), "attention.layer_norm_rms_epsilon"),
        ("llama.attention.layer_norm_rms_epsilon", Some(float(-1e-5)), "attention.layer_norm_rms_epsilon"),
        ("llama.attention.layer_norm_rms_epsilon", Some(float(f32::NAN)), "attention.layer_norm_rms_epsilon"),
        (
            "llama.attention.layer_norm_rms_epsilon",
            Some(float(f32::INFINITY)),
            "attention.layer_norm_rms_epsilon",
        ),
        ("llama.rope.scaling.factor", Some(float(f32::NAN)), "rope.scaling.factor"),
        ("llama.rope.scaling.factor", Some(float(-4.0)), "rope.scaling.factor"),
        ("llama.rope.scaling.type", Some(1.into()), "llama.rope.scaling.type"),
    ];
    for (key, value, field) in cases {
        let mut writer = tiny();
        match &value {
            Some(value) => writer.set(key, value.clone()),
            None => writer.unset(key),
        }
        assert_eq!(blamed(&writer.bytes()), field, "{key} = {value:?}");
    }
}

#[test]
fn what_is_not_implemented_is_unsupported() {
    let cases: [(&str, MetadataValue, &str); 6] = [
        ("general.architecture", "mamba".into(), "architecture `mamba`"),
        ("llama.expert_count", 8.into(), "`llama.expert_count`"),
        ("llama.rope.scaling.type", "longrope".into(), "`longrope`"),
        ("llama.attention.value_length", 8.into(), "llama.attention.value_length"),
        (
            "llama.attention.head_count_kv",
            MetadataValue::Integers(vec![2, 2]),
            "llama.attention.head_count_kv",
        ),
        ("llama.attention.clamp_kqv", 8.0.into(), "llama.attention.clamp_kqv"),
    ];
    for (key, value, named) in cases {
        let mut writer = tiny();
        writer.set(key, value);
        let fault = config(&writer).unwrap_err();
        assert!(matches!(&fault, Fault::Unsupported { feature, .. } if feature.contains(named)), "{fault:?}");
    }
    let mut writer = tiny();
    writer.set("general.architecture", "mamba");
    assert!(matches!(config(&writer).unwrap_err(), Fault::Unsupported { hint, .. }
        if hint.contains("llama") && hint.contains("qwen2") && hint.contains("qwen3")));
}

#[test]
fn architectures_differ_as_they_should() {
    let of = |architecture| {
        let options = TinyOptions { architecture, tied_embeddings: false, ..TinyOptions::default() };
        config(&tiny_gguf(&options)).unwrap()
    };
    let [llama, qwen2, qwen3] =
        [TinyArchitecture::Llama, TinyArchitecture::Qwen2, TinyArchitecture::Qwen3].map(of);
    assert_eq!((llama.rope.style, llama.qkv_bias, llama.qk_norm), (RopeStyle::Interleaved, false, false));
    assert_eq!((qwen2.rope.style, qwen2.qkv_bias, qwen2.qk_norm), (RopeStyle::Halves, true, false));
    assert_eq!((qwen3.rope.style, qwen3.qkv_bias, qwen3.qk_norm), (RopeStyle::Halves, false, true));
    assert!(!llama.tied_embeddings && config(&tiny()).unwrap().tied_embeddings);
    let mut defaults = tiny();
    for key in ["rope.freq_base", "rope.dimension_count", "attention.head_count_kv", "attention.key_length"] {
        defaults.unset(&format!("llama.{key}"));
    }
    defaults.unset("general.name");
    let defaults = config(&defaults).unwrap();
    assert_eq!((defaults.rope.theta, defaults.rope.dim, defaults.heads.kv_heads), (10_000.0, 16, 4));
    assert_eq!((defaults.name.as_str(), defaults.heads.head_dim), ("stem", 16));
}

#[test]
fn rope_scaling_is_read() {
    let scaling = |values: &[(&str, MetadataValue)]| {
        let mut writer = tiny();
        values.iter().for_each(|(key, value)| writer.set(&format!("llama.rope.{key}"), value.clone()));
        config(&writer).map(|config| config.rope.scaling)
    };
    let linear = Ok(RopeScaling::Linear { factor: 4.0 });
    assert_eq!(scaling(&[("scaling.type", "linear".into()), ("scaling.factor", 4.0.into())]), linear);
    assert_eq!(scaling(&[("scale_linear", 4.0.into())]), linear);
    assert_eq!(
        scaling(&[("scaling.type", "none".into()), ("scaling.factor", 4.0.into())]),
        Ok(RopeScaling::None)
    );
    let yarn = scaling(&[
        ("scaling.type", "yarn".into()),
        ("scaling.factor", 4.0.into()),
        ("scaling.original_context_length", 1024.into()),
        ("scaling.attn_factor", 0.5.into()),
    ]);
    let expected = RopeScaling::Yarn {
        factor: 4.0,
        original_context: 1024,
        attention_factor: Some(0.5 * (0.1 * 4.0f32.ln() + 1.0)),
        beta_fast: 32.0,
        beta_slow: 1.0,
    };
    assert_eq!(yarn, Ok(expected));
}

#[test]
fn rope_divisors_become_the_scaling() {
    let with = |divisors: &[f32]| {
        let mut writer = tiny();
        writer.tensor("rope_freqs.weight", &[divisors.len()], StoredType::F32, divisors);
        config(&writer).map(|config| config.rope.scaling)
    };
    let divisors = [1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0];
    assert_eq!(with(&divisors), Ok(RopeScaling::Factors(divisors.to_vec())));
    for wrong in [vec![1.0; 7], vec![1.0; 9], vec![0.0; 8], vec![-1.0; 8], vec![f32::NAN; 8]] {
        assert!(matches!(with(&wrong), Err(Fault::Corrupt { .. })), "{wrong:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_bent_byte_brings_the_parser_down(place in any::<prop::sample::Index>(), byte in any::<u8>(), cut in 0u8..8) {
        let (whole, head) = &*WHOLE;
        let mut bytes = whole.clone();
        let at = place.index(*head);
        bytes[at] = byte;
        if cut == 0 {
            bytes.truncate(at + 1);
        }
        // Whatever it finds, it comes back, and what it accepts lies within the file.
        if let Ok(gguf) = Gguf::parse(&bytes) {
            for tensor in gguf.tensors.values() {
                prop_assert!(tensor.start + tensor.bytes <= bytes.len());
            }
            drop(model_config(&gguf, &bytes, "stem"));
            drop(crate::Tokenizer::from_gguf(&gguf.metadata));
        }
    }
}

/// A whole file and the length of its head.
static WHOLE: std::sync::LazyLock<(Vec<u8>, usize)> = std::sync::LazyLock::new(|| {
    let (bytes, boundaries) = tiny().bytes_and_boundaries();
    (bytes, *boundaries.last().unwrap())
});
