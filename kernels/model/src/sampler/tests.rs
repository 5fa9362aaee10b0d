//! The sampler against plain definitions of what it should do.

use proptest::prelude::*;

use super::choice::{best, log_sum_exp, survivors, uniform};
use super::*;
use crate::Likeliest;

fn sampler(params: SamplerParams) -> Sampler {
    Sampler::new(params).unwrap()
}

fn tokens(logits: &[f32], params: &SamplerParams) -> Vec<u32> {
    let mut tokens: Vec<u32> = survivors(logits, params).into_iter().map(|(token, _)| token).collect();
    tokens.sort_unstable();
    tokens
}

/// Draws `n` times and returns how often each token came.
fn frequencies(sampler: &Sampler, logits: &[f32], n: u64) -> Vec<f64> {
    let mut counts = vec![0.0; logits.len()];
    for index in 0..n {
        counts[sampler.sample(logits, index).unwrap().token as usize] += 1.0;
    }
    counts.iter().map(|count| count / n as f64).collect()
}

/// Logits of these probabilities.
fn logits_of(probabilities: &[f64]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln() as f32).collect()
}

#[track_caller]
fn check_close(found: &[f64], expected: &[f64], n: u64) {
    // Chi-square against its mean and four standard deviations.
    let cells: Vec<(f64, f64)> =
        found.iter().copied().zip(expected.iter().copied()).filter(|(_, e)| *e > 0.0).collect();
    assert!(found.iter().zip(expected).all(|(f, e)| *e > 0.0 || *f == 0.0), "{found:?} outside {expected:?}");
    let chi: f64 = cells.iter().map(|(f, e)| n as f64 * (f - e).powi(2) / e).sum();
    let freedom = cells.len() as f64 - 1.0;
    assert!(
        chi < freedom + 4.0 * (2.0 * freedom).sqrt(),
        "chi-square {chi} of {found:?} against {expected:?}"
    );
}

#[test]
fn greedy_takes_the_lowest_of_the_likeliest() {
    let greedy = sampler(SamplerParams::greedy());
    assert_eq!(greedy.sample(&[0.0, 3.0, -1.0, 3.0], 0).unwrap().token, 1);
    assert_eq!(greedy.sample(&[-0.0, 0.0], 5).unwrap().token, 0);
    let equal = vec![1.5; 40_000];
    assert_eq!(best(&equal, 3), [0, 1, 2]);
}

#[test]
fn frequencies_follow_the_distribution() {
    let (p, n) = ([0.5, 0.25, 0.15, 0.07, 0.03], 20_000);
    let logits = logits_of(&p);
    let draw = |params| frequencies(&sampler(SamplerParams { seed: 42, ..params }), &logits, n);
    check_close(&draw(SamplerParams::default()), &p, n);
    let flat: Vec<f64> = p.iter().map(|p: &f64| p.sqrt()).collect();
    let total: f64 = flat.iter().sum();
    let flat: Vec<f64> = flat.iter().map(|p| p / total).collect();
    check_close(&draw(SamplerParams { temperature: 2.0, ..Default::default() }), &flat, n);
    check_close(
        &draw(SamplerParams { top_k: 2, ..Default::default() }),
        &[2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0, 0.0],
        n,
    );
    check_close(
        &draw(SamplerParams { top_p: 0.8, ..Default::default() }),
        &[0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0.0, 0.0],
        n,
    );
    check_close(
        &draw(SamplerParams { min_p: 0.2, ..Default::default() }),
        &[0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0.0, 0.0],
        n,
    );
}

#[test]
fn top_p_counts_what_top_k_left() {
    let logits = logits_of(&[0.4, 0.3, 0.2, 0.1]);
    // Of {0, 1, 2} the first holds 0.44 and the first two 0.78; of all four they hold 0.4 and 0.7.
    let params = SamplerParams { top_k: 3, top_p: 0.75, ..Default::default() };
    assert_eq!(tokens(&logits, &params), [0, 1]);
    assert_eq!(tokens(&logits, &SamplerParams { top_p: 0.75, ..Default::default() }), [0, 1, 2]);
    // Temperature comes first: a sharp distribution has a small nucleus.
    assert_eq!(tokens(&logits, &SamplerParams { temperature: 0.1, ..params }), [0]);
}

