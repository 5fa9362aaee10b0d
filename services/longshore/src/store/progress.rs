//! Progress of long commands on stderr: a bar at a terminal, else a line now and then.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::ProgressBar;

use crate::console;

/// Time between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Progress of one command.
#[derive(Debug)]
pub(super) struct Progress {
    what: &'static str,
    bar: ProgressBar,
    said: Instant,
}

impl Progress {
    pub(super) fn new(what: &'static str) -> Self {
        Self { what, bar: console::point_bar(what, 0), said: Instant::now() }
    }

    /// So many of `total` are done; `message` says of what, and what else there is to say.
    pub(super) fn set(&mut self, done: u64, total: u64, message: &str) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        self.bar.set_message(message.to_owned());
        if !std::io::stderr().is_terminal() && self.said.elapsed() >= LINE_EVERY {
            self.said = Instant::now();
            console::note(format!("{}: {done} of {total} {message}", self.what));
        }
    }

    /// Takes the bar away.
    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
    }
}
