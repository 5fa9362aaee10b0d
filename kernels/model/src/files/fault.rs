//! Faults found while a file is read, before the file's path is attached.

use std::path::Path;

use crate::Error;

/// What a parser finds wrong; [`Fault::at`] makes it an [`Error`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The bytes are damaged or contradict themselves.
    Corrupt { field: String, problem: String },
    /// The bytes may be fine, but ask for something that is not implemented.
    Unsupported { feature: String, hint: String },
}

impl Fault {
    /// `problem` is a verb phrase about `field`.
    pub(crate) fn corrupt(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Corrupt { field: field.into(), problem: problem.into() }
    }

    /// `hint` says what would work.
    pub(crate) fn unsupported(feature: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Unsupported { feature: feature.into(), hint: hint.into() }
    }

    /// The error that users see.
    pub(crate) fn at(self, path: &Path) -> Error {
        let path = path.to_path_buf();
        match self {
            Self::Corrupt { field, problem } => Error::Corrupt { path, field, problem },
            Self::Unsupported { feature, hint } => Error::Unsupported { path, feature, hint },
        }
    }
}

/// Cuts text from a file down to what fits into a message, without control characters.
pub(crate) fn quote(text: &str) -> String {
    const SHOWN: usize = 80;
    let mut out: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN).is_some() {
        out.push('…');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_are_short_and_printable() {
        assert_eq!(quote("a\nb"), "a\\nb");
        let long = quote(&"é".repeat(500));
        assert_eq!(long.chars().count(), 81);
    }

    #[test]
    fn the_path_reaches_the_message() {
        let error = Fault::corrupt("magic", "is wrong").at(Path::new("m.gguf"));
        assert_eq!(error.to_string(), "m.gguf: `magic` is wrong");
        assert_eq!(error.kind(), crate::Kind::Corrupt);
    }
}
