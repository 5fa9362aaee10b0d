//! A random decoder small enough for any test, with a byte-level vocabulary that can spell every text.

use std::path::Path;

use super::gguf::{GgufWriter, MetadataValue, StoredType};
use crate::tokenizer::byte_level_chars;

/// Architecture of a tiny model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TinyArchitecture {
    /// Llama: neither biases nor head norms.
    Llama,
    /// Qwen2: biases on q, k and v.
    Qwen2,
    /// Qwen3: norms of the heads of q and k.
    Qwen3,
}

impl TinyArchitecture {
    /// Name in the file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// Shape of a tiny model.
#[derive(Debug, Clone, PartialEq)]
pub struct TinyOptions {
    /// Architecture.
    pub architecture: TinyArchitecture,
    /// Seed of the weights.
    pub seed: u64,
    /// Layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub query_heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Positions that the model is made for.
    pub context_tokens: u32,
    /// The output matrix is the embedding.
    pub tied_embeddings: bool,
    /// Element type of the matrices.
    pub stored: StoredType,
    /// Name of the model.
    pub name: String,
}

impl Default for TinyOptions {
    fn default() -> Self {
        Self {
            architecture: TinyArchitecture::Llama,
            seed: 1,
            layers: 2,
            hidden: 64,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 16,
            ffn: 128,
            context_tokens: 4096,
            tied_embeddings: true,
            stored: StoredType::F32,
            name: "tiny".into(),
        }
    }
}

/// Control tokens, at the start of the vocabulary. Token 2 ends a generation.
const CONTROL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// Merges, so that encoding is more than spelling.
const MERGES: [(&str, &str); 8] =
    [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("Ġt", "he"), ("i", "n"), ("in", "g")];
/// A small version of the usual chat template.
const TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] \
    + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Writes a tiny model as a GGUF file.
pub fn write_tiny_gguf(path: &Path, options: &TinyOptions) -> std::io::Result<()> {
    std::fs::write(path, tiny_gguf(options).bytes())
}

/// A tiny model, ready to be bent and written.
pub fn tiny_gguf(options: &TinyOptions) -> GgufWriter {
    let mut writer = GgufWriter::default();
    let vocabulary = write_tokenizer(&mut writer);
    write_config(&mut writer, options);
    write_weights(&mut writer, options, vocabulary);
    writer
}

fn write_config(writer: &mut GgufWriter, options: &TinyOptions) {
    let name = options.architecture.name();
    writer.set("general.architecture", name);
    writer.set("general.name", options.name.as_str());
    let mut set = |key: &str, value: MetadataValue| writer.set(&format!("{name}.{key}"), value);
    set("block_count", (options.layers as u32).into());
    set("context_length", options.context_tokens.into());
    set("embedding_length", (options.hidden as u32).into());
    set("feed_forward_length", (options.ffn as u32).into());
    set("attention.head_count", (options.query_heads as u32).into());
    set("attention.head_count_kv", (options.kv_heads as u32).into());
    set("attention.key_length", (options.head_dim as u32).into());
    set("attention.value_length", (options.head_dim as u32).into());
    set("attention.layer_norm_rms_epsilon", 1e-5f32.into());
    set("rope.freq_base", 10_000.0f32.into());
    set("rope.dimension_count", (options.head_dim as u32).into());
}

/// Gives the size of the vocabulary.
fn write_tokenizer(writer: &mut GgufWriter) -> usize {
    let mut tokens: Vec<String> = CONTROL.map(str::to_owned).to_vec();
    tokens.extend(byte_level_chars().map(String::from));
    tokens.extend(MERGES.map(|(left, right)| [left, right].concat()));
    let types = (0..tokens.len()).map(|id| if id < CONTROL.len() { 3 } else { 1 }).collect();
    let count = tokens.len();
    writer.set("tokenizer.ggml.model", "gpt2");
    writer.set("tokenizer.ggml.pre", "smollm");
    writer.set("tokenizer.ggml.tokens", MetadataValue::Texts(tokens));
    writer.set("tokenizer.ggml.token_type", MetadataValue::Integers(types));
    let merges = MERGES.map(|(left, right)| format!("{left} {right}")).to_vec();
    writer.set("tokenizer.ggml.merges", MetadataValue::Texts(merges));
    writer.set("tokenizer.ggml.bos_token_id", 1);
    writer.set("tokenizer.ggml.eos_token_id", 2);
    writer.set("tokenizer.ggml.add_bos_token", MetadataValue::Bool(false));
    writer.set("tokenizer.chat_template", TEMPLATE);
    count
}

