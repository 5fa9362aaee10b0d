//! The words of a recall model: bytes, so that any text can be read, then `k0 … v0 … w0 …` as whole words.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use longshore_model::Tokenizer;

use super::RecallOptions;

/// Spelled bytes, which every byte-level vocabulary has.
const BYTES: u32 = 256;

/// Token ids by what they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RecallVocabulary {
    /// The first token of every prompt.
    pub(crate) bos: u32,
    /// Ends an answer.
    pub(crate) eos: u32,
    /// Keys.
    pub(crate) keys: Range<u32>,
    /// Values.
    pub(crate) values: Range<u32>,
    /// Words without meaning.
    pub(crate) fillers: Range<u32>,
}

impl RecallVocabulary {
    /// Of a model that is being made.
    pub(super) fn of(options: &RecallOptions) -> Self {
        let keys = BYTES + 2..BYTES + 2 + options.keys as u32;
        let values = keys.end..keys.end + options.values as u32;
        let fillers = values.end..values.end + options.fillers as u32;
        Self { bos: BYTES, eos: BYTES + 1, keys, values, fillers }
    }

    /// Of a model that was loaded; refuses others.
    pub(crate) fn read(tokenizer: &Tokenizer) -> Result<Self> {
        let words = tokenizer.vocabulary() as u32;
        let range = |letter: u8| {
            let is_one = |id: &u32| {
                let piece = tokenizer.decode_piece(*id);
                piece.len() > 1 && piece[0] == letter && piece[1..].iter().all(u8::is_ascii_digit)
            };
            let first = (BYTES..words).find(is_one)?;
            let end = (first..words).find(|id| !is_one(id)).unwrap_or(words);
            Some(first..end)
        };
        let found = range(b'k').zip(range(b'v')).zip(range(b'w')).zip(tokenizer.bos_id());
        let (((keys, values), fillers), bos) = found
            .context("the model is no recall model; hint: make one with `longshore model make-recall DIR`")?;
        let eos = tokenizer.eos_ids().first().copied().unwrap_or(bos);
        ensure!(keys.end == values.start && values.end == fillers.start, "the model is no recall model");
        Ok(Self { bos, eos, keys, values, fillers })
    }

    /// Entries.
    pub(super) fn len(&self) -> usize {
        self.fillers.end as usize
    }

    /// The words after the bytes, in the order of their ids, and whether each is a control token.
    pub(super) fn words(&self) -> Vec<(String, bool)> {
        let mut words = vec![("<s>".to_owned(), true), ("</s>".to_owned(), true)];
        for (letter, range) in [('k', &self.keys), ('v', &self.values), ('w', &self.fillers)] {
            words.extend((0..range.len()).map(|i| (format!("{letter}{i}"), false)));
        }
        words
    }
}
