//! Text to token ids and back, from a GGUF vocabulary or a `tokenizer.json`.

mod gguf;
mod json;
mod pieces;
mod stream;

use std::sync::Arc;

use crate::Error;
use crate::files::fault::Fault;

pub(crate) use json::{JsonTokens, token_text};
pub(crate) use pieces::byte_level_chars;
pub use stream::TextStream;

use pieces::Pieces;

/// Whether [`Tokenizer::encode`] adds the tokens that the model expects around a text. Tokens that are written out in the
/// text, such as `<|im_end|>`, are recognised either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Add what the model asks for (mostly the beginning-of-sequence token), unless the text already has it.
    Add,
    /// Add nothing.
    Skip,
}

/// The tokenizer of a model. Clones share one vocabulary.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    encoder: tokenizers::Tokenizer,
    pieces: Pieces,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Ascending; holds `eos`.
    eos_ids: Vec<u32>,
    /// What goes before and after a text.
    frame: Frame,
}

/// Tokens at the ends of a sequence.
struct Ends {
    bos: Option<u32>,
    /// The one that chat templates write.
    eos: Option<u32>,
    /// All that end a generation.
    eos_ids: Vec<u32>,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Frame {
    before: Vec<u32>,
    after: Vec<u32>,
}

impl Tokenizer {
    fn new(encoder: tokenizers::Tokenizer, pieces: Pieces, ends: Ends, frame: Frame) -> Self {
        let Ends { bos, eos, mut eos_ids } = ends;
        eos_ids.extend(eos);
        eos_ids.sort_unstable();
        eos_ids.dedup();
        Self { inner: Arc::new(Inner { encoder, pieces, bos, eos, eos_ids, frame }) }
    }

    /// Token ids of a text.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, Error> {
        let encoding = self.inner.encoder.encode_fast(text, false).map_err(|error| Error::Invalid {
            field: "text".into(),
            problem: format!("cannot be tokenized: {error}"),
        })?;
        let ids = encoding.get_ids();
        if special == SpecialTokens::Skip {
            return Ok(ids.to_vec());
        }
        let Frame { before, after } = &self.inner.frame;
        let before = if ids.starts_with(before) { &[] } else { before.as_slice() };
        let after = if ids.ends_with(after) { &[] } else { after.as_slice() };
        Ok([before, ids, after].concat())
    }

    /// Raw bytes of one token; empty for control tokens and for ids outside the vocabulary. A token may be a part of a
    /// UTF-8 character: use [`TextStream`] to get text.
    pub fn decode_piece(&self, id: u32) -> Vec<u8> {
        self.piece(id).to_vec()
    }

    /// As [`Self::decode_piece`], but control tokens give their name, such as `<|im_end|>`.
    pub fn decode_piece_with_control(&self, id: u32) -> Vec<u8> {
        self.inner.pieces.get(id).to_vec()
    }

    /// Text of some tokens without control tokens; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| self.piece(*id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn piece(&self, id: u32) -> &[u8] {
        if self.is_control(id) { &[] } else { self.inner.pieces.get(id) }
    }

    /// Whether the token stands for something other than text.
    pub fn is_control(&self, id: u32) -> bool {
        self.inner.pieces.is_control(id)
    }

    /// Entries of the vocabulary; the model's embedding may have more rows, which no text gives.
    pub fn vocabulary(&self) -> usize {
        self.inner.pieces.len()
    }

    /// Tokens that end a generation, ascending.
    pub fn eos_ids(&self) -> &[u32] {
        &self.inner.eos_ids
    }

    /// The beginning-of-sequence token, whether or not [`SpecialTokens::Add`] adds it.
    pub fn bos_id(&self) -> Option<u32> {
        self.inner.bos
    }

    /// Bytes of the longest token: bounds how much text a number of tokens can be, and how much a stop string must look back.
    pub fn longest_token_bytes(&self) -> usize {
        self.inner.pieces.longest()
    }

    /// Refuses a vocabulary that has ids beyond the embedding.
    pub(crate) fn check_fits(&self, embedding_rows: usize) -> Result<(), Fault> {
        if self.vocabulary() > embedding_rows {
            let problem =
                format!("has {} tokens, where the embedding has {embedding_rows} rows", self.vocabulary());
            return Err(Fault::corrupt("tokenizer", problem));
        }
        Ok(())
    }

    /// Name of the beginning and end token, for chat templates.
    pub(crate) fn frame_names(&self) -> (String, String) {
        let name = |id: Option<u32>| {
            let piece = id.map(|id| self.decode_piece_with_control(id)).unwrap_or_default();
            String::from_utf8_lossy(&piece).into_owned()
        };
        (name(self.inner.bos), name(self.inner.eos))
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocabulary", &self.vocabulary())
            .field("bos", &self.inner.bos)
            .field("eos", &self.inner.eos_ids)
            .field("frame", &self.inner.frame)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
