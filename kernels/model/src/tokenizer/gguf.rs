//! A tokenizer from GGUF metadata: the vocabulary and merges of byte-level BPE (`gpt2`), or the pieces and scores of
//! SentencePiece BPE (`llama`).

use std::collections::HashMap;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::pieces::{Pieces, Role, Spelling};
use super::{Ends, Frame, Tokenizer};
use crate::files::fault::{Fault, quote};
use crate::files::gguf::{Array, Metadata, Value};

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";
const VOCABULARY_MAX: usize = 1 << 22;

/// Names under which models end a turn. Converters often write only one end token into the metadata, so any control token
/// of these names ends a generation too.
const END_NAMES: [&str; 9] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<|return|>",
    "<EOT>",
];

type Built<T> = Result<T, Fault>;

impl Tokenizer {
    /// Builds the tokenizer that the metadata describes.
    pub(crate) fn from_gguf(metadata: &Metadata<'_>) -> Built<Self> {
        let model = metadata.text("tokenizer.ggml.model")?;
        let vocabulary = Vocabulary::read(metadata)?;
        let recipe = match model {
            Some("gpt2") => byte_level(metadata, &vocabulary)?,
            Some("llama") => sentence_piece(metadata, &vocabulary)?,
            Some(other) => {
                let feature = format!("`tokenizer.ggml.model` `{}`", quote(other));
                return Err(Fault::unsupported(feature, "supported tokenizers are gpt2 and llama"));
            }
            None => return Err(Fault::corrupt("tokenizer.ggml.model", "is missing")),
        };
        let encoder = assemble(recipe.parts, &vocabulary).map_err(|error| {
            Fault::corrupt(TOKENS, format!("give no working tokenizer: {}", quote(&error.to_string())))
        })?;
        let roles = vocabulary.texts.iter().copied().zip(vocabulary.roles.iter().copied());
        let pieces = Pieces::new(recipe.spelling, roles);
        let bos = vocabulary.id(metadata, "tokenizer.ggml.bos_token_id")?;
        let eos = vocabulary.id(metadata, "tokenizer.ggml.eos_token_id")?;
        let frame = Frame {
            before: framing(metadata, "tokenizer.ggml.add_bos_token", recipe.adds_bos, bos)?,
            after: framing(metadata, "tokenizer.ggml.add_eos_token", false, eos)?,
        };
        let ends = Ends { bos, eos, eos_ids: vocabulary.end_ids(metadata)? };
        Ok(Self::new(encoder, pieces, ends, frame))
    }
}

/// The token that a flag asks for around texts.
fn framing(metadata: &Metadata<'_>, flag: &str, default: bool, id: Option<u32>) -> Built<Vec<u32>> {
    match (metadata.boolean(flag)?, id) {
        (Some(true), None) => Err(Fault::corrupt(flag, "is true, where no such token is named")),
        (flag, id) => Ok(id.filter(|_| flag.unwrap_or(default)).into_iter().collect()),
    }
}

/// Tokens by id.
struct Vocabulary<'a> {
    texts: Vec<&'a str>,
    roles: Vec<Role>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &Metadata<'a>) -> Built<Self> {
        let tokens = metadata.array(TOKENS)?.ok_or_else(|| Fault::corrupt(TOKENS, "is missing"))?;
        if tokens.count == 0 || tokens.count > VOCABULARY_MAX {
            let problem = format!("has {} tokens, where 1 to {VOCABULARY_MAX} are expected", tokens.count);
            return Err(Fault::corrupt(TOKENS, problem));
        }
        let texts = strings(tokens, TOKENS)?;
        let roles = match metadata.array(TYPES)? {
            None => vec![Role::Text; texts.len()],
            Some(types) => roles(types, &texts)?,
        };
        Ok(Self { texts, roles })
    }

    /// A token id from the metadata, checked.
    fn id(&self, metadata: &Metadata<'_>, key: &str) -> Built<Option<u32>> {
        let Some(id) = metadata.unsigned(key)? else { return Ok(None) };
        if id >= self.texts.len() as u64 {
            return Err(Fault::corrupt(
                key,
                format!("is {id}, where the vocabulary has {}", self.texts.len()),
            ));
        }
        Ok(Some(id as u32))
    }

    /// Every token that ends a generation.
    fn end_ids(&self, metadata: &Metadata<'_>) -> Built<Vec<u32>> {
        let mut ids = Vec::new();
        for name in ["eot", "eom"] {
            ids.extend(self.id(metadata, &format!("tokenizer.ggml.{name}_token_id"))?);
        }
        let named = self.texts.iter().zip(&self.roles).enumerate();
        ids.extend(named.filter_map(|(id, (text, role))| {
            (*role == Role::Control && END_NAMES.contains(text)).then_some(id as u32)
        }));
        Ok(ids)
    }

    /// Ids by text; the first of equal texts counts.
    fn ids(&self) -> HashMap<&'a str, u32> {
        let mut ids = HashMap::with_capacity(self.texts.len());
        for (id, text) in self.texts.iter().enumerate() {
            ids.entry(*text).or_insert(id as u32);
        }
        ids
    }
}

