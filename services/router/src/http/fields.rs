//! JSON types of OpenAI requests that come in several forms.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

/// `prompt` of a completion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PromptField {
    /// A string, or a list of one string.
    Text(String),
    /// A list of token ids, or a list of one such list.
    Tokens(Vec<u32>),
}

/// One element of a prompt that is a list.
enum PromptElement {
    Text(String),
    Id(u32),
    Ids(Vec<u32>),
}

/// `stop`: a string or a list of strings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct StopField(pub(crate) Vec<String>);

/// `logprobs`: a number for completions, a bool for chat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LogprobsField {
    /// Chat.
    Flag(bool),
    /// Completions.
    Count(u32),
}

/// `seed`: any integer of 64 bits; negative ones are taken as the bits that they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seed(pub(crate) u64);

/// Whether a field that is not supported says anything: null, false and empty values do not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Presence(pub(crate) bool);

/// `content` of a message: text, or a list of parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// Text.
    Text(String),
    /// Parts.
    Parts(Vec<Part>),
}

/// A part of a message.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Part {
    /// `text`, or something that is not supported.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// Its text.
    #[serde(default)]
    pub(crate) text: Option<String>,
}

/// A message of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Message {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    pub(crate) role: String,
    /// What was said.
    #[serde(default)]
    pub(crate) content: Option<Content>,
    /// Not supported.
    #[serde(default)]
    pub(crate) tool_calls: Presence,
}

/// `stream_options`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct StreamOptions {
    /// Send a last chunk with the usage.
    #[serde(default)]
    pub(crate) include_usage: Option<bool>,
}

/// `response_format`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct ResponseFormat {
    /// `text`, or something that is not supported.
    #[serde(rename = "type")]
    pub(crate) kind: String,
}

impl<'de> Deserialize<'de> for PromptField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = PromptField;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a list of token ids, or a list with one of these")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<PromptField, E> {
                Ok(PromptField::Text(text.to_owned()))
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<PromptField, E> {
                Ok(PromptField::Text(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<PromptField, A::Error> {
                let field = match list.next_element::<PromptElement>()? {
                    None => return Ok(PromptField::Tokens(Vec::new())),
                    Some(PromptElement::Text(text)) => PromptField::Text(text),
                    Some(PromptElement::Ids(ids)) => PromptField::Tokens(ids),
                    Some(PromptElement::Id(first)) => {
                        let mut ids = vec![first];
                        while let Some(id) = list.next_element()? {
                            ids.push(id);
                        }
                        return Ok(PromptField::Tokens(ids));
                    }
                };
                if list.next_element::<IgnoredAny>()?.is_some() {
                    return Err(de::Error::custom("holds several prompts; hint: send one request for each"));
                }
                Ok(field)
            }
        }
        deserializer.deserialize_any(Form)
    }
}

impl<'de> Deserialize<'de> for PromptElement {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = PromptElement;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<PromptElement, E> {
                Ok(PromptElement::Text(text.to_owned()))
            }

            fn visit_u64<E: de::Error>(self, id: u64) -> Result<PromptElement, E> {
                let id = u32::try_from(id).map_err(|_| E::custom(format_args!("{id} is no token id")))?;
                Ok(PromptElement::Id(id))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<PromptElement, A::Error> {
                let ids = Vec::deserialize(de::value::SeqAccessDeserializer::new(list))?;
                Ok(PromptElement::Ids(ids))
            }
        }
        deserializer.deserialize_any(Form)
    }
}

impl<'de> Deserialize<'de> for StopField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = StopField;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<StopField, E> {
                Ok(StopField(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<StopField, A::Error> {
                Ok(StopField(Vec::deserialize(de::value::SeqAccessDeserializer::new(list))?))
            }
        }
        deserializer.deserialize_any(Form)
    }
}

impl<'de> Deserialize<'de> for LogprobsField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl Visitor<'_> for Form {
            type Value = LogprobsField;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a count for completions, true or false for chat")
            }

            fn visit_bool<E: de::Error>(self, flag: bool) -> Result<LogprobsField, E> {
                Ok(LogprobsField::Flag(flag))
            }

            fn visit_u64<E: de::Error>(self, count: u64) -> Result<LogprobsField, E> {
                Ok(LogprobsField::Count(u32::try_from(count).unwrap_or(u32::MAX)))
            }
        }
        deserializer.deserialize_any(Form)
    }
}

impl<'de> Deserialize<'de> for Seed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl Visitor<'_> for Form {
            type Value = Seed;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an integer of 64 bits")
            }

            fn visit_u64<E: de::Error>(self, seed: u64) -> Result<Seed, E> {
                Ok(Seed(seed))
            }

            fn visit_i64<E: de::Error>(self, seed: i64) -> Result<Seed, E> {
                Ok(Seed(seed as u64))
            }
        }
        deserializer.deserialize_any(Form)
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text or a list of text parts")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<Content, E> {
                Ok(Content::Text(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Content, A::Error> {
                Ok(Content::Parts(Vec::deserialize(de::value::SeqAccessDeserializer::new(list))?))
            }
        }
        deserializer.deserialize_any(Form)
    }
}

impl<'de> Deserialize<'de> for Presence {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = Presence;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_unit<E: de::Error>(self) -> Result<Presence, E> {
                Ok(Presence(false))
            }

            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Presence, E> {
                Ok(Presence(value))
            }

            fn visit_u64<E: de::Error>(self, _: u64) -> Result<Presence, E> {
                Ok(Presence(true))
            }

            fn visit_i64<E: de::Error>(self, _: i64) -> Result<Presence, E> {
                Ok(Presence(true))
            }

            fn visit_f64<E: de::Error>(self, _: f64) -> Result<Presence, E> {
                Ok(Presence(true))
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<Presence, E> {
                Ok(Presence(!value.is_empty()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Presence, A::Error> {
                let mut any = false;
                while list.next_element::<IgnoredAny>()?.is_some() {
                    any = true;
                }
                Ok(Presence(any))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Presence, A::Error> {
                let mut any = false;
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    any = true;
                }
                Ok(Presence(any))
            }
        }
        deserializer.deserialize_any(Form)
    }
}
