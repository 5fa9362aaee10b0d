//! SIGINT and SIGTERM, and the way from the first of them to the end of the process.

#[cfg(test)]
mod tests;

use std::{fmt, time::Duration};

use tokio::signal::unix::{self, SignalKind};

use crate::{Error, Tasks};

/// A request to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Ctrl-C.
    Interrupt,
    /// From the supervisor.
    Terminate,
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Interrupt => "SIGINT",
            Self::Terminate => "SIGTERM",
        })
    }
}

/// Handlers of both signals. From its installation on they no longer kill the process.
#[derive(Debug)]
pub struct Signals {
    interrupt: unix::Signal,
    terminate: unix::Signal,
}

impl Signals {
    /// Installs the handlers; needs a runtime.
    pub fn install() -> Result<Self, Error> {
        let listen = |kind| unix::signal(kind).map_err(|cause| Error::Signals { cause });
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    /// The next signal. Never resolves when the runtime can no longer deliver any.
    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            Some(()) = self.interrupt.recv() => Signal::Interrupt,
            Some(()) = self.terminate.recv() => Signal::Terminate,
            else => std::future::pending().await,
        }
    }
}

/// How a process came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// The signal that asked for it; `None` when a task did.
    pub signal: Option<Signal>,
    /// The critical task that failed, when one did.
    pub failure: Option<String>,
    /// Tasks that did not end in time, or that still ran when a second signal came.
    pub late: Vec<String>,
    /// A second signal cut the drain short.
    pub forced: bool,
}

impl Ended {
    /// Whether everything ended as it should.
    pub fn clean(&self) -> bool {
        self.failure.is_none() && self.late.is_empty() && !self.forced
    }
}

/// Waits for a signal or for `tasks` to be cancelled (a critical task failed, or somebody asked), then drains within
/// `deadline`. A second signal ends the drain at once.
pub async fn until_drained(tasks: &Tasks, signals: &mut Signals, deadline: Duration) -> Ended {
    let signal = tokio::select! {
        signal = signals.next() => Some(signal),
        () = tasks.cancelled() => None,
    };
    let cause = signal.map_or_else(|| "a task asked for it".to_owned(), |signal| signal.to_string());
    tracing::info!(%cause, deadline_ms = deadline.as_millis() as u64, "draining, a second signal ends at once");
    let (late, forced) = tokio::select! {
        late = tasks.drain(deadline) => (late, false),
        second = signals.next() => {
            tracing::warn!(signal = %second, "ending at once");
            (tasks.running(), true)
        }
    };
    Ended { signal, failure: tasks.failure(), late, forced }
}
