//! Vocabularies small enough to know every answer by hand, and the ways in which files describe them wrongly. The real
//! vocabulary is in `tests/smollm2.rs`.

use proptest::prelude::*;

use super::*;
use crate::files::gguf::Gguf;
use crate::testing::{GgufWriter, MetadataValue, TinyOptions, tiny_gguf};

fn from_gguf(writer: &GgufWriter) -> Result<Tokenizer, Fault> {
    let bytes = writer.bytes();
    Tokenizer::from_gguf(&Gguf::parse(&bytes)?.metadata)
}

fn tiny() -> Tokenizer {
    from_gguf(&tiny_gguf(&TinyOptions::default())).unwrap()
}

/// A SentencePiece vocabulary: bytes, single letters, and pieces with scores.
fn sentence_piece() -> GgufWriter {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    let mut types = vec![2, 3, 3];
    types.extend([6; 256]);
    let mut scores = vec![0.0; tokens.len()];
    for (piece, score) in
        [("▁", -9.0), ("a", -8.0), ("b", -8.0), ("ab", -1.0), ("ba", -2.0), ("▁a", -3.0), ("▁ab", -4.0)]
    {
        tokens.push(piece.to_owned());
        types.push(1);
        scores.push(score);
    }
    tokens.push("<tool>".into());
    types.push(4);
    scores.push(0.0);
    let mut writer = GgufWriter::default();
    writer.set("tokenizer.ggml.model", "llama");
    writer.set("tokenizer.ggml.tokens", MetadataValue::Texts(tokens));
    writer.set("tokenizer.ggml.token_type", MetadataValue::Integers(types));
    writer.set("tokenizer.ggml.scores", MetadataValue::Floats(scores));
    writer.set("tokenizer.ggml.bos_token_id", 1);
    writer.set("tokenizer.ggml.eos_token_id", 2);
    writer
}

fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let piece = |id: &u32| String::from_utf8_lossy(&tokenizer.decode_piece_with_control(*id)).into_owned();
    ids.iter().map(piece).collect()
}

#[test]
fn byte_level_merges_and_control_tokens_work() {
    let tokenizer = tiny();
    let ids = tokenizer.encode("hello the12<|im_end|>é", SpecialTokens::Add).unwrap();
    let cut: Vec<Vec<u8>> = ids.iter().map(|id| tokenizer.decode_piece_with_control(*id)).collect();
    let expected: [&[u8]; 7] = [b"hello", b" the", b"1", b"2", b"<|im_end|>", b"\xc3", b"\xa9"];
    assert_eq!(cut, expected);
    assert_eq!(tokenizer.decode(&ids), "hello the12é");
    assert_eq!((tokenizer.eos_ids(), tokenizer.bos_id()), (&[0, 2][..], Some(1)));
    assert_eq!((tokenizer.vocabulary(), tokenizer.longest_token_bytes()), (267, 13));
    assert!(tokenizer.is_control(2) && tokenizer.decode_piece(2).is_empty());
    assert!(tokenizer.decode_piece(u32::MAX).is_empty());
}

#[test]
fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
    let tokenizer = from_gguf(&sentence_piece()).unwrap();
    let encode = |text| pieces(&tokenizer, &tokenizer.encode(text, SpecialTokens::Skip).unwrap());
    // "ab" has the best score, so it is made before "▁a".
    assert_eq!(encode("ab"), [" ab"]);
    assert_eq!(encode("aba b"), [" ab", "a", " ", "b"]);
    assert_eq!(encode("bab"), [" ", "b", "ab"]);
    let ids = tokenizer.encode("aé<tool>", SpecialTokens::Add).unwrap();
    assert_eq!(ids[0], 1, "the beginning token is added by default");
    assert_eq!(tokenizer.decode(&ids), " aé<tool>");
    let twice = tokenizer.encode("<s>a", SpecialTokens::Add).unwrap();
    assert_eq!(pieces(&tokenizer, &twice), ["<s>", " a"], "the beginning token is not doubled");
}

#[test]
fn flags_decide_what_frames_a_text() {
    let mut writer = sentence_piece();
    writer.set("tokenizer.ggml.add_bos_token", MetadataValue::Bool(false));
    writer.set("tokenizer.ggml.add_eos_token", MetadataValue::Bool(true));
    writer.set("tokenizer.ggml.add_space_prefix", MetadataValue::Bool(false));
    let tokenizer = from_gguf(&writer).unwrap();
    let framed = tokenizer.encode("a", SpecialTokens::Add).unwrap();
    assert_eq!(pieces(&tokenizer, &framed), ["a", "</s>"]);
    assert_eq!(tokenizer.encode("", SpecialTokens::Add).unwrap(), [2]);
    assert_eq!(pieces(&tokenizer, &tokenizer.encode("a", SpecialTokens::Skip).unwrap()), ["a"]);
}

