//! The default model, as `longshore model pull` leaves it in the cache.

#[path = "support/default_model.rs"]
mod default_model;

use longshore_model::{
    LayerWeight, LoadProgress, LoadedModel, ModelInfo, RopeScaling, RopeStyle, SpecialTokens, TextStream,
    WeightName,
};
use serde_json::Value;

use default_model::{MODEL, model_path};

#[test]
fn the_file_says_what_it_is() {
    let info = &MODEL.info;
    let config = &info.config;
    assert_eq!(
        (config.architecture.as_str(), config.layers, config.hidden, config.ffn),
        ("llama", 30, 576, 1536)
    );
    assert_eq!((config.heads.kv_heads, config.heads.group, config.heads.head_dim), (3, 3, 64));
    assert_eq!((config.vocabulary, config.context_tokens, config.norm_eps), (49_152, 8_192, 1e-5));
    assert_eq!(
        (config.rope.theta, config.rope.dim, config.rope.style),
        (100_000.0, 64, RopeStyle::Interleaved)
    );
    assert_eq!(config.rope.scaling, RopeScaling::None);
    assert!(config.tied_embeddings && !config.qkv_bias && !config.qk_norm);
    assert_eq!((info.quantization.as_str(), info.tensors, info.parameters), ("Q4_1", 272, 134_515_008));
    assert_eq!(info.file_bytes, 98_362_432);
    assert_eq!((info.tokenizer.bos_id(), info.tokenizer.eos_ids()), (Some(1), &[0, 2][..]));
}

#[test]
fn the_digest_does_not_depend_on_where_the_file_lies() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("renamed.gguf");
    std::fs::copy(model_path(), &copy).unwrap();
    let last = std::cell::Cell::new(LoadProgress { done_bytes: 0, total_bytes: 0 });
    let info = LoadedModel::open(&copy, &|progress| last.set(progress)).unwrap().info;
    assert_eq!(info.digest, MODEL.info.digest);
    assert_eq!(last.get(), LoadProgress { done_bytes: info.file_bytes, total_bytes: info.file_bytes });
    let mut bytes = std::fs::read(&copy).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&copy, bytes).unwrap();
    assert_ne!(ModelInfo::open(&copy).unwrap().digest, MODEL.info.digest);
}

#[test]
fn weights_have_their_shapes_and_plausible_values() {
    let shape = |name| {
        let matrix = MODEL.weights.tensor(name).unwrap();
        let rms =
            (matrix.data.iter().map(|x| f64::from(x * x)).sum::<f64>() / matrix.data.len() as f64).sqrt();
        assert!((1e-3..30.0).contains(&rms), "{name:?} has the root mean square {rms}");
        (matrix.rows, matrix.cols)
    };
    assert_eq!(shape(WeightName::Embedding), (49_152, 576));
    assert_eq!(shape(WeightName::Output), (49_152, 576));
    assert_eq!(shape(WeightName::OutputNorm), (1, 576));
    assert_eq!(shape(WeightName::Layer(29, LayerWeight::K)), (192, 576));
    assert_eq!(shape(WeightName::Layer(0, LayerWeight::Down)), (576, 1536));
    assert!(MODEL.weights.contains(WeightName::Output) && !MODEL.weights.contains(WeightName::RopeFreqs));
    let error = MODEL.weights.tensor(WeightName::Layer(30, LayerWeight::Q)).unwrap_err();
    assert!(error.to_string().ends_with("`blk.30.attn_q.weight` is missing"), "{error}");
}

#[test]
fn token_ids_are_those_of_the_reference() {
    let extract: Value = serde_json::from_str(include_str!("extracts/tokens.json")).unwrap();
    let cases = extract.as_array().unwrap();
    assert!(cases.len() > 30);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let expected: Vec<u32> =
            case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        let ids = MODEL.info.tokenizer.encode(text, SpecialTokens::Add).unwrap();
        assert_eq!(ids, expected, "{text:?}");
    }
}

#[test]
fn texts_come_back_whole_and_streamed() {
    let tokenizer = &MODEL.info.tokenizer;
    let extract: Value = serde_json::from_str(include_str!("extracts/tokens.json")).unwrap();
    for case in extract.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids = tokenizer.encode(text, SpecialTokens::Skip).unwrap();
        let control = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"];
        let shown = control.iter().fold(text.to_owned(), |text, name| text.replace(name, ""));
        assert_eq!(tokenizer.decode(&ids), shown);
        let mut stream = TextStream::new();
        let mut streamed: String = ids.iter().map(|id| stream.push(tokenizer, *id)).collect();
        streamed.push_str(&stream.finish());
        assert_eq!(streamed, shown);
    }
    let longest = (0..49_152).map(|id| tokenizer.decode_piece_with_control(id).len()).max();
    assert_eq!(longest, Some(tokenizer.longest_token_bytes()));
}

#[test]
fn a_conversation_becomes_a_prompt() {
    let template = MODEL.info.chat_template.as_ref().unwrap();
    let prompt = template.render(&[("user", "Hi")], true).unwrap();
    let system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
    assert_eq!(
        prompt,
        format!(
            "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
    );
    let ids = MODEL.info.tokenizer.encode(&prompt, SpecialTokens::Add).unwrap();
    assert_eq!((ids[0], ids.iter().filter(|id| **id == 1).count()), (1, 3));
}
