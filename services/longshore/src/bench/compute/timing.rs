//! Times work that is short or long.

use std::time::Instant;

use anyhow::Result;

use crate::bench::statistics::Spread;

/// A sample of shorter work is the mean of as many runs as fill this many seconds.
const SAMPLE_SECONDS: f64 = 0.1;
/// A first run that takes longer counts as a sample: at that length nothing is cold for a part that matters.
const LONG_SECONDS: f64 = 1.0;

/// Seconds of one run of `work`, sampled `repeats` times after a run that does not count.
pub(super) fn sample(repeats: usize, mut work: impl FnMut() -> Result<()>) -> Result<Spread> {
    let first = timed(1, &mut work)?;
    let mut samples = Vec::with_capacity(repeats);
    if first > LONG_SECONDS {
        samples.push(first);
    }
    while samples.len() < repeats {
        samples.push(timed(runs(first), &mut work)?);
    }
    Ok(Spread::of(samples))
}

/// Runs of a sample of work that took `first` seconds.
fn runs(first: f64) -> usize {
    (SAMPLE_SECONDS / first).ceil().clamp(1.0, 1e6) as usize
}

/// Mean seconds of a run out of `runs`.
fn timed(runs: usize, work: &mut impl FnMut() -> Result<()>) -> Result<f64> {
    let began = Instant::now();
    for _ in 0..runs {
        work()?;
    }
    Ok((began.elapsed().as_secs_f64() / runs as f64).max(1e-9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_work_runs_often_and_faults_end_it() {
        assert_eq!([1e-9, 1e-3, 0.05, 0.1, 7.0].map(runs), [1_000_000, 100, 2, 1, 1]);
        // The first run may have been held up, but took no longer than until the second one began.
        let (began, mut first, mut done) = (Instant::now(), 0.0, 0);
        let spread = sample(3, || {
            if done == 1 {
                first = began.elapsed().as_secs_f64();
            }
            done += 1;
            Ok(())
        });
        let spread = spread.unwrap();
        assert!(spread.samples.len() == 3 && done >= 3 * runs(first), "{done} runs, {spread:?}");
        assert!(sample(3, || anyhow::bail!("no")).is_err());
    }
}