#[test]
fn long_runs_of_one_character_are_tokenized_whole() {
    let mut writer = tiny_gguf(&TinyOptions::default());
    for splitter in ["smollm", "gpt-2", "llama-bpe", "qwen2", "tekken"] {
        writer.set("tokenizer.ggml.pre", splitter);
        let tokenizer = from_gguf(&writer).unwrap();
        for character in [" ", "\n", "a", "!", "1", "é"] {
            let text = format!("x{}y", character.repeat(300_000));
            let ids = tokenizer.encode(&text, SpecialTokens::Skip).unwrap();
            assert!(tokenizer.decode(&ids) == text, "{splitter} {character:?}");
        }
    }
}

#[test]
fn unknown_kinds_are_named_with_what_would_work() {
    let mut writer = tiny_gguf(&TinyOptions::default());
    writer.set("tokenizer.ggml.pre", "chameleon");
    let fault = from_gguf(&writer).unwrap_err();
    assert!(
        matches!(&fault, Fault::Unsupported { feature, hint }
        if feature.contains("`chameleon`") && hint.contains("smollm")),
        "{fault:?}"
    );
    writer.set("tokenizer.ggml.model", "bert");
    let fault = from_gguf(&writer).unwrap_err();
    assert!(matches!(&fault, Fault::Unsupported { feature, .. } if feature.contains("`bert`")), "{fault:?}");
}

#[test]
fn damaged_vocabularies_are_refused_by_field() {
    let texts = |texts: &[&str]| MetadataValue::Texts(texts.iter().map(|text| (*text).to_owned()).collect());
    let cases: [(&str, Option<MetadataValue>, &str); 16] = [
        ("tokenizer.ggml.model", None, "tokenizer.ggml.model"),
        ("tokenizer.ggml.model", Some(1.into()), "tokenizer.ggml.model"),
        ("tokenizer.ggml.tokens", None, "tokenizer.ggml.tokens"),
        ("tokenizer.ggml.tokens", Some(texts(&[])), "tokenizer.ggml.tokens"),
        ("tokenizer.ggml.tokens", Some(MetadataValue::Integers(vec![1])), "tokenizer.ggml.tokens"),
        ("tokenizer.ggml.tokens", Some(texts(&["a"])), "tokenizer.ggml.token_type"),
        (
            "tokenizer.ggml.token_type",
            Some(MetadataValue::Integers(vec![7; 267])),
            "tokenizer.ggml.token_type",
        ),
        (
            "tokenizer.ggml.token_type",
            Some(MetadataValue::Integers(vec![-1; 267])),
            "tokenizer.ggml.token_type",
        ),
        ("tokenizer.ggml.merges", None, "tokenizer.ggml.merges"),
        ("tokenizer.ggml.merges", Some(texts(&["nospace"])), "tokenizer.ggml.merges"),
        ("tokenizer.ggml.merges", Some(texts(&["a b"])), "tokenizer.ggml.merges"),
        ("tokenizer.ggml.merges", Some(texts(&["zz b"])), "tokenizer.ggml.merges"),
        ("tokenizer.ggml.bos_token_id", Some(267.into()), "tokenizer.ggml.bos_token_id"),
        ("tokenizer.ggml.eos_token_id", Some(u32::MAX.into()), "tokenizer.ggml.eos_token_id"),
        ("tokenizer.ggml.eot_token_id", Some(MetadataValue::I32(-1)), "tokenizer.ggml.eot_token_id"),
        ("tokenizer.ggml.add_bos_token", Some(1.into()), "tokenizer.ggml.add_bos_token"),
    ];
    for (key, value, blamed) in cases {
        let mut writer = tiny_gguf(&TinyOptions::default());
        match &value {
            Some(value) => writer.set(key, value.clone()),
            None => writer.unset(key),
        }
        let fault = from_gguf(&writer).unwrap_err();
        assert!(
            matches!(&fault, Fault::Corrupt { field, .. } if field == blamed),
            "{key} {value:?}: {fault:?}"
        );
    }
    for scores in [vec![0.0; 3], vec![f32::NAN; sentence_piece_size()]] {
        let mut writer = sentence_piece();
        writer.set("tokenizer.ggml.scores", MetadataValue::Floats(scores));
        assert!(
            matches!(from_gguf(&writer), Err(Fault::Corrupt { field, .. }) if field == "tokenizer.ggml.scores")
        );
    }
}

fn sentence_piece_size() -> usize {
    from_gguf(&sentence_piece()).unwrap().vocabulary()
}

fn json(edit: impl Fn(&mut serde_json::Value)) -> Vec<u8> {
    let mut vocab = serde_json::Map::new();
    for (id, character) in byte_level_chars().into_iter().enumerate() {
        vocab.insert(character.to_string(), id.into());
    }
    vocab.insert("he".into(), 256.into());
    let mut value = serde_json::json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [
            {"id": 257, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
            {"id": 258, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
            {"id": 259, "content": "<tool>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": false}
        ],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}}
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [["h", "e"]]}
    });
    edit(&mut value);
    serde_json::to_vec(&value).unwrap()
}

