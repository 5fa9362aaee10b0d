//! Values that are never shown.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// What is shown instead of a secret.
pub const REDACTED: &str = "<redacted>";

/// A value that neither `Debug` nor serialisation shows; [`Secret::expose`] does. In a configuration its default is the one
/// of the struct that holds it, since the serialised defaults cannot carry it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret<T>(T);

impl<T> Secret<T> {
    /// Hides a value.
    pub fn new(value: T) -> Self {
        Self(value)
    }

    /// The value itself; keep it out of logs.
    pub fn expose(&self) -> &T {
        &self.0
    }
}

impl<T> std::fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(REDACTED)
    }
}

impl<T> Serialize for Secret<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(REDACTED)
    }
}

impl<'de> Deserialize<'de> for Secret<String> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == REDACTED {
            return Err(D::Error::custom(
                "the secret is redacted, hint: write the secret itself or leave the key out",
            ));
        }
        Ok(Self(text))
    }
}