#[test]
fn large_nuclei_are_found_whole() {
    let logits: Vec<f32> = (0..30_000).map(|i| ((i * 7919) % 30_000) as f32 * 1e-6).collect();
    let kept = survivors(&logits, &SamplerParams { top_p: 0.5, ..Default::default() });
    let total = log_sum_exp(&logits).exp();
    let mass =
        |n: usize| kept[..n].iter().map(|(t, _)| f64::from(logits[*t as usize]).exp()).sum::<f64>() / total;
    assert!(kept.len() > 14_000 && mass(kept.len()) >= 0.5 - 1e-12 && mass(kept.len() - 1) < 0.5 + 1e-12);
}

#[test]
fn penalties_change_seen_tokens_only() {
    let logits = [2.0, -2.0, 1.0, 0.5];
    let mut repetition = sampler(SamplerParams { repetition_penalty: 2.0, ..SamplerParams::greedy() });
    repetition.observe_prompt(&[0, 1, 1, 900]);
    repetition.observe_generated(0);
    assert_eq!(repetition.penalised(&logits).unwrap(), [1.0, -4.0, 1.0, 0.5]);
    let mut counted =
        sampler(SamplerParams { presence_penalty: 0.5, frequency_penalty: 0.25, ..SamplerParams::greedy() });
    counted.observe_prompt(&[3]);
    for token in [0, 2, 0, 0] {
        counted.observe_generated(token);
    }
    assert_eq!(counted.penalised(&logits).unwrap(), [2.0 - 0.5 - 0.75, -2.0, 1.0 - 0.5 - 0.25, 0.5]);
    assert_eq!(sampler(SamplerParams::default()).penalised(&logits), None);
}

#[test]
fn extreme_penalties_and_temperatures_stay_finite() {
    let params =
        SamplerParams { repetition_penalty: f32::MIN_POSITIVE, temperature: 1e-30, ..Default::default() };
    let mut extreme = sampler(params);
    extreme.observe_prompt(&[0, 1, 2]);
    assert_eq!(extreme.sample(&[3e38, 3e38, -3e38, 0.0], 1).unwrap().token, 0);
    let hot = sampler(SamplerParams { temperature: f32::MAX, top_p: 0.9, min_p: 0.5, ..Default::default() });
    assert!(hot.sample(&[f32::MAX, f32::MIN, 0.0], 1).unwrap().token < 3);
}

#[test]
fn logprobs_are_of_the_raw_distribution() {
    let p = [0.5, 0.25, 0.15, 0.07, 0.03];
    let params =
        SamplerParams { logprobs: Some(2), presence_penalty: 2.0, temperature: 0.0, ..Default::default() };
    let mut sampler = sampler(params);
    sampler.observe_generated(0);
    sampler.observe_generated(1);
    let sampled = sampler.sample(&logits_of(&p), 0).unwrap();
    assert_eq!(sampled.token, 2);
    assert!((f64::from(sampled.logprob.unwrap()) - 0.15_f64.ln()).abs() < 1e-6);
    assert_eq!(sampled.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [0, 1]);
    assert!((f64::from(sampled.top[1].1) - 0.25_f64.ln()).abs() < 1e-6);
    let chosen_only = Sampler::new(SamplerParams { logprobs: Some(0), ..params }).unwrap();
    let sampled = chosen_only.sample(&[1.0], 3).unwrap();
    assert_eq!((sampled.logprob, sampled.top), (Some(0.0), Vec::new()));
}

/// Pins the draws to those of another ChaCha8: another generator, key or position would change every seeded answer.
#[test]
fn draws_are_pinned() {
    let draws: Vec<u64> = [(0, 0), (0, 1), (7, 0), (u64::MAX, u64::MAX)]
        .into_iter()
        .map(|(seed, index)| (uniform(seed, index) * 1e15) as u64)
        .collect();
    assert_eq!(draws, [456_750_965_725_034, 231_195_028_662_929, 676_054_592_269_464, 403_751_004_347_677]);
}