fn strings<'a>(array: Array<'a>, key: &str) -> Built<Vec<&'a str>> {
    array
        .iter()
        .map(|value| match value {
            Value::Text(text) => Ok(text),
            other => {
                Err(Fault::corrupt(key, format!("holds {}, where strings are expected", other.describe())))
            }
        })
        .collect()
}

fn roles(types: Array<'_>, texts: &[&str]) -> Built<Vec<Role>> {
    if types.count != texts.len() {
        let problem = format!("has {} values for {} tokens", types.count, texts.len());
        return Err(Fault::corrupt(TYPES, problem));
    }
    let role = |(value, text): (Value<'_>, &&str)| match value.unsigned() {
        Some(1 | 6) => Ok(Role::Text),
        Some(2 | 3) => Ok(Role::Control),
        // Converters mark some end-of-turn tokens as ordinary added text; shown to a user they would be noise.
        Some(4) if END_NAMES.contains(text) => Ok(Role::Control),
        Some(4) => Ok(Role::Literal),
        Some(5) => Ok(Role::Unused),
        _ => Err(Fault::corrupt(TYPES, format!("holds {}, where 1 to 6 are expected", value.describe()))),
    };
    types.iter().zip(texts).map(role).collect()
}

/// What differs between the kinds of tokenizer.
struct Recipe {
    parts: Parts,
    spelling: Spelling,
    /// Whether the beginning-of-sequence token is added when the metadata does not say.
    adds_bos: bool,
}

/// Parts of an encoder.
struct Parts {
    bpe: BPE,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
}

fn assemble(parts: Parts, vocabulary: &Vocabulary<'_>) -> tokenizers::Result<tokenizers::Tokenizer> {
    let mut encoder = tokenizers::Tokenizer::new(parts.bpe);
    encoder.with_normalizer(parts.normalizer)?;
    encoder.with_pre_tokenizer(parts.pre_tokenizer);
    let added = vocabulary.texts.iter().zip(&vocabulary.roles).filter_map(|(text, role)| match role {
        Role::Control => Some(AddedToken::from(*text, true)),
        Role::Literal => Some(AddedToken::from(*text, false).normalized(false)),
        Role::Text | Role::Unused => None,
    });
    encoder.add_tokens(added)?;
    Ok(encoder)
}

fn bpe(
    ids: &HashMap<&str, u32>,
    merges: Vec<(String, String)>,
    spelling: Spelling,
    whole_words: bool,
) -> Built<BPE> {
    let vocab: Vocab = ids.iter().map(|(text, id)| ((*text).to_owned(), *id)).collect();
    let mut builder = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(whole_words);
    if spelling == Spelling::SentencePiece {
        builder = builder.byte_fallback(true).fuse_unk(true);
        if ids.contains_key("<unk>") {
            builder = builder.unk_token("<unk>".to_owned());
        }
    }
    builder
        .build()
        .map_err(|error| Fault::corrupt(MERGES, format!("do not work: {}", quote(&error.to_string()))))
}

fn byte_level(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Built<Recipe> {
    let splitter = Splitter::named(metadata.text("tokenizer.ggml.pre")?)?;
    let ids = vocabulary.ids();
    let lines = metadata.array(MERGES)?.ok_or_else(|| Fault::corrupt(MERGES, "is missing"))?;
    let merges = strings(lines, MERGES)?
        .into_iter()
        .map(|line| {
            // Neither side can have a space in it: byte-level BPE writes the space as another character.
            let pair = line.split_once(' ').filter(|(left, right)| {
                ids.contains_key(left)
                    && ids.contains_key(right)
                    && ids.contains_key([*left, *right].concat().as_str())
            });
            let pair = pair.map(|(left, right)| (left.to_owned(), right.to_owned()));
            pair.ok_or_else(|| {
                let problem = format!("hold `{}`, whose parts or whole are no tokens", quote(line));
                Fault::corrupt(MERGES, problem)
            })
        })
        .collect::<Built<Vec<_>>>()?;
    let whole_words = splitter.takes_whole_words();
    let parts = Parts {
        bpe: bpe(&ids, merges, Spelling::ByteLevel, whole_words)?,
        normalizer: (splitter == Splitter::Qwen2).then(|| NFC.into()),
        pre_tokenizer: Some(splitter.pre_tokenizer()),
    };
    Ok(Recipe { parts, spelling: Spelling::ByteLevel, adds_bos: whole_words })
}

/// How text is cut into words before byte-level BPE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Splitter {
    Gpt2,
    SmolLm,
    Llama3,
    Qwen2,
    Tekken,
}

