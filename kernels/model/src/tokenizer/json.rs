//! A tokenizer from Hugging Face's `tokenizer.json`.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;
use serde_json::Value;

use super::pieces::{Pieces, Role, Spelling};
use super::{Ends, Frame, Tokenizer};
use crate::files::fault::{Fault, quote};

/// Ids beyond this are a lie: they would size tables.
const ID_MAX: u32 = 1 << 22;

/// What the other files of a model say of its tokens.
#[derive(Debug, Default)]
pub(crate) struct JsonTokens {
    /// Text of the beginning-of-sequence token.
    pub(crate) bos: Option<String>,
    /// Text of the end-of-sequence token.
    pub(crate) eos: Option<String>,
    /// Ids that end a generation.
    pub(crate) eos_ids: Vec<u64>,
    /// Whether the beginning token is added, where the model says so outside `tokenizer.json`.
    pub(crate) add_bos: Option<bool>,
}

/// The parts of `tokenizer.json` that are checked before the file is believed.
#[derive(Deserialize)]
struct Outline {
    model: Model,
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    vocab: Value,
    #[serde(default)]
    merges: Vec<Merge>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Line(String),
    Pair(String, String),
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

/// Text of a token in `tokenizer_config.json`: a string, or an object with `content`.
pub(crate) fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

impl Tokenizer {
    /// Builds the tokenizer that `tokenizer.json` describes.
    pub(crate) fn from_json(bytes: &[u8], tokens: &JsonTokens) -> Result<Self, Fault> {
        let fault = |problem: String| Fault::corrupt("tokenizer.json", problem);
        let broken =
            |error: &dyn std::fmt::Display| fault(format!("is broken: {}", quote(&error.to_string())));
        let outline: Outline = serde_json::from_slice(bytes).map_err(|error| broken(&error))?;
        let by_id = check(&outline)?;
        let spelling = spelling(&outline.decoder)?;
        let mut encoder = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| broken(&error))?;
        let frame = frame(&encoder, tokens)?;
        // Cutting long prompts short or padding short ones is for batches of training texts.
        encoder.with_truncation(None).map_err(|error| broken(&error))?;
        encoder.with_padding(None);
        let id_of = |text: &Option<String>| text.as_ref().and_then(|text| encoder.token_to_id(text));
        let bos = id_of(&tokens.bos);
        let eos = id_of(&tokens.eos);
        let mut eos_ids = Vec::new();
        let count = by_id.last_key_value().map_or(0, |(id, _)| id + 1);
        for id in &tokens.eos_ids {
            let id = u32::try_from(*id).ok().filter(|id| *id < count);
            eos_ids.push(id.ok_or_else(|| {
                Fault::corrupt("eos_token_id", format!("is beyond the vocabulary of {count}"))
            })?);
        }
        let rows =
            (0..count).map(|id| by_id.get(&id).map_or(("", Role::Unused), |(text, role)| (*text, *role)));
        let pieces = Pieces::new(spelling, rows);
        Ok(Self::new(encoder, pieces, Ends { bos, eos, eos_ids }, frame))
    }
}

/// Checks what the tokenizers crate takes on faith, and gives every token by its id.
fn check(outline: &Outline) -> Result<BTreeMap<u32, (&str, Role)>, Fault> {
    let fault = |problem: String| Fault::corrupt("tokenizer.json", problem);
    let model = &outline.model;
    let kind = model.kind.as_deref().unwrap_or("BPE");
    let affixed = [&model.continuing_subword_prefix, &model.end_of_word_suffix]
        .into_iter()
        .any(|affix| affix.as_ref().is_some_and(|affix| !affix.is_empty()));
    if kind != "BPE" || affixed {
        let feature =
            format!("a tokenizer of kind `{}`{}", quote(kind), if affixed { " with affixes" } else { "" });
        return Err(Fault::unsupported(feature, "supported tokenizers are BPE without affixes"));
    }
    let vocab = model.vocab.as_object().ok_or_else(|| fault("has no `model.vocab` object".into()))?;
    let mut ids: HashMap<&str, u32> = HashMap::with_capacity(vocab.len());
    for (text, id) in vocab {
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|id| *id < ID_MAX);
        let id = id.ok_or_else(|| fault(format!("has no valid id for the token `{}`", quote(text))))?;
        ids.insert(text, id);
    }
    for merge in &model.merges {
        let pair = match merge {
            Merge::Line(line) => line.split_once(' '),
            Merge::Pair(left, right) => Some((left.as_str(), right.as_str())),
        };
        let whole = pair.map(|(left, right)| [left, right].concat());
        if !whole.is_some_and(|whole| ids.contains_key(whole.as_str())) {
            let shown = pair.map_or(String::new(), |(left, right)| format!("{left} {right}"));
            return Err(fault(format!("has the merge `{}`, which gives no token", quote(&shown))));
        }
    }
    let mut by_id: BTreeMap<u32, (&str, Role)> =
        ids.iter().map(|(text, id)| (*id, (*text, Role::Text))).collect();
    for added in &outline.added_tokens {
        // The tokenizers crate numbers new tokens itself, so a number that disagrees would be another token.
        let agrees = ids.get(added.content.as_str()).is_none_or(|id| *id == added.id);
        if added.id >= ID_MAX || !agrees {
            return Err(fault(format!("gives the added token `{}` a wrong id", quote(&added.content))));
        }
        let role = if added.special { Role::Control } else { Role::Literal };
        by_id.insert(added.id, (&added.content, role));
    }
    Ok(by_id)
}

/// Recognises the decoders of byte-level and of SentencePiece vocabularies.
fn spelling(decoder: &Value) -> Result<Spelling, Fault> {
    let mut kinds = Vec::new();
    let parts = decoder.get("decoders").and_then(Value::as_array);
    for part in parts.map_or(std::slice::from_ref(decoder), Vec::as_slice) {
        kinds.extend(part.get("type").and_then(Value::as_str));
    }
    if kinds.contains(&"ByteLevel") {
        return Ok(Spelling::ByteLevel);
    }
    if kinds.iter().any(|kind| ["ByteFallback", "Metaspace"].contains(kind)) {
        return Ok(Spelling::SentencePiece);
    }
    let feature = format!("a tokenizer with the decoders [{}]", quote(&kinds.join(", ")));
    Err(Fault::unsupported(feature, "supported decoders are ByteLevel, and ByteFallback or Metaspace"))
}

/// What the post-processor puts around a text.
fn frame(encoder: &tokenizers::Tokenizer, tokens: &JsonTokens) -> Result<Frame, Fault> {
    let encode = |special| {
        let encoding = encoder.encode_fast("a", special);
        encoding.map(|encoding| encoding.get_ids().to_vec()).map_err(|error| {
            Fault::corrupt("tokenizer.json", format!("encodes nothing: {}", quote(&error.to_string())))
        })
    };
    let (plain, framed) = (encode(false)?, encode(true)?);
    let found = framed.windows(plain.len().max(1)).position(|window| window == plain);
    let mut frame = match found {
        Some(at) => Frame { before: framed[..at].to_vec(), after: framed[at + plain.len()..].to_vec() },
        None => Frame::default(),
    };
    let bos = tokens.bos.as_ref().and_then(|bos| encoder.token_to_id(bos));
    match (tokens.add_bos, bos) {
        (Some(true), Some(bos)) if !frame.before.contains(&bos) => frame.before.insert(0, bos),
        (Some(false), Some(bos)) => frame.before.retain(|id| *id != bos),
        _ => {}
    }
    Ok(frame)
}