fn json_tokens() -> JsonTokens {
    JsonTokens { bos: Some("<s>".into()), eos: Some("</s>".into()), eos_ids: vec![258, 259], add_bos: None }
}

#[test]
fn tokenizer_json_works_with_its_frame() {
    let tokenizer = Tokenizer::from_json(&json(|_| ()), &json_tokens()).unwrap();
    let ids = tokenizer.encode("hé hehe<tool></s>", SpecialTokens::Add).unwrap();
    assert_eq!(pieces(&tokenizer, &ids)[..2], ["<s>", "h"], "{ids:?}");
    assert_eq!(ids.len(), 9, "the file's truncation to two tokens is not applied");
    assert_eq!(tokenizer.decode(&ids), "hé hehe<tool>");
    assert_eq!(tokenizer.encode("<s>a", SpecialTokens::Add).unwrap(), [257, u32::from(b'a')]);
    assert_eq!(
        (tokenizer.eos_ids(), tokenizer.bos_id(), tokenizer.vocabulary()),
        (&[258, 259][..], Some(257), 260)
    );
    let without = JsonTokens { add_bos: Some(false), ..json_tokens() };
    let tokenizer = Tokenizer::from_json(&json(|_| ()), &without).unwrap();
    assert_eq!(tokenizer.encode("a", SpecialTokens::Add).unwrap(), [u32::from(b'a')]);
    let bare = json(|value| value["post_processor"] = serde_json::Value::Null);
    let with = JsonTokens { add_bos: Some(true), ..json_tokens() };
    let tokenizer = Tokenizer::from_json(&bare, &with).unwrap();
    assert_eq!(tokenizer.encode("a", SpecialTokens::Add).unwrap(), [257, u32::from(b'a')]);
}

#[test]
fn damaged_tokenizer_json_is_refused() {
    type Edit = fn(&mut serde_json::Value);
    let cases: [(&str, Edit); 9] = [
        ("merge", |value| value["model"]["merges"] = serde_json::json!([["h", "x"]])),
        ("merge", |value| value["model"]["merges"] = serde_json::json!(["he"])),
        ("valid id", |value| value["model"]["vocab"]["h"] = serde_json::json!(4_000_000_000u64)),
        ("valid id", |value| value["model"]["vocab"]["h"] = serde_json::json!(-1)),
        ("wrong id", |value| value["added_tokens"][0]["id"] = serde_json::json!(4_000_000_000u64)),
        ("broken", |value| value["version"] = serde_json::json!("9")),
        (
            "broken",
            |value| value["pre_tokenizer"] = serde_json::json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}),
        ),
        ("no `model.vocab`", |value| value["model"]["vocab"] = serde_json::json!([1])),
        ("broken", |value| *value = serde_json::json!([])),
    ];
    for (expected, edit) in cases {
        let fault = Tokenizer::from_json(&json(edit), &json_tokens()).unwrap_err();
        assert!(
            matches!(&fault, Fault::Corrupt { problem, .. } if problem.contains(expected)),
            "{expected}: {fault:?}"
        );
    }
    let unsupported: [Edit; 3] = [
        |value| value["model"]["type"] = serde_json::json!("WordPiece"),
        |value| value["model"]["continuing_subword_prefix"] = serde_json::json!("##"),
        |value| value["decoder"] = serde_json::json!({"type": "WordPiece"}),
    ];
    for edit in unsupported {
        let fault = Tokenizer::from_json(&json(edit), &json_tokens()).unwrap_err();
        assert!(matches!(fault, Fault::Unsupported { .. }), "{fault:?}");
    }
    let beyond = JsonTokens { eos_ids: vec![260], ..json_tokens() };
    assert!(
        matches!(Tokenizer::from_json(&json(|_| ()), &beyond), Err(Fault::Corrupt { field, .. }) if field == "eos_token_id")
    );
    let whole = json(|_| ());
    for end in (0..whole.len()).step_by(97) {
        assert!(Tokenizer::from_json(&whole[..end], &json_tokens()).is_err(), "cut at {end}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_text_survives_both_vocabularies(text in any::<String>()) {
        let tokenizer = tiny();
        let ids = tokenizer.encode(&text, SpecialTokens::Skip).unwrap();
        prop_assert!(tokenizer.decode(&ids) == text);
        let mut stream = TextStream::new();
        let mut streamed: String = ids.iter().map(|id| stream.push(&tokenizer, *id)).collect();
        streamed.push_str(&stream.finish());
        prop_assert_eq!(streamed.as_str(), text.as_str());
        let tokenizer = from_gguf(&sentence_piece()).unwrap();
        let ids = tokenizer.encode(&text, SpecialTokens::Skip).unwrap();
        let expected = if text.is_empty() { text } else { format!(" {}", text.replace('▁', " ")) };
        prop_assert_eq!(tokenizer.decode(&ids), expected);
    }
}
