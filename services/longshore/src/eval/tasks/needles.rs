//! Needles in noise or among other needles (RULER's `niah` tasks).

use super::{Task, buried, words};
use crate::{eval::score::Metric, random::Random};

/// Needles of multi-value and multi-query tasks.
const MANY: usize = 4;

fn fact(key: &str, value: &str) -> String {
    format!("One of the special magic numbers for {key} is: {value}.")
}

fn noise(units: usize) -> Vec<String> {
    vec![words::NOISE.to_owned(); units]
}

fn task(context: &str, asked: &str, numbers: &str, answers: Vec<String>) -> Task {
    let prompt = format!(
        "Special magic numbers are hidden in the following text. Remember them: you will be asked for some afterwards.\n\
         {context}\nWhat {numbers} for {asked} in the text above?"
    );
    let prefix = format!(
        "The special magic {} for {asked} in the text above {}",
        { if answers.len() == 1 { "number" } else { "numbers" } },
        if answers.len() == 1 { "is" } else { "are" }
    );
    Task { prompt, prefix, answers, metric: Metric::All, answer_tokens: 128 }
}

/// One needle, at `depth` or anywhere.
pub(super) fn single(units: usize, depth: Option<f64>, random: &mut Random) -> Task {
    let depth = depth.unwrap_or_else(|| random.unit());
    let key = words::keys(1, random).remove(0);
    let value = words::numbers(1, random);
    let context = buried(noise(units), vec![(depth, fact(&key, &value[0]))]);
    Task { answer_tokens: 32, ..task(&context, &key, "is the special magic number", value) }
}

/// One needle in a haystack of needles with other keys.
pub(super) fn multikey(units: usize, random: &mut Random) -> Task {
    let depth = random.unit();
    let mut keys = words::keys(units + 1, random);
    let mut values = words::numbers(units + 1, random);
    let (key, value) = (keys.remove(0), values.remove(0));
    let others = keys.iter().zip(&values).map(|(key, value)| fact(key, value)).collect();
    let context = buried(others, vec![(depth, fact(&key, &value))]);
    Task { answer_tokens: 32, ..task(&context, &key, "is the special magic number", vec![value]) }
}

/// Four values of one key.
pub(super) fn multivalue(units: usize, random: &mut Random) -> Task {
    let key = words::keys(1, random).remove(0);
    let values = words::numbers(MANY, random);
    let needles = values.iter().map(|value| (random.unit(), fact(&key, value))).collect();
    let context = buried(noise(units), needles);
    task(&context, &key, "are all the special magic numbers", values)
}

/// The values of four keys.
pub(super) fn multiquery(units: usize, random: &mut Random) -> Task {
    let keys = words::keys(MANY, random);
    let values = words::numbers(MANY, random);
    let needles = keys.iter().zip(&values).map(|(key, value)| (random.unit(), fact(key, value))).collect();
    let context = buried(noise(units), needles);
    let asked = format!("{}, and {}", keys[..MANY - 1].join(", "), keys[MANY - 1]);
    task(&context, &asked, "are all the special magic numbers", values)
}
