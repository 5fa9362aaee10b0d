//! The `key=value` pairs of a policy's text: read once each, against ranges.

use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::Error;

use super::{invalid, shown};

/// Pairs that were given, and those of the preset beneath them.
pub(super) struct Keys<'a> {
    given: Vec<(&'a str, &'a str)>,
    preset: Vec<(&'a str, &'a str)>,
    /// Keys that were asked for: those that are valid.
    asked: Vec<&'static str>,
    /// Keys that are valid in another form of the policy, with what that form is.
    otherwise: Option<(&'static str, &'static [&'static str])>,
}

impl<'a> Keys<'a> {
    /// Splits the part after the colon.
    pub(super) fn new(given: &'a str, preset: &'a str) -> Result<Self, Error> {
        let (given, preset) = (pairs(given)?, pairs(preset)?);
        let keys = Self { given, preset, asked: Vec::new(), otherwise: None };
        for (index, (key, _)) in keys.given.iter().enumerate() {
            if keys.given[..index].iter().any(|(other, _)| other == key) {
                return invalid("policy", format!("has the key {} twice", shown(key)));
            }
        }
        Ok(keys)
    }

    /// The value of a key.
    pub(super) fn text(&mut self, key: &'static str) -> Option<&'a str> {
        self.asked.push(key);
        self.given.iter().chain(&self.preset).find(|(given, _)| *given == key).map(|(_, value)| *value)
    }

    /// Whether any of these was given, whatever the preset says.
    pub(super) fn gives(&self, keys: &[&str]) -> bool {
        self.given.iter().any(|(given, _)| keys.contains(given))
    }

    /// A number within a range.
    pub(super) fn number<T>(
        &mut self,
        key: &'static str,
        default: T,
        range: RangeInclusive<T>,
    ) -> Result<T, Error>
    where
        T: FromStr + PartialOrd + std::fmt::Display,
    {
        match self.text(key) {
            None => Ok(default),
            Some(text) => number(key, text, &range),
        }
    }

    /// A number within a range, or `off`.
    pub(super) fn switched<T>(
        &mut self,
        key: &'static str,
        range: RangeInclusive<T>,
    ) -> Result<Option<T>, Error>
    where
        T: FromStr + PartialOrd + std::fmt::Display,
    {
        match self.text(key) {
            None | Some("off") => Ok(None),
            Some(text) => number(key, text, &range)
                .map(Some)
                .map_err(|error| error.retold(|field, problem| (field, format!("{problem}, or off")))),
        }
    }

    /// One of some words.
    pub(super) fn word<T: Copy>(
        &mut self,
        key: &'static str,
        words: &[(&'static str, T)],
        default: T,
    ) -> Result<T, Error> {
        let Some(text) = self.text(key) else { return Ok(default) };
        match words.iter().find(|(word, _)| *word == text) {
            Some((_, meaning)) => Ok(*meaning),
            None => {
                let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
                invalid(key, format!("is {}, must be one of: {}", shown(text), words.join(", ")))
            }
        }
    }

    /// Lets errors name the keys of another form of the policy.
    pub(super) fn otherwise(&mut self, form: &'static str, keys: &'static [&'static str]) {
        self.otherwise = Some((form, keys));
    }

    /// A key that was given and is none of these.
    pub(super) fn stranger(&self, known: &[&str]) -> Option<&'a str> {
        self.given.iter().map(|(key, _)| *key).find(|key| !known.contains(key))
    }

    /// Refuses what nobody asked for.
    pub(super) fn finish(self, name: &str) -> Result<(), Error> {
        let Some((key, _)) = self.given.iter().find(|(key, _)| !self.asked.contains(key)) else {
            return Ok(());
        };
        let otherwise =
            self.otherwise.map(|(form, keys)| format!("; {form}: {}", keys.join(", "))).unwrap_or_default();
        invalid(
            "policy",
            format!(
                "has the key {}, which `{name}` with these values does not have; it has: {}{otherwise}",
                shown(key),
                self.asked.join(", ")
            ),
        )
    }
}

fn pairs(text: &str) -> Result<Vec<(&str, &str)>, Error> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let pair = |part| match str::split_once(part, '=') {
        Some((key, value)) => Ok((key.trim(), value.trim())),
        None => invalid("policy", format!("has {} where key=value must be", shown(part))),
    };
    text.split(',').map(pair).collect()
}

fn number<T>(key: &'static str, text: &str, range: &RangeInclusive<T>) -> Result<T, Error>
where
    T: FromStr + PartialOrd + std::fmt::Display,
{
    match text.parse::<T>() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => invalid(
            key,
            format!("is {}, must be a number from {} to {}", shown(text), range.start(), range.end()),
        ),
    }
}
