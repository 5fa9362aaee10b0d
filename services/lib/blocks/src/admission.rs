//! Which blocks are worth a place in an expensive tier: on disk, or as a second copy. Of the blocks of published request traces
//! 58 to 76 % are never used again, so that a tier that takes all is filled and worn out by them.

mod sketch;
#[cfg(test)]
mod tests;

use crate::{BlockKey, Error};

pub use sketch::Sketch;

/// When a block is worth its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum AdmissionRule {
    /// Always.
    All,
    /// When it was needed twice.
    #[default]
    SecondTouch,
    /// When there is room, or it was needed more often than the block that would make way: TinyLFU (Einziger, Friedman and
    /// Manes 2017).
    Frequency,
}

impl AdmissionRule {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::All, Self::SecondTouch, Self::Frequency];

    /// Name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::SecondTouch => "second-touch",
            Self::Frequency => "frequency",
        }
    }
}

impl std::str::FromStr for AdmissionRule {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|rule| rule.name() == name).ok_or_else(|| {
            let names: Vec<String> = Self::ALL.iter().map(|rule| format!("`{}`", rule.name())).collect();
            let problem = format!("is `{name}`, must be one of {}", names.join(", "));
            Error::Invalid { field: "admission", problem }
        })
    }
}

/// Decides what enters a tier. Pure: no clock, no randomness but the seed. Up to four bytes for each block of the tier, whatever
/// passes by.
#[derive(Debug, Clone)]
pub struct AdmissionFilter {
    rule: AdmissionRule,
    uses: Sketch,
}

impl AdmissionFilter {
    /// A filter for a tier of about `blocks` blocks. The seed keeps clients from choosing keys that are counted together.
    pub fn new(rule: AdmissionRule, blocks: usize, seed: u64) -> Self {
        Self { rule, uses: Sketch::new(blocks, seed) }
    }

    /// Whether every block may enter, whatever is known of it.
    pub fn admits_all(&self) -> bool {
        self.rule == AdmissionRule::All
    }

    /// A block was needed: stored, found or missed. Once for each request.
    pub fn touch(&mut self, key: &BlockKey) {
        if self.rule != AdmissionRule::All {
            self.uses.add(key);
        }
    }

    /// Whether a block may enter, when `victim` would have to leave for it; `None`: there is room.
    pub fn admits(&self, key: &BlockKey, victim: Option<&BlockKey>) -> bool {
        match (self.rule, victim) {
            (AdmissionRule::All, _) | (AdmissionRule::Frequency, None) => true,
            (AdmissionRule::SecondTouch, _) => self.uses.count(key) >= 2,
            (AdmissionRule::Frequency, Some(victim)) => self.uses.count(key) > self.uses.count(victim),
        }
    }
}
