//! Many-shot classification in context (Agarwal et al., arXiv 2404.11018), generated after the ICL tasks of HELMET (Yen et al.,
//! arXiv 2410.02694): labels are codes that say nothing, so that only the examples tell them, and examples come in rounds that have
//! each class once.

use super::{Task, words};
use crate::{eval::score::Metric, random::Random};

/// Classes, or as many as there are examples.
const CLASSES: usize = 8;
/// Nouns of a class; a text has two of them.
const NOUNS_EACH: usize = 6;

/// The label of a text by those of many others; each unit is one example.
pub(super) fn classification(units: usize, random: &mut Random) -> Task {
    let classes = CLASSES.min(units);
    let nouns = random.distinct(classes * NOUNS_EACH, words::NOUNS.len());
    let labels = words::coded(classes, random);
    let mut texts = std::collections::HashSet::new();
    let mut lines = Vec::with_capacity(units);
    let mut round: Vec<usize> = (0..classes).collect();
    for example in 0..units {
        if example.is_multiple_of(classes) {
            random.shuffle(&mut round);
        }
        let class = round[example % classes];
        let text = text(&nouns[class * NOUNS_EACH..][..NOUNS_EACH], random);
        lines.push(format!("text: {text}\nlabel: {}", labels[class]));
        texts.insert(text);
    }
    let asked = random.below(classes);
    let own = &nouns[asked * NOUNS_EACH..][..NOUNS_EACH];
    // An example would answer itself. Texts of a class are 30,720, so that one is soon found that no prompt has.
    let mut question = text(own, random);
    while texts.contains(&question) && texts.len() < NOVEL_BELOW {
        question = text(own, random);
    }
    let prompt = format!(
        "Every text below belongs to one of {classes} classes, and each class has a code as its label.\n{}\n\
         Which label does this text have?\ntext: {question}",
        lines.join("\n")
    );
    Task {
        prompt,
        prefix: "label:".to_owned(),
        answers: vec![labels[asked].clone()],
        metric: Metric::Part,
        answer_tokens: 16,
    }
}

/// Different texts up to which the question is none of them: an eighth of what there are.
const NOVEL_BELOW: usize = 30_720;

/// Two nouns of a class.
fn text(nouns: &[usize], random: &mut Random) -> String {
    let two = random.distinct(2, nouns.len());
    let mut thing = |index: usize| {
        let (adjective, noun) = (random.choose(&words::ADJECTIVES), words::NOUNS[nouns[two[index]]]);
        format!("the {adjective} {noun}")
    };
    format!("{} and {}", thing(0), thing(1))
}
