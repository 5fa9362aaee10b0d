//! Model files: one GGUF file, or a directory as Hugging Face lays it out.

mod architecture;
mod dequantize;
pub(crate) mod fault;
pub(crate) mod gguf;
mod hugging_face;
mod mapping;
mod safetensors;
mod synthetic;
mod weights;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{ChatTemplate, Error, ModelConfig, Tokenizer};
use fault::Fault;
use mapping::{Mapping, Meter};
use weights::Naming;

pub use dequantize::TensorType;
pub(crate) use dequantize::{dequantize, scale_and_min};
pub use weights::{LayerWeight, Matrix, StoredMatrix, WeightName, Weights};

/// What is known of a model without its weights.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// Shape and constants.
    pub config: ModelConfig,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template, if it has one.
    pub chat_template: Option<ChatTemplate>,
    /// BLAKE3 over the content of every file that the model is made of. Equal digests mean equal models.
    pub digest: [u8; 32],
    /// The file or directory.
    pub path: PathBuf,
    /// Bytes of all files that count for the digest.
    pub file_bytes: u64,
    /// Element type that takes most of the bytes, for example `Q4_1`.
    pub quantization: String,
    /// Number of stored tensors.
    pub tensors: usize,
    /// Number of stored elements.
    pub parameters: u64,
}

impl ModelInfo {
    /// Reads everything but the weights (which are only hashed).
    pub fn open(path: &Path) -> Result<Self, Error> {
        Ok(LoadedModel::open(path, &|_| ())?.info)
    }
}

/// A model whose weights are mapped.
#[derive(Debug)]
pub struct LoadedModel {
    /// What is known of it.
    pub info: ModelInfo,
    /// Its weights.
    pub weights: Weights,
}

/// How far reading a model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes read.
    pub done_bytes: u64,
    /// Bytes to read.
    pub total_bytes: u64,
}

impl LoadedModel {
    /// Opens a GGUF file or a Hugging Face directory, checks all of it, and hashes it (which is what `progress` tells).
    ///
    /// The files stay mapped while the weights live: replace model files by renaming new ones into place, never by writing
    /// into them.
    pub fn open(path: &Path, progress: &dyn Fn(LoadProgress)) -> Result<Self, Error> {
        if path.is_dir() { hugging_face::open(path, progress) } else { open_gguf(path, progress) }
    }
}

fn open_gguf(path: &Path, progress: &dyn Fn(LoadProgress)) -> Result<LoadedModel, Error> {
    let file = Arc::new(Mapping::open(path)?);
    let at = |fault: Fault| fault.at(path);
    let gguf = gguf::Gguf::parse(&file).map_err(at)?;
    let stem = path.file_stem().map_or_else(|| "model".into(), |stem| stem.to_string_lossy());
    let config = gguf::model_config(&gguf, &file, &stem).map_err(at)?;
    let tokenizer = Tokenizer::from_gguf(&gguf.metadata).map_err(at)?;
    tokenizer.check_fits(config.vocabulary).map_err(at)?;
    let chat_template = ChatTemplate::from_gguf(&gguf.metadata, &tokenizer).map_err(at)?;
    let weights = Weights::new(Naming::Gguf, vec![Arc::clone(&file)], gguf.tensors, &config).map_err(at)?;
    let digest = digest(&[("gguf", &file)], progress);
    let info = describe(path, config, tokenizer, chat_template, digest, &weights);
    Ok(LoadedModel { info, weights })
}

fn describe(
    path: &Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    chat_template: Option<ChatTemplate>,
    (digest, file_bytes): ([u8; 32], u64),
    weights: &Weights,
) -> ModelInfo {
    let inventory = weights.inventory();
    ModelInfo {
        config,
        tokenizer,
        chat_template,
        digest,
        path: path.to_path_buf(),
        file_bytes,
        quantization: inventory.quantization,
        tensors: inventory.tensors,
        parameters: inventory.parameters,
    }
}

/// Digest over the content of some files and their bytes. Each file counts by its part in the model, not by its name, so that
/// renaming a GGUF file changes nothing.
fn digest(files: &[(&str, &Mapping)], progress: &dyn Fn(LoadProgress)) -> ([u8; 32], u64) {
    let total_bytes = files.iter().map(|(_, file)| file.len() as u64).sum();
    let mut meter = Meter::new(total_bytes, progress);
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"longshore model digest 1");
    for (part, file) in files {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
        hasher.update(file.digest(&mut meter).as_bytes());
    }
    (hasher.finalize().into(), total_bytes)
}

/// Refuses tensors that share bytes of a file; ranges are `(start, end, name)`.
fn refuse_overlaps(mut ranges: Vec<(u64, u64, String)>) -> Result<(), Fault> {
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        let (first, second) = (&pair[0], &pair[1]);
        if second.0 < first.1 {
            let problem = format!("overlaps `{}`", fault::quote(&first.2));
            return Err(Fault::corrupt(fault::quote(&second.2), problem));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
