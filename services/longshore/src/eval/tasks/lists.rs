//! Aggregation: common and frequent words (RULER's `cwe` and `fwe`). No single place of the prompt answers them.

use super::{Task, words};
use crate::{eval::score::Metric, random::Random};

/// Words to be named.
const COMMON: usize = 10;
/// How often each of them stands in the list, and each other word.
const OFTEN: usize = 30;
const RARELY: usize = 3;
/// Exponent of the frequencies of coded words.
const ZETA: f64 = 2.0;
/// Most of the different coded words, as a share of all.
const CODED_SHARE: usize = 50;

/// The ten words that stand in the list most often; each unit is one other word.
pub(super) fn common_words(units: usize, random: &mut Random) -> Task {
    // Short lists have fewer of both, in the same proportion.
    let often = OFTEN.min((RARELY * units).div_ceil(COMMON)).max(RARELY + 1);
    let rarely = if often < OFTEN { 1 } else { RARELY };
    let all = words::plain(COMMON + units, random);
    let repeated = |(i, word): (usize, &String)| vec![word.clone(); if i < COMMON { often } else { rarely }];
    let mut list: Vec<String> = all.iter().enumerate().flat_map(repeated).collect();
    random.shuffle(&mut list);
    let numbered: Vec<String> =
        list.iter().enumerate().map(|(i, word)| format!("{}. {word}", i + 1)).collect();
    let prompt = format!(
        "Below is a numbered list of words. Some of them appear more often than others. Remember those that appear most often.\n\
         {}\nWhat are the {COMMON} most common words in the list above?",
        numbered.join(" ")
    );
    Task {
        prompt,
        prefix: format!("The {COMMON} words that appear most often in the list are:"),
        answers: all[..COMMON].to_vec(),
        metric: Metric::All,
        answer_tokens: 120,
    }
}

/// The coded words of ranks 2 to 4, where rank 1 is `...`; each unit is one word of the text.
pub(super) fn frequent_words(units: usize, random: &mut Random) -> Task {
    let total = units.max(64);
    let kinds = (total / CODED_SHARE).max(8);
    let coded = words::coded(kinds - 1, random);
    let weights: Vec<f64> = (1..=kinds).map(|rank| (rank as f64).powf(-ZETA)).collect();
    let sum: f64 = weights.iter().sum();
    let counts = weights.iter().map(|weight| ((total as f64 * weight / sum).round() as usize).max(1));
    let names = std::iter::once("...").chain(coded.iter().map(String::as_str));
    let mut text: Vec<&str> =
        names.zip(counts).flat_map(|(name, count)| std::iter::repeat_n(name, count)).collect();
    random.shuffle(&mut text);
    let prompt = format!(
        "Read the following coded text and keep track of how often each coded word appears. Ignore the dots '....'.\n\
         {}\nWhat are the three most frequently appearing words in the coded text above?",
        text.join(" ")
    );
    Task {
        prompt,
        prefix: "The three most frequently appearing words in the coded text are:".to_owned(),
        answers: coded[..3].to_vec(),
        metric: Metric::All,
        answer_tokens: 50,
    }
}
