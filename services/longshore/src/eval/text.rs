//! Tasks in text: prefilled under a policy, answered greedily with exact attention but for streaming heads, scored.

use std::{collections::BTreeMap, time::Instant};

use anyhow::Result;
use indicatif::ProgressBar;
use longshore_model::{ChatTemplate, SpecialTokens};
use serde::Serialize;

use super::{
    candidate::Candidate,
    pairs::Pairs,
    report::{Table, percent},
    subject::Subject,
    tasks::{Kind, Task},
    watch::Watch,
};
use crate::console;

/// One prompt that was answered.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Answered {
    pub(super) task: &'static str,
    /// Tokens that were asked for.
    pub(super) length: u32,
    /// Tokens of the prompt.
    pub(super) prompt_tokens: usize,
    /// Of a needle, from 0 to 1.
    pub(super) depth: Option<f64>,
    pub(super) sample: u64,
    pub(super) policy: String,
    pub(super) fingerprint: String,
    /// From 0 to 1.
    pub(super) score: f64,
    pub(super) answer: String,
    pub(super) references: Vec<String>,
    pub(super) visited: Pairs,
    pub(super) seconds: f64,
    pub(super) attention_seconds: f64,
    pub(super) planning_seconds: f64,
}

/// One prompt to be made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) kind: Kind,
    pub(super) length: u32,
    pub(super) sample: u64,
}

/// Asks with or without the model's chat template.
pub(super) struct Asker<'a> {
    subject: &'a Subject,
    template: Option<&'a ChatTemplate>,
}

impl<'a> Asker<'a> {
    /// `chat`: use the model's template, if it has one.
    pub(super) fn new(subject: &'a Subject, chat: bool) -> Self {
        Self { subject, template: subject.node.info.chat_template.as_ref().filter(|_| chat) }
    }

    /// Tokens of a task's prompt and of how its answer begins.
    pub(super) fn encode(&self, task: &Task) -> Result<Vec<u32>> {
        let told = match self.template {
            Some(template) => template.render(&[("user", &task.prompt)], true)?,
            None => format!("{}\n", task.prompt),
        };
        let text = told + &task.prefix;
        Ok(self.subject.node.info.tokenizer.encode(&text, SpecialTokens::Add)?)
    }

    /// Makes every prompt and has each policy answer it.
    pub(super) fn ask_all(&self, wanted: &[Wanted], candidates: &[Candidate]) -> Result<Vec<Answered>> {
        let lengths: u64 = wanted.iter().map(|wanted| u64::from(wanted.length)).sum();
        let bar = console::token_bar("answering", lengths * candidates.len() as u64);
        let mut answered = Vec::with_capacity(wanted.len() * candidates.len());
        for wanted in wanted {
            let count = |task: &Task| Ok(self.encode(task)?.len());
            let task = wanted.kind.fitted(wanted.length as usize, wanted.sample, &count)?;
            let tokens = self.encode(&task)?;
            for candidate in candidates {
                answered.push(self.ask(wanted, &task, &tokens, candidate, &bar)?);
            }
        }
        bar.finish_and_clear();
        Ok(answered)
    }

    fn ask(
        &self,
        wanted: &Wanted,
        task: &Task,
        tokens: &[u32],
        candidate: &Candidate,
        bar: &ProgressBar,
    ) -> Result<Answered> {
        let tokenizer = &self.subject.node.info.tokenizer;
        let mut watch = Watch::default().telling(bar, self.subject.layers());
        let began = Instant::now();
        // What is right already does not get more right.
        let enough = |answer: &[u32]| task.metric.score(&tokenizer.decode(answer), &task.answers) >= 1.0;
        let answer = self.subject.answer(tokens, candidate, task.answer_tokens, &enough, &mut watch)?;
        let answer = tokenizer.decode(&answer);
        bar.inc(u64::from(wanted.length).saturating_sub(tokens.len() as u64));
        Ok(Answered {
            task: wanted.kind.name(),
            length: wanted.length,
            prompt_tokens: tokens.len(),
            depth: if let Kind::Needle(depth) = wanted.kind { Some(depth) } else { None },
            sample: wanted.sample,
            policy: candidate.name.clone(),
            fingerprint: candidate.policy.fingerprint(),
            score: task.metric.score(&answer, &task.answers),
            answer,
            references: task.answers.clone(),
            visited: watch.pairs(),
            seconds: began.elapsed().as_secs_f64(),
            attention_seconds: watch.attention.as_secs_f64(),
            planning_seconds: watch.planning.as_secs_f64(),
        })
    }
}

/// Mean score of some answers; `None` when there are none.
pub(super) fn mean_score<'a>(answers: impl IntoIterator<Item = &'a Answered>) -> Option<f64> {
    let (sum, count) =
        answers.into_iter().fold((0.0, 0.0), |(sum, count), answer| (sum + answer.score, count + 1.0));
    (count > 0.0).then(|| sum / count)
}

/// Scores by task, length and policy, with what they cost.
pub(super) fn table(answered: &[Answered], candidates: &[Candidate]) -> Table {
    let mut groups: BTreeMap<(usize, u32, usize), Vec<&Answered>> = BTreeMap::new();
    let order: Vec<&str> = answered.iter().map(|answer| answer.task).collect();
    for answer in answered {
        let task = order.iter().position(|task| *task == answer.task).unwrap_or_default();
        let policy = candidates.iter().position(|candidate| candidate.name == answer.policy);
        groups.entry((task, answer.length, policy.unwrap_or_default())).or_default().push(answer);
    }
    let mut table = Table::new([
        "task",
        "tokens",
        "policy",
        "score",
        "prompts",
        "density",
        "seconds",
        "attention s",
        "planning s",
    ]);
    for group in groups.values() {
        let mean = |of: fn(&Answered) -> f64| {
            group.iter().map(|answer| of(answer)).sum::<f64>() / group.len() as f64
        };
        let mut visited = Pairs::default();
        group.iter().for_each(|answer| visited.add(answer.visited));
        table.row([
            group[0].task.to_owned(),
            console::grouped(u64::from(group[0].length)),
            group[0].policy.clone(),
            format!("{:.1}", mean(|answer| answer.score) * 100.0),
            group.len().to_string(),
            percent(visited.density()),
            format!("{:.1}", mean(|answer| answer.seconds)),
            format!("{:.1}", mean(|answer| answer.attention_seconds)),
            format!("{:.1}", mean(|answer| answer.planning_seconds)),
        ]);
    }
    table
}
