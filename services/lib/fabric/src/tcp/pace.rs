//! How long a frame may take: its peer may pause, but what moves has to move at some rate, so that no frame lasts for ever.

use std::{future::Future, io};

use tokio::time::{Duration, Instant, timeout_at};

use super::{Fault, TcpPatience};

/// What is left of the time for one frame.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    pause: Duration,
    whole: Duration,
    end: Instant,
}

impl Pace {
    /// From now on: `pause` for each step, `whole` for all of them.
    pub(super) fn new(pause: Duration, whole: Duration) -> Self {
        Self { pause, whole, end: Instant::now() + whole }
    }

    /// For a frame with a body of so many bytes.
    pub(super) fn of_body(pause: Duration, bytes: usize, patience: &TcpPatience) -> Self {
        let micros = (bytes as u64).saturating_mul(1_000_000) / patience.bytes_per_second_min.max(1);
        Self::new(pause, pause + Duration::from_micros(micros))
    }

    /// What all steps together may take.
    pub(super) fn whole(&self) -> Duration {
        self.whole
    }

    /// Waits for a step. What is there already is never too late: that a peer is waited for is its fault, that this side was busy is not.
    pub(super) async fn step<T>(&self, step: impl Future<Output = io::Result<T>>) -> Result<T, Fault> {
        let late = Instant::now() + self.pause;
        match timeout_at(late.min(self.end), step).await {
            Ok(done) => Ok(done?),
            Err(_) if self.end < late => Err(Fault::Slow(self.whole)),
            Err(_) => Err(Fault::Late(self.pause)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_frame_may_take_a_pause_and_the_time_for_its_length() {
        let patience = TcpPatience { bytes_per_second_min: 1 << 20, ..TcpPatience::default() };
        let whole = |bytes| Pace::of_body(Duration::from_secs(10), bytes, &patience).whole;
        assert_eq!((whole(0), whole(16 << 20)), (Duration::from_secs(10), Duration::from_secs(26)));
        let none = TcpPatience { bytes_per_second_min: 0, ..patience };
        assert!(
            Pace::of_body(Duration::ZERO, usize::MAX, &none).whole > Duration::ZERO,
            "it does not overflow"
        );
    }

    #[tokio::test]
    async fn what_is_there_is_never_too_late() {
        let pace = Pace::new(Duration::ZERO, Duration::ZERO);
        assert_eq!(pace.step(async { Ok(7) }).await.unwrap(), 7);
        let late = pace.step(std::future::pending::<io::Result<()>>()).await.unwrap_err();
        assert!(matches!(late, Fault::Slow(_)), "{late:?}");
    }
}
