//! Copies of one block under way: which shards are asked for one, when the block counts as stored, and who is asked next when
//! one refuses. Pure: whoever sends tells what came back.

#[cfg(test)]
mod tests;

use crate::Error;

/// Most copies of a block.
pub const COPIES_MAX: usize = 8;

/// How many copies a block gets, and how many must be confirmed before it counts as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyRule {
    copies: usize,
    write_acks: usize,
}

impl CopyRule {
    /// `copies` from 1 to [`COPIES_MAX`], `write_acks` from 1 to `copies`.
    pub fn new(copies: usize, write_acks: usize) -> Result<Self, Error> {
        if !(1..=COPIES_MAX).contains(&copies) {
            return Err(Error::Invalid {
                field: "copies",
                problem: format!("is {copies}, must be from 1 to {COPIES_MAX}"),
            });
        }
        if !(1..=copies).contains(&write_acks) {
            return Err(Error::Invalid {
                field: "write_acks",
                problem: format!(
                    "is {write_acks}, must be from 1 to the {copies} of `copies`, hint: raise `copies` too, or lower it"
                ),
            });
        }
        Ok(Self { copies, write_acks })
    }

    /// Copies of each block.
    pub fn copies(&self) -> usize {
        self.copies
    }

    /// Copies that must be confirmed before a block counts as stored.
    pub fn write_acks(&self) -> usize {
        self.write_acks
    }
}

impl Default for CopyRule {
    /// One copy.
    fn default() -> Self {
        Self { copies: 1, write_acks: 1 }
    }
}

/// Whether a block counts as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Enough shards confirmed their copies.
    Stored,
    /// Too few did yet, and enough may still.
    Waiting,
    /// Too few did, and nobody is left to ask: it is not stored.
    Failed,
}

/// Where one copy stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    UnderWay,
    Held,
    Refused,
}

/// A shard that may be asked for a copy, and the machine that it fails with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// The shard.
    pub shard: usize,
    /// Equal for shards on one machine.
    pub host: usize,
}

/// The copies of one block that are under way. No two of them go to one machine.
#[derive(Debug, Clone)]
pub struct Tally {
    rule: CopyRule,
    /// Shards that were asked, in that order.
    asked: Vec<(Candidate, Standing)>,
    /// Shards that may be asked, the next one first.
    spare: Vec<Candidate>,
}

impl Tally {
    /// Asks the first of `candidates`, by preference and without repeats, for a copy each.
    pub fn new(rule: CopyRule, candidates: impl IntoIterator<Item = Candidate>) -> Self {
        let mut tally = Self { rule, asked: Vec::new(), spare: candidates.into_iter().collect() };
        while tally.ask_next().is_some() {}
        tally
    }

    /// Shards whose answer is awaited.
    pub fn under_way(&self) -> impl Iterator<Item = usize> {
        self.standing(Standing::UnderWay)
    }

    /// Shards that confirmed a copy.
    pub fn holders(&self) -> impl Iterator<Item = usize> {
        self.standing(Standing::Held)
    }

    /// A shard confirmed its copy. Shards that were not asked change nothing.
    pub fn held(&mut self, shard: usize) {
        self.note(shard, Standing::Held);
    }

    /// A shard refused its copy, failed, or is given up.
    pub fn refused(&mut self, shard: usize) {
        self.note(shard, Standing::Refused);
    }

    /// The next shard to ask for the copy that another one refused; it counts as under way from now on.
    pub fn ask_next(&mut self) -> Option<usize> {
        if self.hopeful().count() >= self.rule.copies {
            return None;
        }
        let is_free = |candidate: &Candidate| self.hopeful().all(|other| other.host != candidate.host);
        let next = self.spare.iter().position(is_free)?;
        let candidate = self.spare.remove(next);
        self.asked.push((candidate, Standing::UnderWay));
        Some(candidate.shard)
    }

    /// Whether the block counts as stored.
    pub fn verdict(&self) -> Verdict {
        let held = self.holders().count();
        let mut hosts: Vec<usize> =
            self.hopeful().chain(&self.spare).map(|candidate| candidate.host).collect();
        hosts.sort_unstable();
        hosts.dedup();
        match (held >= self.rule.write_acks, hosts.len() >= self.rule.write_acks) {
            (true, _) => Verdict::Stored,
            (false, true) => Verdict::Waiting,
            (false, false) => Verdict::Failed,
        }
    }

    /// Shards that hold a copy or still may.
    fn hopeful(&self) -> impl Iterator<Item = &Candidate> {
        self.asked
            .iter()
            .filter(|(_, standing)| *standing != Standing::Refused)
            .map(|(candidate, _)| candidate)
    }

    fn standing(&self, wanted: Standing) -> impl Iterator<Item = usize> {
        self.asked
            .iter()
            .filter(move |(_, standing)| *standing == wanted)
            .map(|(candidate, _)| candidate.shard)
    }

    /// The first answer counts: a shard that is given up cannot confirm any more.
    fn note(&mut self, shard: usize, to: Standing) {
        let waiting = self
            .asked
            .iter_mut()
            .find(|(asked, standing)| asked.shard == shard && *standing == Standing::UnderWay);
        if let Some((_, standing)) = waiting {
            *standing = to;
        }
    }
}
