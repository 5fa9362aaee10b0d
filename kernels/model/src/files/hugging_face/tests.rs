//! Hugging Face directories, sound and damaged; their weights are those of tiny GGUF models.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::files::gguf::{self, Gguf};
use crate::testing::{StoredType, TinyArchitecture, TinyOptions, WrittenTensor, tiny_gguf, write_tiny_gguf};
use crate::{Error, Kind, LayerWeight, LoadedModel, RopeScaling, RopeStyle, SpecialTokens, WeightName};

fn open_gguf(options: &TinyOptions) -> LoadedModel {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    write_tiny_gguf(&path, options).unwrap();
    LoadedModel::open(&path, &|_| ()).unwrap()
}

/// A directory with the weights of a tiny GGUF model.
struct Folder {
    dir: TempDir,
}

fn hugging_face_name(name: &str) -> String {
    let parts = [
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("output.", "lm_head."),
        ("blk.", "model.layers."),
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("attn_output", "self_attn.o_proj"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    // `output.` would also match the end of `attn_output.`.
    let name = name.replace("attn_output", "self_attn.o_proj");
    parts.iter().fold(name, |name, (from, to)| name.replacen(from, to, 1))
}

/// Tensors as a safetensors file: name, dtype, shape, bytes.
type Tensors = Vec<(String, &'static str, Vec<u64>, Vec<u8>)>;

fn tensors(options: &TinyOptions) -> Tensors {
    let dtype = |kind| match kind {
        0 => "F32",
        1 => "F16",
        _ => "BF16",
    };
    let writer = tiny_gguf(options);
    let convert = |tensor: WrittenTensor| {
        let shape = tensor.sizes.iter().rev().copied().collect();
        (hugging_face_name(&tensor.name), dtype(tensor.kind), shape, tensor.bytes)
    };
    writer.tensors.into_iter().map(convert).collect()
}

fn header(tensors: &Tensors) -> Value {
    let mut offset = 0;
    let mut header = serde_json::Map::new();
    for (name, dtype, shape, bytes) in tensors {
        let end = offset + bytes.len();
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    header.into()
}

fn safetensors_bytes(header: &Value, tensors: &Tensors) -> Vec<u8> {
    let header = serde_json::to_vec(header).unwrap();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(tensors.iter().flat_map(|(_, _, _, bytes)| bytes));
    bytes
}

impl Folder {
    fn new(class: &str, options: &TinyOptions) -> Self {
        let folder = Self { dir: tempfile::tempdir().unwrap() };
        folder.json("config.json", &config_json(class, options));
        folder.json("tokenizer.json", &tokenizer_json());
        folder.json("tokenizer_config.json", &json!({
            "eos_token": {"content": "<|im_end|>", "lstrip": false},
            "bos_token": "<|im_start|>",
            "chat_template": [{"name": "tool", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}{{ eos_token }}"}],
        }));
        folder.json("generation_config.json", &json!({"eos_token_id": [1, 2]}));
        let tensors = tensors(options);
        folder.bytes("model.safetensors", &safetensors_bytes(&header(&tensors), &tensors));
        folder
    }

    fn llama() -> Self {
        Self::new("LlamaForCausalLM", &TinyOptions::default())
    }

    fn bytes(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.dir.path().join(name), bytes).unwrap();
    }

    fn json(&self, name: &str, value: &Value) {
        self.bytes(name, &serde_json::to_vec(value).unwrap());
    }

    fn remove(&self, name: &str) {
        std::fs::remove_file(self.dir.path().join(name)).unwrap();
    }

    fn open(&self) -> Result<LoadedModel, Error> {
        LoadedModel::open(self.dir.path(), &|_| ())
    }

    /// The error of a directory whose configuration is edited.
    fn with_config(edit: impl Fn(&mut Value)) -> Result<LoadedModel, Error> {
        let folder = Self::llama();
        let mut config = config_json("LlamaForCausalLM", &TinyOptions::default());
        edit(&mut config);
        folder.json("config.json", &config);
        folder.open()
    }
}

fn config_json(class: &str, options: &TinyOptions) -> Value {
    json!({
        "architectures": [class], "hidden_size": options.hidden, "num_hidden_layers": options.layers,
        "num_attention_heads": options.query_heads, "num_key_value_heads": options.kv_heads,
        "head_dim": options.head_dim, "intermediate_size": options.ffn, "vocab_size": 267, "rms_norm_eps": 1e-5,
        "max_position_embeddings": options.context_tokens, "rope_theta": 5e5, "rope_scaling": null,
        "tie_word_embeddings": options.tied_embeddings, "hidden_act": "silu", "eos_token_id": 2,
        "_name_or_path": "someone/tiny-hf",
    })
}

/// The vocabulary of the tiny GGUF models.
fn tokenizer_json() -> Value {
    let bytes = tiny_gguf(&TinyOptions::default()).bytes();
    let gguf = Gguf::parse(&bytes).unwrap();
    let texts = |key: &str| {
        let array = gguf.metadata.array(key).unwrap().unwrap();
        let text = |value| match value {
            gguf::Value::Text(text) => text.to_owned(),
            other => panic!("{key} holds {other:?}"),
        };
        array.iter().map(text).collect::<Vec<String>>()
    };
    let tokens = texts("tokenizer.ggml.tokens");
    let vocab: BTreeMap<&String, usize> = tokens.iter().enumerate().map(|(id, token)| (token, id)).collect();
    let added: Vec<Value> = (0..3)
        .map(|id| json!({"id": id, "content": tokens[id], "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}))
        .collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level]},
        "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": texts("tokenizer.ggml.merges")},
    })
}

#[test]
fn a_directory_is_the_same_model_as_its_gguf_file() {
    for (class, architecture) in [
        ("LlamaForCausalLM", TinyArchitecture::Llama),
        ("MistralForCausalLM", TinyArchitecture::Llama),
        ("Qwen2ForCausalLM", TinyArchitecture::Qwen2),
        ("Qwen3ForCausalLM", TinyArchitecture::Qwen3),
    ] {
        for (stored, tied_embeddings) in
            [(StoredType::F32, true), (StoredType::F16, false), (StoredType::Bf16, false)]
        {
            let options = TinyOptions { architecture, stored, tied_embeddings, ..TinyOptions::default() };
            let directory = Folder::new(class, &options).open().unwrap();
            let file = open_gguf(&options);
            let (ours, theirs) = (&directory.info.config, &file.info.config);
            assert_eq!(
                (ours.heads, ours.hidden, ours.ffn, ours.layers),
                (theirs.heads, theirs.hidden, theirs.ffn, theirs.layers)
            );
            assert_eq!(
                (ours.qkv_bias, ours.qk_norm, ours.tied_embeddings),
                (theirs.qkv_bias, theirs.qk_norm, theirs.tied_embeddings)
            );
            assert_eq!(
                (ours.rope.style, ours.rope.theta, ours.name.as_str()),
                (RopeStyle::Halves, 5e5, "tiny-hf")
            );
            for layer in 0..options.layers {
                for weight in LayerWeight::ALL.into_iter().filter(|weight| weight.used_by(ours)) {
                    let name = WeightName::Layer(layer, weight);
                    assert_eq!(
                        directory.weights.tensor(name).unwrap(),
                        file.weights.tensor(name).unwrap(),
                        "{name:?}"
                    );
                }
            }
            for name in [WeightName::Embedding, WeightName::Output, WeightName::OutputNorm] {
                assert_eq!(
                    directory.weights.tensor(name).unwrap(),
                    file.weights.tensor(name).unwrap(),
                    "{name:?}"
                );
            }
            let text = "hello the 12 é<|im_end|>";
            let encode = |model: &LoadedModel| model.info.tokenizer.encode(text, SpecialTokens::Add).unwrap();
            assert_eq!(encode(&directory), encode(&file));
        }
    }
}

#[test]
fn the_other_files_say_how_texts_end_and_chats_look() {
    let folder = Folder::llama();
    let info = folder.open().unwrap().info;
    assert_eq!((info.tokenizer.bos_id(), info.tokenizer.eos_ids()), (Some(1), &[1, 2][..]));
    let template = info.chat_template.as_ref().unwrap();
    assert_eq!(template.render(&[("user", "hi")], true).unwrap(), "hi<|im_end|>");
    folder.bytes("chat_template.jinja", b"own {{ bos_token }}");
    let other = folder.open().unwrap().info;
    assert_eq!(other.chat_template.unwrap().render(&[("user", "hi")], true).unwrap(), "own <|im_start|>");
    assert_ne!(other.digest, info.digest, "every file counts for the digest");
    for name in ["chat_template.jinja", "generation_config.json", "tokenizer_config.json"] {
        folder.remove(name);
    }
    let bare = folder.open().unwrap().info;
    assert!(bare.chat_template.is_none());
    assert_eq!(bare.tokenizer.eos_ids(), [2]);
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let folder = Folder::llama();
        folder.remove(name);
        let error = folder.open().unwrap_err();
        assert!(error.kind() == Kind::Io && error.to_string().contains(name), "{error}");
        folder.bytes(name, b"[");
        let error = folder.open().unwrap_err();
        assert!(error.kind() == Kind::Corrupt && error.to_string().contains(name), "{error}");
    }
}

#[test]
fn weights_may_lie_in_several_files() {
    let folder = Folder::llama();
    let whole = folder.open().unwrap();
    folder.remove("model.safetensors");
    let all = tensors(&TinyOptions::default());
    let (first, second): (Tensors, Tensors) =
        all.into_iter().enumerate().fold(Default::default(), |mut halves, (index, tensor)| {
            if index % 2 == 0 {
                halves.0.push(tensor)
            } else {
                halves.1.push(tensor)
            }
            halves
        });
    let mut map = serde_json::Map::new();
    for (name, tensors) in [("a.safetensors", &first), ("b.safetensors", &second)] {
        folder.bytes(name, &safetensors_bytes(&header(tensors), tensors));
        map.extend(tensors.iter().map(|(tensor, ..)| (tensor.clone(), name.into())));
    }
    let index = |map: &serde_json::Map<String, Value>| {
        folder.json("model.safetensors.index.json", &json!({"metadata": {}, "weight_map": map}));
    };
    index(&map);
    let split = folder.open().unwrap();
    for name in [WeightName::Embedding, WeightName::Layer(1, LayerWeight::Down)] {
        assert_eq!(split.weights.tensor(name).unwrap(), whole.weights.tensor(name).unwrap());
    }
    let tensor = first[0].0.clone();
    for (file, expected) in [
        ("b.safetensors", "where the index says it is"),
        ("../a.safetensors", "no plain file name"),
        ("/etc/passwd", "no plain file name"),
        ("x\\y", "no plain file name"),
        ("", "no plain file name"),
        ("..", "no plain file name"),
        ("c.safetensors", "cannot read"),
    ] {
        let mut lying = map.clone();
        lying.insert(tensor.clone(), file.into());
        index(&lying);
        let error = folder.open().unwrap_err();
        assert!(error.to_string().contains(expected), "{file}: {error}");
    }
    index(&map);
    folder.bytes("b.safetensors", &safetensors_bytes(&header(&first), &first));
    assert!(folder.open().unwrap_err().to_string().contains("is in two files"));
}

#[test]
fn safetensors_headers_that_lie_are_refused() {
    let all = tensors(&TinyOptions::default());
    let bytes_with = |edit: &dyn Fn(&mut Value)| {
        let mut header = header(&all);
        edit(&mut header);
        safetensors_bytes(&header, &all)
    };
    let name = "model.norm.weight";
    type Lie<'a> = &'a dyn Fn(&mut Value);
    let lies: [(&str, Lie<'_>); 9] = [
        ("runs over the next tensor", &|header| header[name]["data_offsets"][1] = json!(1u64 << 40)),
        ("starts in another tensor", &|header| header[name]["data_offsets"][0] = json!(0)),
        ("runs backwards", &|header| {
            let end = header[name]["data_offsets"][1].clone();
            header[name]["data_offsets"] = json!([end, 0]);
        }),
        ("overflows", &|header| header[name]["data_offsets"] = json!([u64::MAX - 1, u64::MAX])),
        ("is negative", &|header| header[name]["data_offsets"][0] = json!(-4)),
        ("has more elements than bytes", &|header| header[name]["shape"] = json!([65])),
        ("has absurdly many elements", &|header| header[name]["shape"] = json!([1u64 << 60, 1u64 << 60])),
        ("has half the type", &|header| header[name]["dtype"] = json!("F16")),
        ("is not there", &|header| drop(header.as_object_mut().unwrap().remove(name))),
    ];
    let folder = Folder::llama();
    for (what, lie) in lies {
        folder.bytes("model.safetensors", &bytes_with(lie));
        let error = folder.open().unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{what}: {error}");
    }
    folder.bytes("model.safetensors", &bytes_with(&|header| header[name]["dtype"] = json!("I32")));
    let error = folder.open().unwrap_err();
    assert!(error.kind() == Kind::Unsupported && error.to_string().contains(name), "{error}");
    let whole = bytes_with(&|_| ());
    let cut = |end: usize| whole[..end].to_vec();
    let mut absurd = whole.clone();
    absurd[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut longer = whole.clone();
    longer.push(0);
    for bytes in [cut(7), cut(8), cut(100), cut(whole.len() - 1), absurd, longer] {
        folder.bytes("model.safetensors", &bytes);
        let error = folder.open().unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
    }
}

#[test]
fn config_json_that_cannot_work_is_named() {
    let cases = [
        ("architectures", json!([]), Kind::Corrupt),
        ("architectures", json!(["MambaForCausalLM"]), Kind::Unsupported),
        ("hidden_size", json!(null), Kind::Corrupt),
        ("hidden_size", json!("64"), Kind::Corrupt),
        ("hidden_size", json!(1u64 << 60), Kind::Corrupt),
        ("num_hidden_layers", json!(0), Kind::Corrupt),
        ("num_hidden_layers", json!(-1), Kind::Corrupt),
        ("num_hidden_layers", json!(3), Kind::Corrupt),
        ("num_hidden_layers", json!(1), Kind::Unsupported),
        ("num_attention_heads", json!(0), Kind::Corrupt),
        ("num_key_value_heads", json!(3), Kind::Corrupt),
        ("num_key_value_heads", json!(0), Kind::Corrupt),
        ("head_dim", json!(15), Kind::Corrupt),
        ("vocab_size", json!(266), Kind::Corrupt),
        ("rms_norm_eps", json!(0), Kind::Corrupt),
        ("rms_norm_eps", json!(1e300), Kind::Corrupt),
        ("rope_theta", json!(-1.0), Kind::Corrupt),
        ("rope_theta", json!(1e300), Kind::Corrupt),
        ("rope_scaling", json!({"rope_type": "longrope", "factor": 2.0}), Kind::Unsupported),
        ("rope_scaling", json!({"rope_type": "linear"}), Kind::Corrupt),
        ("rope_scaling", json!({"rope_type": "linear", "factor": -1}), Kind::Corrupt),
        ("rope_scaling", json!({"rope_type": "llama3", "factor": 8}), Kind::Corrupt),
        ("hidden_act", json!("gelu"), Kind::Unsupported),
        ("mlp_bias", json!(true), Kind::Unsupported),
        ("quantization_config", json!({"quant_method": "gptq"}), Kind::Unsupported),
        ("tie_word_embeddings", json!(false), Kind::Corrupt),
        ("attention_bias", json!(true), Kind::Corrupt),
    ];
    for (field, value, kind) in cases {
        let error = Folder::with_config(|config| config[field] = value.clone()).unwrap_err();
        assert_eq!(error.kind(), kind, "{field} = {value}: {error}");
    }
}

#[test]
fn rope_of_a_directory_is_read() {
    let rope = |field: &str, value: Value| {
        let info = Folder::with_config(|config| config[field] = value.clone()).unwrap().info;
        (info.config.rope.scaling, info.config.context_tokens)
    };
    assert_eq!(
        rope("rope_scaling", json!({"type": "linear", "factor": 2.0})),
        (RopeScaling::Linear { factor: 2.0 }, 8192)
    );
    assert_eq!(
        rope("rope_scaling", json!({"rope_type": "dynamic", "factor": 2.0})),
        (RopeScaling::Ntk { factor: 3.0 }, 8192)
    );
    assert_eq!(rope("rope_scaling", json!({"rope_type": "default"})), (RopeScaling::None, 4096));
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024});
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 1024,
    };
    assert_eq!(rope("rope_scaling", llama3), (expected, 4096));
    let yarn = |attention_factor| RopeScaling::Yarn {
        factor: 4.0,
        original_context: 2048,
        attention_factor,
        beta_fast: 32.0,
        beta_slow: 1.0,
    };
    let json_yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048});
    assert_eq!(rope("rope_scaling", json_yarn), (yarn(None), 8192));
    let newer = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "attention_factor": 1.5, "rope_theta": 7.0});
    assert_eq!(rope("rope_parameters", newer.clone()), (yarn(Some(1.5)), 8192));
    let info = Folder::with_config(|config| config["rope_parameters"] = newer.clone()).unwrap().info;
    assert_eq!(info.config.rope.theta, 7.0);
    assert_eq!(rope("sliding_window", json!(1000)), (RopeScaling::None, 1000));
}
