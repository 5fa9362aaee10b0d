//! `longshore model make-recall`: a small decoder whose weights are set by hand, so that it answers `k1 v1 k2 v2 … kq` with the
//! value of kq, exactly and at any length. What a policy loses of it, the policy has lost, not the model.
//!
//! The last two layers do the work; those before attend to the previous token and add nothing.
//!
//! 1. *Previous token*: q and k are constant vectors in fast pairs of the rotation, q one position ahead, so that logits peak at
//!    distance 1. It writes the key code of the token before into a subspace of its own.
//! 2. *Match*: q is the code of this token's key, k the code that layer 1 wrote, both in pairs so slow that two million positions
//!    turn them by less than a hundredth. It copies the value code of what it finds. Tokens that are no keys attend to the
//!    first token, as heads of trained models do.
//!
//! Codes are split over the KV heads: each has a slice of its own, and the answer needs all of them. All tokens have
//! embeddings of one norm, so that RMSNorm divides by constants.

mod codes;
mod files;
mod vocabulary;
mod weights;

use std::path::Path;

use anyhow::{Result, ensure};

pub(crate) use vocabulary::RecallVocabulary;

use crate::console;

/// Positions that the model is made for.
const CONTEXT_TOKENS: u64 = 1 << 21;

/// Base of the rotation. With 32 pairs, pair `i` turns by `10^(-17 i / 32)` a position: the first by 1, those from the 16th
/// on by less than 1e-8.
const THETA: f64 = 1e17;

/// Shape and seed of a recall model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RecallOptions {
    /// Seed of the codes.
    pub(crate) seed: u64,
    /// Key tokens.
    pub(crate) keys: usize,
    /// Value tokens.
    pub(crate) values: usize,
    /// Filler tokens.
    pub(crate) fillers: usize,
    /// Layers, at least 2.
    pub(crate) layers: usize,
    /// KV heads.
    pub(crate) kv_heads: usize,
    /// Query heads of a KV head.
    pub(crate) group: usize,
    /// Elements of a head: 64 or 128.
    pub(crate) head_dim: usize,
    /// Gap between the logit of the match and that of any other key, in base 2.
    pub(crate) sharpness: f32,
}

impl Default for RecallOptions {
    fn default() -> Self {
        Self {
            seed: 1,
            keys: 1024,
            values: 1024,
            fillers: 64,
            layers: 4,
            kv_heads: 1,
            group: 2,
            head_dim: 64,
            sharpness: 768.0,
        }
    }
}

impl RecallOptions {
    fn check(&self) -> Result<()> {
        let range = |field: &str, value: usize, from: usize, to: usize| {
            ensure!((from..=to).contains(&value), "`--{field}` is {value}, must be from {from} to {to}");
            Ok(())
        };
        range("keys", self.keys, 1, 2048)?;
        range("values", self.values, 2, 16_384)?;
        range("fillers", self.fillers, 1, 4096)?;
        range("layers", self.layers, 2, 64)?;
        range("kv-heads", self.kv_heads, 1, 16)?;
        range("group", self.group, 1, 16)?;
        ensure!([64, 128].contains(&self.head_dim), "`--head-size` is {}, must be 64 or 128", self.head_dim);
        ensure!(
            self.sharpness.is_finite() && (16.0..=8192.0).contains(&self.sharpness),
            "`--sharpness` is {}, must be from 16 to 8192: less mixes values, more leaves the range of f16 keys",
            self.sharpness
        );
        Ok(())
    }
}

/// Writes the model into `folder` as Hugging Face lays it out.
pub(crate) fn make_recall(folder: &Path, options: &RecallOptions) -> Result<()> {
    options.check()?;
    let layout = weights::Layout::of(options);
    let tensors = weights::tensors(options, &layout)?;
    files::write(folder, options, &layout, &tensors)?;
    console::note(format!(
        "{} keys, {} values, {} layers of {} × {} heads of {}; ask it `k1 v1 k2 v2 … k1`",
        options.keys, options.values, options.layers, options.kv_heads, options.group, options.head_dim
    ));
    console::say(folder.display().to_string());
    Ok(())
}

#[cfg(test)]
mod tests;
