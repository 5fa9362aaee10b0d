//! Every task is answered by its own prompt, fits its length, and is the same every time.

use super::*;

const KINDS: [Kind; 12] = [
    Kind::Needle(0.0),
    Kind::Needle(1.0),
    Kind::Ruler(RulerTask::NiahSingle),
    Kind::Ruler(RulerTask::NiahMultikey),
    Kind::Ruler(RulerTask::NiahMultivalue),
    Kind::Ruler(RulerTask::NiahMultiquery),
    Kind::Ruler(RulerTask::Vt),
    Kind::Ruler(RulerTask::Cwe),
    Kind::Ruler(RulerTask::Fwe),
    Kind::Ruler(RulerTask::Threading),
    Kind::Ruler(RulerTask::Ancestry),
    Kind::Ruler(RulerTask::ManyShot),
];

/// Stands in for a tokenizer: a token is up to four bytes.
fn tokens(task: &Task) -> Result<usize> {
    Ok((task.prompt.len() + task.prefix.len()).div_ceil(4))
}

#[test]
fn prompts_fit_their_length_and_hold_their_answers() {
    for kind in KINDS {
        for length in [1024, 4000] {
            let task = kind.fitted(length, 0, &tokens).unwrap();
            let used = tokens(&task).unwrap() + task.answer_tokens;
            assert!(used <= length && used + 250 > length, "{}: {used} of {length}", kind.name());
            for answer in &task.answers {
                assert!(task.prompt.contains(answer.as_str()), "{}: {answer}", kind.name());
                assert!(!task.prefix.contains(answer.as_str()), "{}: {answer} is told", kind.name());
            }
            assert_eq!(task, kind.fitted(length, 0, &tokens).unwrap());
            assert_ne!(task.prompt, kind.fitted(length, 1, &tokens).unwrap().prompt);
        }
        let message = kind.fitted(40, 0, &tokens).unwrap_err().to_string();
        assert!(message.contains(kind.name()), "{message}");
    }
}

#[test]
fn needles_lie_at_their_depth() {
    for depth in [0.0, 0.25, 1.0] {
        let task = Kind::Needle(depth).fitted(8000, 0, &tokens).unwrap();
        let at = task.prompt.find(&task.answers[0]).unwrap() as f64 / task.prompt.len() as f64;
        assert!((at - depth).abs() < 0.02, "{at} instead of {depth}");
    }
}

#[test]
fn counts_decide_lists() {
    let count =
        |task: &Task, word: &str| task.prompt.split_whitespace().filter(|other| *other == word).count();
    let common = Kind::Ruler(RulerTask::Cwe).fitted(8000, 3, &tokens).unwrap();
    let list: Vec<&str> = common.prompt.split_whitespace().filter(|word| !word.ends_with('.')).collect();
    let least = common.answers.iter().map(|word| count(&common, word)).min().unwrap();
    let listed = |word: &&&str| list.iter().filter(|other| other == word).count() >= least;
    let others = list.iter().filter(|word| !common.answers.iter().any(|answer| answer == **word));
    assert!(least >= 30 && others.filter(listed).count() == 0, "{least}");
    let frequent = Kind::Ruler(RulerTask::Fwe).fitted(8000, 3, &tokens).unwrap();
    let counts: Vec<usize> = frequent.answers.iter().map(|word| count(&frequent, word)).collect();
    assert!(counts.is_sorted_by(|a, b| a > b) && counts[2] > 20, "{counts:?}");
}

#[test]
fn a_thread_leads_forward_to_its_end() {
    let task = Kind::Ruler(RulerTask::Threading).fitted(8000, 1, &tokens).unwrap();
    let (object, question) = task.prompt.split_once("}\n").unwrap();
    let mut key = question.split('"').nth(1).unwrap();
    let mut at = 0;
    for _ in 0..4 {
        let place = object.find(&format!("\"{key}\": ")).unwrap();
        assert!(place >= at, "backwards");
        at = place;
        key = object[place..].split('"').nth(3).unwrap();
    }
    assert_eq!(key, task.answers[0]);
}

/// Reads the examples as a model would have to, and the question by what they say of its nouns.
#[test]
fn many_examples_tell_the_label_and_no_example_is_the_question() {
    for sample in 0..8 {
        let task = Kind::Ruler(RulerTask::ManyShot).fitted(8000, sample, &tokens).unwrap();
        let mut told = std::collections::BTreeMap::new();
        let mut counts = std::collections::BTreeMap::<&str, usize>::new();
        let mut texts = Vec::new();
        let nouns = |text: &str| -> Vec<String> {
            let words: Vec<&str> = text.split(' ').collect();
            assert_eq!((words.len(), words[0], words[3], words[4]), (7, "the", "and", "the"), "{text}");
            vec![words[2].to_owned(), words[6].to_owned()]
        };
        let mut lines = task.prompt.lines();
        while let Some(line) = lines.next() {
            let Some(text) = line.strip_prefix("text: ") else { continue };
            let Some(label) = lines.next().and_then(|line| line.strip_prefix("label: ")) else {
                assert!(!texts.contains(&text), "an example is the question: {text}");
                let labels: Vec<&str> = nouns(text).iter().map(|noun| told[noun]).collect();
                assert_eq!(labels, [task.answers[0].as_str(); 2], "{text}");
                break;
            };
            for noun in nouns(text) {
                assert_eq!(*told.entry(noun).or_insert(label), label, "a noun has one label");
            }
            *counts.entry(label).or_default() += 1;
            texts.push(text);
        }
        let (least, most) = (counts.values().min().unwrap(), counts.values().max().unwrap());
        assert!(counts.len() == 8 && *least > 20 && most - least <= 1, "{counts:?}");
        assert_eq!(task.metric.score(&format!(" {}.", task.answers[0]), &task.answers), 1.0);
        let other = counts.keys().find(|label| **label != task.answers[0]).unwrap();
        assert_eq!(task.metric.score(other, &task.answers), 0.0);
    }
}
