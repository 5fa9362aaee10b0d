//! Every range of the sampling parameters, its ends and NaN.

use crate::{types::Sampling, v1::SamplingParams};

fn check(params: SamplingParams, field: Option<&str>) {
    let shown = format!("{params:?}");
    match (Sampling::try_from(params), field) {
        (Ok(sampling), None) => sampling.validate().unwrap(),
        (Err(fault), Some(field)) => assert_eq!(fault.field(), field, "{shown}"),
        (result, _) => panic!("{shown} became {result:?}"),
    }
}

/// `good` and `bad` values of one float field; NaN and infinities are always bad.
fn check_float(field: &str, set: impl Fn(&mut SamplingParams, f32), good: &[f32], bad: &[f32]) {
    let with = |value| {
        let mut params = SamplingParams::default();
        set(&mut params, value);
        params
    };
    good.iter().for_each(|value| check(with(*value), None));
    let always = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    bad.iter().chain(&always).for_each(|value| check(with(*value), Some(field)));
}

#[test]
fn floats_have_ranges() {
    check_float(
        "temperature",
        |p, v| p.temperature = Some(v),
        &[0.0, -0.0, 0.7, 100.0],
        &[-1.0, -1e-9, 100.1],
    );
    check_float("top_p", |p, v| p.top_p = Some(v), &[1e-9, 0.5, 1.0], &[0.0, -0.5, 1.01]);
    check_float("min_p", |p, v| p.min_p = Some(v), &[0.0, 0.5, 1.0], &[-0.1, 1.01]);
    check_float(
        "repetition_penalty",
        |p, v| p.repetition_penalty = Some(v),
        &[1e-9, 1.0, 10.0],
        &[0.0, -1.0, 10.1],
    );
    check_float("presence_penalty", |p, v| p.presence_penalty = Some(v), &[-2.0, 0.0, 2.0], &[-2.1, 2.1]);
    check_float("frequency_penalty", |p, v| p.frequency_penalty = Some(v), &[-2.0, 0.0, 2.0], &[-2.1, 2.1]);
}

#[test]
fn integers_have_ranges() {
    check(SamplingParams { max_tokens: Some(0), ..Default::default() }, Some("max_tokens"));
    check(SamplingParams { max_tokens: Some(1), ..Default::default() }, None);
    check(SamplingParams { max_tokens: Some(u32::MAX), ..Default::default() }, None);
    check(SamplingParams { logprobs: Some(20), ..Default::default() }, None);
    check(SamplingParams { logprobs: Some(0), ..Default::default() }, None);
    check(SamplingParams { logprobs: Some(21), ..Default::default() }, Some("logprobs"));
    check(SamplingParams { top_k: Some(u32::MAX), seed: Some(u64::MAX), ..Default::default() }, None);
}

#[test]
fn unset_fields_take_their_defaults() {
    assert_eq!(Sampling::try_from(SamplingParams::default()).unwrap(), Sampling::default());
}

#[test]
fn faults_say_value_and_range() {
    let params = SamplingParams { temperature: Some(-1.0), ..Default::default() };
    let fault = Sampling::try_from(params).unwrap_err();
    assert_eq!(fault.to_string(), "`temperature` is -1, must be from 0 to 100");
}