fn write_weights(writer: &mut GgufWriter, options: &TinyOptions, vocabulary: usize) {
    let mut random = SplitMix(options.seed);
    let (hidden, ffn, head_dim) = (options.hidden, options.ffn, options.head_dim);
    let (q, kv) = (options.query_heads * head_dim, options.kv_heads * head_dim);
    let mut matrix = |writer: &mut GgufWriter, name: &str, rows: usize, cols: usize| {
        // Rows of unit length keep activations of order one through any number of layers.
        let data = random.normals(rows * cols, 1.0 / (cols as f32).sqrt());
        writer.tensor(name, &[rows, cols], options.stored, &data);
    };
    matrix(writer, "token_embd.weight", vocabulary, hidden);
    if !options.tied_embeddings {
        matrix(writer, "output.weight", vocabulary, hidden);
    }
    for layer in 0..options.layers {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        matrix(writer, &name("attn_q"), q, hidden);
        matrix(writer, &name("attn_k"), kv, hidden);
        matrix(writer, &name("attn_v"), kv, hidden);
        matrix(writer, &name("attn_output"), hidden, q);
        matrix(writer, &name("ffn_gate"), ffn, hidden);
        matrix(writer, &name("ffn_up"), ffn, hidden);
        matrix(writer, &name("ffn_down"), hidden, ffn);
    }
    let mut vector = |writer: &mut GgufWriter, name: &str, len: usize, mean: f32| {
        let data: Vec<f32> = random.normals(len, 0.1).into_iter().map(|x| mean + x).collect();
        writer.tensor(name, &[len], StoredType::F32, &data);
    };
    vector(writer, "output_norm.weight", hidden, 1.0);
    for layer in 0..options.layers {
        let name = |part: &str| format!("blk.{layer}.{part}");
        vector(writer, &name("attn_norm.weight"), hidden, 1.0);
        vector(writer, &name("ffn_norm.weight"), hidden, 1.0);
        match options.architecture {
            TinyArchitecture::Llama => {}
            TinyArchitecture::Qwen2 => {
                vector(writer, &name("attn_q.bias"), q, 0.0);
                vector(writer, &name("attn_k.bias"), kv, 0.0);
                vector(writer, &name("attn_v.bias"), kv, 0.0);
            }
            TinyArchitecture::Qwen3 => {
                vector(writer, &name("attn_q_norm.weight"), head_dim, 1.0);
                vector(writer, &name("attn_k_norm.weight"), head_dim, 1.0);
            }
        }
    }
}

/// SplitMix64: the same seed gives the same weights on every machine.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// About normal, as the sum of four uniform numbers; needs no function whose last bit differs between machines.
    fn normals(&mut self, count: usize, deviation: f32) -> Vec<f32> {
        let scale = f64::from(deviation) * 3.0f64.sqrt() / f64::from(1u32 << 16);
        let mut normal = || {
            let bits = self.next();
            let sum: u64 = (0..4).map(|part| bits >> (16 * part) & 0xffff).sum();
            ((sum as f64 - 2.0 * 65_535.0) * scale) as f32
        };
        (0..count).map(|_| normal()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_deterministic_and_about_normal() {
        let data = SplitMix(7).normals(100_000, 0.5);
        assert_eq!(data[..100], SplitMix(7).normals(100, 0.5));
        let mean = data.iter().sum::<f32>() / 1e5;
        let variance = data.iter().map(|x| x * x).sum::<f32>() / 1e5;
        assert!(mean.abs() < 0.01 && (variance - 0.25).abs() < 0.01, "mean {mean}, variance {variance}");
        assert_ne!(tiny_gguf(&TinyOptions::default()).bytes(), {
            tiny_gguf(&TinyOptions { seed: 2, ..TinyOptions::default() }).bytes()
        });
    }
}
