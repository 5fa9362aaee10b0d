//! The likeliest tokens against the CPU's sampler.

use std::sync::Arc;

use longshore_model::{Error, Likeliest, Sampler, SamplerParams};

use super::{case, random, same_bits};
use crate::model::choose::Broken;
use crate::model::compute::Compute;
use crate::model::failed;
use crate::model::programs::{Precision, Programs};
use crate::selftest::Case;
use crate::{Buffer, Device};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("likeliest of 50 tokens", 1e-6, |device| chosen(device, 50, 50)),
        case("likeliest of 5,000 tokens", 1e-6, |device| chosen(device, 5_000, 20)),
        case("likeliest of 9,000 tokens, 900 kept", 1e-6, |device| chosen(device, 9_000, 900)),
        case("logits that are no numbers", 0.0, broken),
    ]
}

fn compute(device: &Arc<dyn Device>) -> Compute {
    let precision = Precision::F32;
    Compute { device: Arc::clone(device), precision, programs: Programs::new(precision), products: None }
}

fn choose(
    device: &Arc<dyn Device>,
    logits: &[f32],
    count: usize,
    keep: usize,
) -> Result<Vec<Result<Likeliest, Broken>>, Error> {
    let buffer = Buffer::from_slice(device, logits).map_err(failed)?;
    compute(device).choose(buffer.whole(), logits.len() / count, count, keep).map_err(failed)
}

/// Three rows: random logits, many equal ones, extreme ones.
fn chosen(device: &Arc<dyn Device>, count: usize, keep: usize) -> Result<f64, Error> {
    let mut logits: Vec<f32> = random(count, 31).iter().map(|x| x * 20.0).collect();
    logits.extend((0..count).map(|i| [0.0, -0.0, -3.0, 0.0][i % 4]));
    logits.extend(
        random(count, 32).iter().enumerate().map(|(i, x)| if i % 3 == 0 { x * f32::MAX } else { *x }),
    );
    let found: Result<Vec<Likeliest>, Broken> = choose(device, &logits, count, keep)?.into_iter().collect();
    let Ok(found) = found else { return Ok(f64::INFINITY) };
    let mut distance = 0.0;
    for (row, found) in logits.chunks_exact(count).zip(found) {
        let mut order: Vec<u32> = (0..count as u32).collect();
        order
            .sort_by(|a, b| row[*b as usize].partial_cmp(&row[*a as usize]).expect("numbers").then(a.cmp(b)));
        let tokens: Vec<u32> = found.best.iter().map(|(token, _)| *token).collect();
        if tokens != order[..keep] {
            return Ok(f64::INFINITY);
        }
        let expected: Vec<f32> = tokens.iter().map(|token| row[*token as usize] + 0.0).collect();
        let values: Vec<f32> = found.best.iter().map(|(_, logit)| *logit).collect();
        distance += same_bits(&values, &expected);
        let largest = f64::from(row[order[0] as usize]);
        let sum: f64 = row.iter().map(|x| (f64::from(*x) - largest).exp()).sum();
        let expected = largest + sum.ln();
        distance += (found.log_sum_exp - expected).abs() / expected.abs().max(1.0);
        distance += greedy_differs(row, &found)?;
    }
    Ok(distance)
}

/// Whether the sampler chooses otherwise: 0, or infinity.
fn greedy_differs(row: &[f32], found: &Likeliest) -> Result<f64, Error> {
    let sampler = Sampler::new(SamplerParams::greedy())?;
    let all = sampler.sample(row, 0)?.token;
    let best = sampler.sample_best(&found.best, found.log_sum_exp, row.len(), 0)?.token;
    Ok(if all == best { 0.0 } else { f64::INFINITY })
}

fn broken(device: &Arc<dyn Device>) -> Result<f64, Error> {
    let count = 3_000;
    for (token, bad) in [(2_999, f32::NAN), (17, f32::INFINITY), (2_100, f32::NEG_INFINITY)] {
        let mut logits = random(2 * count, 33);
        logits[count + token] = bad;
        let found = choose(device, &logits, count, 3)?;
        // The row beside it is as good as alone.
        if found[1] != Err(Broken { token }) || found[..1] != choose(device, &logits[..count], count, 3)? {
            return Ok(f64::INFINITY);
        }
    }
    Ok(0.0)
}
