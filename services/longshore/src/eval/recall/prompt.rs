//! Prompts of keys and values: the first token, pairs in filler, questions midway, questions at the end.

use std::collections::HashSet;

use anyhow::{Result, ensure};

use crate::{cli::RecallArgs, model::RecallVocabulary, random::Random};

/// Tokens of a slot: a pair, or a question and a filler.
const SLOT: usize = 2;
/// Tokens for each pair when nothing else is asked for.
const TOKENS_PER_PAIR: usize = 256;

/// How prompts of one length look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Tokens in all.
    pub(super) tokens: usize,
    /// Pairs.
    pub(super) pairs: usize,
    asked: usize,
    midway: usize,
    crowded: bool,
}

/// A key that is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Question {
    /// Of the token that asks: its logits are the answer.
    pub(super) position: u64,
    /// Position of the key in its pair.
    pub(super) pair: u64,
    /// The right value.
    pub(super) answer: u32,
    /// Whether it is asked before the end.
    pub(super) midway: bool,
}

/// Tokens and questions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prompt {
    pub(super) tokens: Vec<u32>,
    /// By position.
    pub(super) questions: Vec<Question>,
}

impl Shape {
    /// What the flags ask for; refuses what does not fit.
    pub(super) fn of(args: &RecallArgs, tokens: usize, vocabulary: &RecallVocabulary) -> Result<Self> {
        let (asked, midway) = (args.asked as usize, args.asked_midway as usize);
        let usual = (tokens / TOKENS_PER_PAIR).max(asked + midway).min(vocabulary.keys.len());
        let pairs = args.pairs.map_or(usual, |pairs| pairs as usize);
        let shape = Self { tokens, pairs, asked, midway, crowded: args.crowded };
        ensure!(
            pairs <= vocabulary.keys.len(),
            "`--pairs` is {pairs}, the model has {} keys",
            vocabulary.keys.len()
        );
        ensure!(
            asked + midway <= pairs,
            "`--asked` and `--asked-midway` are {asked} and {midway}, more than the {pairs} pairs together"
        );
        ensure!(
            2 * (pairs + midway) <= shape.slots(),
            "`--lengths` has {tokens}, too few for {pairs} pairs and {midway} questions midway"
        );
        Ok(shape)
    }

    /// Slots between the first token and the questions at the end.
    fn slots(&self) -> usize {
        (self.tokens - 1).saturating_sub(2 * self.asked) / SLOT
    }

    /// Where the pairs lie, ascending.
    fn pair_slots(&self, random: &mut Random) -> Vec<usize> {
        let slots = self.slots();
        if self.crowded {
            let first = random.below(slots / 2 - self.pairs + 1);
            return (first..first + self.pairs).collect();
        }
        let stride = slots / self.pairs;
        (0..self.pairs).map(|pair| pair * stride + random.below(stride)).collect()
    }

    /// The prompt of a sample.
    pub(super) fn prompt(&self, vocabulary: &RecallVocabulary, sample: u64) -> Prompt {
        let mut random = Random::of("recall", &[self.tokens as u64, self.pairs as u64, sample]);
        let mut any = |range: &std::ops::Range<u32>| range.start + random.below(range.len()) as u32;
        let mut tokens: Vec<u32> = (0..self.tokens).map(|_| any(&vocabulary.fillers)).collect();
        tokens[0] = vocabulary.bos;
        let values: Vec<u32> = (0..self.pairs).map(|_| any(&vocabulary.values)).collect();
        let keys = random.distinct(self.pairs, vocabulary.keys.len());
        let keys: Vec<u32> = keys.into_iter().map(|key| vocabulary.keys.start + key as u32).collect();
        let slots = self.pair_slots(&mut random);
        let place = |slot: usize| 1 + SLOT * slot;
        for (pair, &slot) in slots.iter().enumerate() {
            tokens[place(slot)] = keys[pair];
            tokens[place(slot) + 1] = values[pair];
        }
        let mut questions = Vec::with_capacity(self.asked + self.midway);
        let mut ask = |tokens: &mut Vec<u32>, position: usize, pair: usize, midway: bool| {
            tokens[position] = keys[pair];
            let (position, pair_at) = (position as u64, place(slots[pair]) as u64);
            questions.push(Question { position, pair: pair_at, answer: values[pair], midway });
        };
        let mut left: Vec<usize> = (0..self.pairs).collect();
        random.shuffle(&mut left);
        for slot in self.midway_slots(&slots, &mut random) {
            // Asked in the order of the slots: the earliest has the fewest pairs before it.
            if let Some(found) = left.iter().position(|&pair| slots[pair] < slot) {
                ask(&mut tokens, place(slot), left.swap_remove(found), true);
            }
        }
        for (question, &pair) in left.iter().take(self.asked).enumerate() {
            let position = self.tokens - 1 - 2 * (self.asked - 1 - question);
            ask(&mut tokens, position, pair, false);
        }
        Prompt { tokens, questions }
    }

    /// Free slots of the second half, ascending.
    fn midway_slots(&self, taken: &[usize], random: &mut Random) -> Vec<usize> {
        let (slots, taken) = (self.slots(), taken.iter().copied().collect::<HashSet<_>>());
        let free: Vec<usize> = (slots / 2..slots).filter(|slot| !taken.contains(slot)).collect();
        let chosen = random.distinct(self.midway.min(free.len()), free.len());
        let mut chosen: Vec<usize> = chosen.into_iter().map(|index| free[index]).collect();
        chosen.sort_unstable();
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocabulary() -> RecallVocabulary {
        RecallVocabulary { bos: 256, eos: 257, keys: 258..358, values: 358..458, fillers: 458..468 }
    }

    #[test]
    fn every_question_has_one_answer_before_it() {
        for (tokens, pairs, asked, midway, crowded) in
            [(4096, 40, 8, 8, false), (601, 64, 1, 20, true), (5000, 90, 30, 0, false)]
        {
            let shape = Shape { tokens, pairs, asked, midway, crowded };
            for sample in 0..5 {
                let prompt = shape.prompt(&vocabulary(), sample);
                assert_eq!(prompt, shape.prompt(&vocabulary(), sample));
                assert_eq!((prompt.tokens.len(), prompt.tokens[0]), (tokens, 256));
                assert_eq!(prompt.questions.len(), asked + midway);
                assert!(prompt.questions.is_sorted_by_key(|question| question.position));
                assert_eq!(prompt.questions.last().unwrap().position as usize, tokens - 1);
                for question in &prompt.questions {
                    let (at, pair) = (question.position as usize, question.pair as usize);
                    let key = prompt.tokens[at];
                    assert!(pair + 1 < at && vocabulary().keys.contains(&key), "{question:?}");
                    assert_eq!((prompt.tokens[pair], prompt.tokens[pair + 1]), (key, question.answer));
                    let uses = prompt.tokens.iter().filter(|token| **token == key).count();
                    assert_eq!(uses, 2, "a key stands in its pair and in its question");
                }
            }
        }
    }
}
