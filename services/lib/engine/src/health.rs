//! What calls told of a shard: whether it is avoided for a while, and how long its answers take. Time is an argument.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// How long a shard is avoided after its first failure; twice as long after each further one.
const AVOIDED_FIRST: Duration = Duration::from_millis(500);
/// The longest time that a shard is avoided.
const AVOIDED_MAX: Duration = Duration::from_secs(10);
/// Answers whose times are remembered, per size of the question.
const TIMES_KEPT: usize = 64;
/// Answers before anything is made of their times.
const TIMES_NEEDED: usize = 16;
/// Sizes of questions that are told apart: powers of two of rows, or of blocks.
const SIZES: usize = 20;
/// An answer is slow when it takes this many times as long as nineteen of twenty did.
const SLOW_FACTOR: u32 = 4;
/// And never before this.
const SLOW_MIN: Duration = Duration::from_millis(50);

/// An attention query, by what its answer costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Question {
    /// So many rows, over all blocks of views.
    Rows(usize),
    /// Lists that visit so many blocks, one count per list.
    Visits(usize),
}

/// What is known of one shard in this process.
#[derive(Debug, Default)]
pub(crate) struct Health {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    failures: u32,
    avoided_until: Option<Instant>,
    /// By kind and size of the question.
    times: [[Times; SIZES]; 2],
}

impl State {
    fn times(&mut self, question: Question) -> &mut Times {
        let (kind, size) = match question {
            Question::Rows(rows) => (0, rows),
            Question::Visits(blocks) => (1, blocks),
        };
        &mut self.times[kind][(size.max(1).ilog2() as usize).min(SIZES - 1)]
    }
}

#[derive(Debug, Default)]
struct Times {
    kept: Vec<Duration>,
    next: usize,
}

impl Health {
    /// A call failed as it would if the shard were away.
    pub(crate) fn failed(&self, now: Instant) {
        self.avoid(now, Duration::ZERO);
    }

    /// A call was waited for as long as `waited`, in vain. Whoever asks next shall not wait for more of its time than not.
    pub(crate) fn late(&self, now: Instant, waited: Duration) {
        self.avoid(now, waited.min(AVOIDED_MAX));
    }

    fn avoid(&self, now: Instant, at_least: Duration) {
        let mut state = self.lock();
        // Failures of calls that were under way together count once.
        if state.avoided_until.is_none_or(|until| until <= now) {
            let pause = AVOIDED_FIRST.saturating_mul(1 << state.failures.min(16)).min(AVOIDED_MAX);
            state.failures += 1;
            state.avoided_until = Some(now + pause.max(at_least));
        }
    }

    /// A call was answered.
    pub(crate) fn answered(&self) {
        let mut state = self.lock();
        state.failures = 0;
        state.avoided_until = None;
    }

    /// Whether other shards are asked first.
    pub(crate) fn is_avoided(&self, now: Instant) -> bool {
        self.lock().avoided_until.is_some_and(|until| until > now)
    }

    /// A question was answered within `took`.
    pub(crate) fn took(&self, question: Question, took: Duration) {
        let mut state = self.lock();
        let times = state.times(question);
        if times.kept.len() < TIMES_KEPT {
            times.kept.push(took);
        } else {
            let next = times.next;
            times.kept[next] = took;
        }
        times.next = (times.next + 1) % TIMES_KEPT;
    }

    /// When the answer to a question is later than those to others of its size; `None` while too few came to say.
    pub(crate) fn late_after(&self, question: Question) -> Option<Duration> {
        let mut kept = self.lock().times(question).kept.clone();
        if kept.len() < TIMES_NEEDED {
            return None;
        }
        kept.sort_unstable();
        Some((kept[kept.len() * 19 / 20] * SLOW_FACTOR).max(SLOW_MIN))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many questions may be asked twice: one of `EVERY`, with a few saved up.
#[derive(Debug)]
pub(crate) struct SecondAsks {
    /// In parts of one second ask.
    saved: Mutex<u32>,
}

impl SecondAsks {
    /// One question of so many is asked twice at most.
    const EVERY: u32 = 20;
    const SAVED_MAX: u32 = 4 * Self::EVERY;

    /// A question was asked.
    pub(crate) fn asked(&self) {
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        *saved = (*saved + 1).min(Self::SAVED_MAX);
    }

    /// Whether one may be asked twice now; uses up what was saved for it.
    pub(crate) fn take(&self) -> bool {
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let enough = *saved >= Self::EVERY;
        if enough {
            *saved -= Self::EVERY;
        }
        enough
    }
}

impl Default for SecondAsks {
    fn default() -> Self {
        Self { saved: Mutex::new(Self::SAVED_MAX) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_shard_that_failed_is_avoided_longer_each_time() {
        let (health, start) = (Health::default(), Instant::now());
        assert!(!health.is_avoided(start));
        health.failed(start);
        health.failed(start);
        assert!(health.is_avoided(start + Duration::from_millis(499)));
        let later = start + Duration::from_millis(500);
        assert!(!health.is_avoided(later));
        health.failed(later);
        assert!(health.is_avoided(later + Duration::from_millis(999)));
        health.answered();
        assert!(!health.is_avoided(later));
        for _ in 0..40 {
            health.failed(later);
            health.lock().avoided_until = None;
        }
        health.failed(later);
        assert!(!health.is_avoided(later + AVOIDED_MAX));
    }

    #[tokio::test(start_paused = true)]
    async fn a_shard_that_was_waited_for_is_avoided_for_as_long() {
        let (health, start) = (Health::default(), Instant::now());
        health.late(start, Duration::from_secs(4));
        assert!(health.is_avoided(start + Duration::from_millis(3_999)));
        assert!(!health.is_avoided(start + Duration::from_secs(4)));
        health.answered();
        health.late(start, Duration::from_millis(1));
        assert!(health.is_avoided(start + AVOIDED_FIRST / 2), "never shorter than after a failure");
        health.answered();
        health.late(start, AVOIDED_MAX * 9);
        assert!(!health.is_avoided(start + AVOIDED_MAX));
    }

    #[test]
    fn lateness_follows_the_slowest_of_most_answers_of_the_same_kind_and_size() {
        use Question::{Rows, Visits};
        let health = Health::default();
        assert_eq!(health.late_after(Rows(1)), None);
        (1..=100).for_each(|ms| health.took(Rows(1), Duration::from_millis(ms)));
        assert_eq!(health.late_after(Rows(1)), Some(Duration::from_millis(97 * 4)), "of the last 64");
        assert_eq!(health.late_after(Rows(2)), None, "larger questions have times of their own");
        assert_eq!(health.late_after(Visits(1)), None, "so have those that visit single blocks");
        (0..100).for_each(|_| health.took(Rows(1), Duration::from_micros(10)));
        assert_eq!(health.late_after(Rows(1)), Some(SLOW_MIN));
        health.took(Visits(usize::MAX), Duration::ZERO);
    }

    #[test]
    fn few_questions_are_asked_twice() {
        let budget = SecondAsks::default();
        let mut twice = 0;
        for _ in 0..1_000 {
            budget.asked();
            twice += u32::from(budget.take());
        }
        assert!((50..=54).contains(&twice), "{twice}");
    }
}