#[test]
fn logits_that_are_not_finite_are_refused() {
    let sampler = sampler(SamplerParams::default());
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error = sampler.sample(&[0.0, value], 0).unwrap_err();
        assert_eq!(error.kind(), crate::Kind::Corrupt);
        assert!(error.to_string().contains("logit of token `1`"), "{error}");
    }
    assert!(sampler.sample(&[], 0).unwrap_err().to_string().contains("`logits`"));
    assert!(sampler.sample(&[f32::MAX, f32::MAX], 0).is_ok());
}

#[test]
fn parameters_out_of_range_are_refused_by_name() {
    let default = SamplerParams::default;
    let not_numbers = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    let mut cases = vec![(SamplerParams { logprobs: Some(21), ..default() }, "logprobs")];
    for value in not_numbers.into_iter().chain([-1.0]) {
        cases.push((SamplerParams { temperature: value, ..default() }, "temperature"));
    }
    for value in not_numbers.into_iter().chain([0.0, -0.5, 1.0001]) {
        cases.push((SamplerParams { top_p: value, ..default() }, "top_p"));
    }
    for value in not_numbers.into_iter().chain([-0.1, 1.1]) {
        cases.push((SamplerParams { min_p: value, ..default() }, "min_p"));
    }
    for value in not_numbers.into_iter().chain([0.0, -1.0]) {
        cases.push((SamplerParams { repetition_penalty: value, ..default() }, "repetition_penalty"));
    }
    for value in not_numbers.into_iter().chain([-2.1, 2.1]) {
        cases.push((SamplerParams { presence_penalty: value, ..default() }, "presence_penalty"));
        cases.push((SamplerParams { frequency_penalty: value, ..default() }, "frequency_penalty"));
    }
    for (params, field) in cases {
        let error = Sampler::new(params).unwrap_err().to_string();
        assert!(error.starts_with(&format!("`{field}` is ")), "{params:?}: {error}");
    }
}

fn any_logits() -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(-20.0_f32..20.0, 1..400)
}

fn any_params() -> impl Strategy<Value = SamplerParams> {
    (0.0_f32..3.0, 0_u32..50, 0.01_f32..=1.0, 0.0_f32..=1.0, 0.5_f32..2.0, any::<u64>()).prop_map(
        |(temperature, top_k, top_p, min_p, repetition_penalty, seed)| SamplerParams {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seed,
            ..Default::default()
        },
    )
}