/// As in the `tokenizer.json` of Llama 3; Qwen2 differs in taking digits one by one.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As in the `tokenizer.json` of Mistral Nemo.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl Splitter {
    fn named(name: Option<&str>) -> Built<Self> {
        match name {
            None | Some("default" | "gpt-2" | "gpt2") => Ok(Self::Gpt2),
            Some("smollm") => Ok(Self::SmolLm),
            Some("llama-bpe" | "llama3" | "llama-v3") => Ok(Self::Llama3),
            Some("qwen2" | "deepseek-r1-qwen") => Ok(Self::Qwen2),
            Some("tekken") => Ok(Self::Tekken),
            Some(other) => Err(Fault::unsupported(
                format!("`tokenizer.ggml.pre` `{}`", quote(other)),
                "supported pre-tokenizers are gpt-2, smollm, llama-bpe, qwen2 and tekken",
            )),
        }
    }

    /// A word that is a token is taken as it is, without merging up to it; these models also expect a beginning token.
    fn takes_whole_words(self) -> bool {
        matches!(self, Self::Llama3 | Self::Tekken)
    }

    fn pre_tokenizer(self) -> PreTokenizerWrapper {
        let bytes = |use_regex| PreTokenizerWrapper::from(ByteLevel::new(false, false, use_regex));
        let first = match self {
            Self::Gpt2 => return bytes(true),
            Self::SmolLm => return Sequence::new(vec![Digits::new(true).into(), bytes(true)]).into(),
            Self::Llama3 => LLAMA3,
            Self::Qwen2 => QWEN2,
            Self::Tekken => TEKKEN,
        };
        let pattern = SplitPattern::Regex(first.to_owned());
        let split =
            Split::new(pattern, SplitDelimiterBehavior::Isolated, false).expect("the patterns are constants");
        Sequence::new(vec![split.into(), bytes(false)]).into()
    }
}

fn sentence_piece(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Built<Recipe> {
    let array = metadata.array(SCORES)?.ok_or_else(|| Fault::corrupt(SCORES, "is missing"))?;
    let scores =
        array.iter().map(|value| value.float().filter(|score| !score.is_nan())).collect::<Option<Vec<_>>>();
    let scores = scores
        .filter(|scores| scores.len() == vocabulary.texts.len())
        .ok_or_else(|| Fault::corrupt(SCORES, "are not one number for each token"))?;
    let ids = vocabulary.ids();
    let merges = merges_of_scores(vocabulary, &ids, &scores);
    let space = metadata.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = Replace::new(" ", "▁").expect("a plain string is a pattern");
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if space {
        normalizers.push(Prepend::new("▁".to_owned()).into());
    }
    normalizers.push(replace.into());
    let parts = Parts {
        bpe: bpe(&ids, merges, Spelling::SentencePiece, false)?,
        normalizer: Some(Normalizers::new(normalizers).into()),
        pre_tokenizer: None,
    };
    Ok(Recipe { parts, spelling: Spelling::SentencePiece, adds_bos: true })
}

/// SentencePiece merges whichever neighbours make the piece with the best score, so every way to cut a piece into two
/// pieces is a merge, ranked by the score of the whole.
fn merges_of_scores(
    vocabulary: &Vocabulary<'_>,
    ids: &HashMap<&str, u32>,
    scores: &[f64],
) -> Vec<(String, String)> {
    let mut ranked: Vec<u32> = (0..vocabulary.texts.len() as u32).collect();
    ranked.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b)));
    let mut merges = Vec::new();
    for id in ranked {
        let (text, role) = (vocabulary.texts[id as usize], vocabulary.roles[id as usize]);
        if role != Role::Text || ids.get(text) != Some(&id) {
            continue;
        }
        let mut cuts: Vec<(u32, u32)> = (1..text.len())
            .filter(|at| text.is_char_boundary(*at))
            .filter_map(|at| Some((*ids.get(&text[..at])?, *ids.get(&text[at..])?)))
            .collect();
        cuts.sort_unstable();
        let spelled = |id: u32| vocabulary.texts[id as usize].to_owned();
        merges.extend(cuts.into_iter().map(|(left, right)| (spelled(left), spelled(right))));
    }
    merges
}
