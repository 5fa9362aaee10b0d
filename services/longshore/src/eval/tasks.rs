//! Generated tasks: a prompt, how its answer begins, and what it must contain. The number of units of haystack fits the prompt
//! to a length; everything else follows from the task, the length and the sample.

mod lists;
mod needles;
mod relations;
mod shots;
mod words;

use anyhow::{Result, bail};

use super::score::Metric;
use crate::{cli::RulerTask, random::Random};

/// A prompt and its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Task {
    /// What is told and asked.
    pub(super) prompt: String,
    /// How the answer begins; given with the prompt.
    pub(super) prefix: String,
    /// What the answer must contain.
    pub(super) answers: Vec<String>,
    /// How that is counted.
    pub(super) metric: Metric,
    /// Most tokens of the answer.
    pub(super) answer_tokens: usize,
}

/// Which task, with what makes its points differ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Kind {
    /// One needle at a depth from 0 (the beginning) to 1.
    Needle(f64),
    /// A task of RULER and its kin.
    Ruler(RulerTask),
}

impl Kind {
    /// Name in tables.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Needle(_) => "needle",
            Self::Ruler(task) => match task {
                RulerTask::NiahSingle => "niah_single",
                RulerTask::NiahMultikey => "niah_multikey",
                RulerTask::NiahMultivalue => "niah_multivalue",
                RulerTask::NiahMultiquery => "niah_multiquery",
                RulerTask::Vt => "vt",
                RulerTask::Cwe => "cwe",
                RulerTask::Fwe => "fwe",
                RulerTask::Threading => "threading",
                RulerTask::Ancestry => "ancestry",
                RulerTask::ManyShot => "many_shot",
            },
        }
    }

    /// The task with so many units of haystack.
    fn make(self, units: usize, random: &mut Random) -> Task {
        match self {
            Self::Needle(depth) => needles::single(units, Some(depth), random),
            Self::Ruler(task) => match task {
                RulerTask::NiahSingle => needles::single(units, None, random),
                RulerTask::NiahMultikey => needles::multikey(units, random),
                RulerTask::NiahMultivalue => needles::multivalue(units, random),
                RulerTask::NiahMultiquery => needles::multiquery(units, random),
                RulerTask::Vt => relations::variables(units, random),
                RulerTask::Cwe => lists::common_words(units, random),
                RulerTask::Fwe => lists::frequent_words(units, random),
                RulerTask::Threading => relations::threading(units, random),
                RulerTask::Ancestry => relations::ancestry(units, random),
                RulerTask::ManyShot => shots::classification(units, random),
            },
        }
    }

    /// The longest task whose prompt and answer have at most `length` tokens by `count` (tokens of a task's prompt).
    pub(super) fn fitted(
        self,
        length: usize,
        sample: u64,
        count: &dyn Fn(&Task) -> Result<usize>,
    ) -> Result<Task> {
        let make = |units| self.make(units, &mut Random::of(self.name(), &[length as u64, sample]));
        let fits = |task: &Task| Ok::<_, anyhow::Error>(count(task)? + task.answer_tokens <= length);
        let (mut below, mut best) = (1, make(1));
        if !fits(&best)? {
            bail!("`--lengths` has {length}, too short for the task `{}`", self.name());
        }
        // No unit is less than a token.
        let mut above = length;
        while above - below > 1 {
            let middle = below.midpoint(above);
            let task = make(middle);
            if fits(&task)? { (below, best) = (middle, task) } else { above = middle }
        }
        Ok(best)
    }
}

/// Lines of haystack with others put between them, each at its depth from 0 to 1; those at equal depths in their order.
fn buried(mut hay: Vec<String>, mut needles: Vec<(f64, String)>) -> String {
    needles.sort_by(|a, b| b.0.total_cmp(&a.0));
    let units = hay.len() as f64;
    for (depth, needle) in needles {
        hay.insert((depth * units).round() as usize, needle);
    }
    hay.join("\n")
}

#[cfg(test)]
mod tests;