proptest! {
    /// What is kept is the smallest set of likeliest tokens that holds top-p of the top-k, less what min-p drops.
    #[test]
    fn kept_sets_match_their_definition(logits in any_logits(), params in any_params()) {
        prop_assume!(params.temperature > 0.01);
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].partial_cmp(&logits[*a]).unwrap().then(a.cmp(b)));
        if params.top_k > 0 {
            order.truncate(params.top_k as usize);
        }
        // Relative to the likeliest, because plain exponentials underflow at low temperatures.
        let highest = f64::from(logits[order[0]]);
        let exp = |i: usize| ((f64::from(logits[i]) - highest) / f64::from(params.temperature)).exp();
        let total: f64 = order.iter().map(|i| exp(*i)).sum();
        let kept = tokens(&logits, &params);
        prop_assert!(kept.contains(&(order[0] as u32)));
        let (mut before, slack) = (0.0, 1e-9);
        for i in order {
            let inside = kept.contains(&(i as u32));
            let wanted = before < f64::from(params.top_p) && exp(i) >= f64::from(params.min_p);
            let close = (before - f64::from(params.top_p)).abs() < slack
                || (exp(i) - f64::from(params.min_p)).abs() < slack;
            prop_assert!(inside == wanted || close, "token {} is {}", i, if inside { "kept" } else { "dropped" });
            before += exp(i) / total;
        }
    }

    /// A draw depends on parameters, seen tokens, logits and index only: a sampler that is rebuilt in the middle goes on alike.
    #[test]
    fn resumed_samplers_draw_alike(logits in any_logits(), params in any_params(), cut in 0_u64..12) {
        let run = |sampler: &mut Sampler, range: std::ops::Range<u64>| -> Vec<u32> {
            range.map(|index| {
                let token = sampler.sample(&logits, index).unwrap().token;
                sampler.observe_generated(token);
                token
            }).collect()
        };
        let mut whole = sampler(params);
        whole.observe_prompt(&[1, 2, 3]);
        let all = run(&mut whole, 0..12);
        let mut resumed = sampler(params);
        resumed.observe_prompt(&[1]);
        resumed.observe_prompt(&[2, 3]);
        all[..cut as usize].iter().for_each(|token| resumed.observe_generated(*token));
        prop_assert_eq!(run(&mut resumed, cut..12), &all[cut as usize..]);
    }

    /// A choice out of candidates is the choice out of all logits.
    #[test]
    fn candidates_are_enough(logits in any_logits(), params in any_params(), greedy: bool, logprobs in 0_u32..8) {
        let temperature = if greedy { 0.0 } else { params.temperature };
        let logprobs = (logprobs > 0).then_some(logprobs);
        let chooser = sampler(SamplerParams { temperature, logprobs, ..params });
        let Some(count) = chooser.candidates(logits.len()) else {
            let all = params.top_k == 0 || params.top_k as usize >= logits.len();
            prop_assert!(temperature > 0.0 && all);
            prop_assert!(chooser.sample_best(&[(0, 0.0)], 0.0, logits.len(), 0).is_err());
            return Ok(());
        };
        let candidates = |count| -> Vec<(u32, f32)> {
            best(&logits, count).into_iter().map(|token| (token, logits[token as usize])).collect()
        };
        let sum = log_sum_exp(&logits);
        for index in 0..5 {
            let expected = chooser.sample(&logits, index).unwrap();
            prop_assert_eq!(&chooser.sample_best(&candidates(count), sum, logits.len(), index).unwrap(), &expected);
            prop_assert_eq!(&chooser.sample_best(&candidates(count + 3), sum, logits.len(), index).unwrap(), &expected);
        }
        prop_assert!(chooser.sample_best(&candidates(count - 1), sum, logits.len(), 0).is_err());
    }
}

#[test]
fn penalised_tokens_take_all_logits() {
    let mut chooser = sampler(SamplerParams { repetition_penalty: 2.0, ..SamplerParams::greedy() });
    assert_eq!(chooser.candidates(100), Some(1));
    chooser.observe_generated(7);
    assert_eq!(chooser.candidates(100), None);
    let error = chooser.sample_best(&[(1, 2.0)], 3.0, 100, 0).unwrap_err();
    assert!(error.to_string().contains("all logits"), "{error}");
}

#[test]
fn of_equal_logits_the_lowest_token_wins_however_the_row_comes() {
    let logits = vec![-1.0, 0.0, 3.0, -0.0, 3.0, 3.0, 0.0];
    let all = RowLogits::All(logits.clone());
    let best = vec![(2, 3.0), (4, 3.0), (5, 3.0)];
    let chosen = RowLogits::Likeliest(Likeliest { best, log_sum_exp: log_sum_exp(&logits) });
    for logprobs in [None, Some(3)] {
        let chooser = sampler(SamplerParams { logprobs, ..SamplerParams::greedy() });
        let found = [&all, &chosen].map(|row| chooser.sample_row(row, logits.len(), 0).unwrap());
        assert_eq!(found[0], found[1]);
        assert_eq!(found[0].token, 2);
    }
    // Zeros of both signs are equal.
    let zeros = RowLogits::All(vec![-1.0, -0.0, 0.0]);
    assert_eq!(sampler(SamplerParams::greedy()).sample_row(&zeros, 3, 0).unwrap().token, 1);
    let too_few = RowLogits::Likeliest(Likeliest { best: Vec::new(), log_sum_exp: 0.0 });
    assert!(sampler(SamplerParams::greedy()).sample_row(&too_few, 7, 0).is_err());
}
