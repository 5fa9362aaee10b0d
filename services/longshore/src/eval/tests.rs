//! The recall model through the engine: exact attention answers every question.

use longshore_attention::KvDtype;
use longshore_compute::{ComputePool, PoolOptions};
use longshore_engine::Logits;

use super::{
    candidate::Candidate,
    subject::{Subject, likeliest},
    watch::Watch,
};
use crate::{
    config::Config,
    model::{RecallOptions, RecallVocabulary, make_recall},
    random::Random,
};

/// A recall model with f16 KV, and its vocabulary. Call on a runtime.
fn subject(options: &RecallOptions) -> (Subject, RecallVocabulary) {
    let folder = tempfile::tempdir().unwrap();
    make_recall(folder.path(), options).unwrap();
    let mut config = Config::default();
    config.model.reference = folder.path().display().to_string();
    config.model.kv_dtype = KvDtype::F16.name().to_owned();
    let pool = ComputePool::new(&PoolOptions { threads: 2, pin: Vec::new() }).unwrap();
    let subject = Subject::load(&config, pool).unwrap();
    let vocabulary = RecallVocabulary::read(&subject.node.info.tokenizer).unwrap();
    (subject, vocabulary)
}

/// Pairs at random depths of `tokens`, then a question every second token; checks every answer.
fn recalls(options: &RecallOptions, tokens: usize, pairs: usize) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let _inside = runtime.enter();
    let (subject, vocabulary) = subject(options);
    let mut random = Random::of("recall test", &[tokens as u64, pairs as u64]);
    let fillers = vocabulary.fillers.clone();
    let mut prompt: Vec<u32> =
        (0..tokens).map(|_| fillers.start + random.below(fillers.len()) as u32).collect();
    prompt[0] = vocabulary.bos;
    let room = (tokens - 1) / 2 - pairs;
    let keys = random.distinct(pairs, vocabulary.keys.len());
    let mut answers = Vec::new();
    for (pair, slot) in random.distinct(pairs, room).into_iter().enumerate() {
        let value = vocabulary.values.start + random.below(vocabulary.values.len()) as u32;
        prompt[1 + 2 * slot] = vocabulary.keys.start + keys[pair] as u32;
        prompt[2 + 2 * slot] = value;
        let question = tokens - 1 - 2 * pair;
        prompt[question] = vocabulary.keys.start + keys[pair] as u32;
        answers.push((question as u64, value));
    }
    let first_question = answers.last().unwrap().0;
    let wanted =
        |rows: std::ops::Range<u64>| if rows.end > first_question { Logits::All } else { Logits::None };
    let (mut asked, width) = (0, subject.vocabulary());
    let mut check = |first: u64, logits: &[f32]| {
        assert!(logits.iter().all(|logit| logit.is_finite()));
        for &(question, value) in &answers {
            let Some(row) = question.checked_sub(first).filter(|row| (*row as usize) < logits.len() / width)
            else {
                continue;
            };
            let found = likeliest(&logits[row as usize * width..][..width]);
            assert_eq!(found, value, "{tokens} tokens, the question at {question}");
            asked += 1;
        }
        Ok(())
    };
    subject.prefill(&prompt, &Candidate::exact(), &wanted, &mut check, &mut Watch::default()).unwrap();
    assert_eq!(asked, pairs);
}

#[test]
fn keys_are_recalled_among_4096_tokens_by_every_shape_of_heads() {
    for (kv_heads, group, head_dim) in [(1, 1, 64), (2, 3, 64), (1, 2, 128)] {
        let options = RecallOptions { kv_heads, group, head_dim, layers: 2, ..RecallOptions::default() };
        recalls(&options, 4096, 200);
    }
}

#[test]
fn keys_are_recalled_among_32768_tokens() {
    let options = RecallOptions { layers: 2, group: 1, ..RecallOptions::default() };
    recalls(&options, 32_768, 300);
}

#[test]
fn every_key_of_the_vocabulary_has_its_value() {
    recalls(&RecallOptions { layers: 3, ..RecallOptions::default() }, 5000, 1024);
}
