//! Faults of a configuration, all of them at once.

use std::{fmt, path::PathBuf};

/// The layer that a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Built in.
    Defaults,
    /// This file.
    File(PathBuf),
    /// This environment variable.
    Environment(String),
    /// `--set`.
    Set,
    /// This flag, which stands for a `--set`.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Defaults => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Environment(variable) => write!(f, "environment {variable}"),
            Self::Set => f.write_str("--set"),
            Self::Flag(flag) => f.write_str(flag),
        }
    }
}

/// One value of one source that can never work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigFault {
    /// The layer at fault.
    pub origin: Origin,
    /// Dotted key; empty when the source as a whole is at fault.
    pub key: String,
    /// What is wrong, as a verb phrase.
    pub problem: String,
}

impl fmt::Display for ConfigFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.key.as_str() {
            "" => write!(f, "{}: {}", self.origin, self.problem),
            key => write!(f, "`{key}` ({}) {}", self.origin, self.problem),
        }
    }
}

/// Everything that is wrong with a configuration; never empty.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    faults: Vec<ConfigFault>,
}

impl ConfigError {
    pub(super) fn new(faults: Vec<ConfigFault>) -> Self {
        debug_assert!(!faults.is_empty(), "an error has a fault");
        Self { faults }
    }

    /// Every fault, in the order of the layers; rejected values last.
    pub fn faults(&self) -> &[ConfigFault] {
        &self.faults
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let noun = if self.faults.len() == 1 { "fault" } else { "faults" };
        write!(f, "the configuration has {} {noun}:", self.faults.len())?;
        self.faults.iter().try_for_each(|fault| write!(f, "\n  {fault}"))
    }
}
