//! The files of a recall model: `config.json`, `tokenizer.json`, `tokenizer_config.json`, `model.safetensors`.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::{
    CONTEXT_TOKENS, RecallOptions, THETA,
    weights::{FFN, Layout, NORM_EPS, Tensor},
};

/// Writes all files; `config.json` last, since its presence says that the folder is complete.
pub(super) fn write(
    folder: &Path,
    options: &RecallOptions,
    layout: &Layout,
    tensors: &[Tensor],
) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let put = |name: &str, value: &Value| {
        let text = serde_json::to_vec_pretty(value).context("a configuration is JSON")?;
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    let weights = folder.join("model.safetensors");
    safetensors(&weights, tensors).with_context(|| format!("cannot write {}", weights.display()))?;
    put("tokenizer.json", &tokenizer(layout))?;
    put("tokenizer_config.json", &json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}))?;
    put("config.json", &config(options, layout))
}

fn config(options: &RecallOptions, layout: &Layout) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "_name_or_path": "recall",
        "hidden_size": layout.hidden,
        "intermediate_size": FFN,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.kv_heads * options.group,
        "num_key_value_heads": options.kv_heads,
        "head_dim": options.head_dim,
        "vocab_size": layout.vocabulary.len(),
        "max_position_embeddings": CONTEXT_TOKENS,
        "rope_theta": THETA,
        "rms_norm_eps": NORM_EPS,
        "tie_word_embeddings": false,
        "hidden_act": "silu",
        "bos_token_id": layout.vocabulary.bos,
        "eos_token_id": layout.vocabulary.eos,
        // How it was made; nobody reads it.
        "recall": {"seed": options.seed, "sharpness": options.sharpness},
    })
}

/// Words are added tokens, which take the space before them along; everything else is spelled in bytes.
fn tokenizer(layout: &Layout) -> Value {
    let first = layout.vocabulary.bos;
    let spelled: Map<String, Value> =
        byte_level_chars().into_iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
    let word = |(i, (content, special)): (usize, (String, bool))| {
        json!({
            "id": first as usize + i, "content": content, "special": special, "single_word": !special,
            "lstrip": true, "rstrip": false, "normalized": false,
        })
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": layout.vocabulary.words().into_iter().enumerate().map(word).collect::<Vec<_>>(),
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false, "byte_fallback": false,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "vocab": spelled, "merges": [],
        },
    })
}

/// GPT-2's table: printable Latin-1 bytes stand for themselves, the others for U+0100 and up in their order.
fn byte_level_chars() -> Vec<char> {
    let mut others = (256u32..).filter_map(char::from_u32);
    let printable = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let spell = |byte: u8| {
        if printable(byte) { char::from(byte) } else { others.next().expect("there are more characters") }
    };
    (0..=255).map(spell).collect()
}

fn safetensors(path: &Path, tensors: &[Tensor]) -> std::io::Result<()> {
    let (mut header, mut offset) = (Map::new(), 0);
    for tensor in tensors {
        let end = offset + size_of_val(tensor.data.as_slice());
        let about = json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end]});
        header.insert(tensor.name.clone(), about);
        offset = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    // The data begin on a multiple of 8.
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for value in tensors.iter().flat_map(|tensor| &tensor.data) {
        file.write_all(&value.to_le_bytes())?;
    }
    file.flush()
}
