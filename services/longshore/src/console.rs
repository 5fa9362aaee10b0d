//! What the program tells a person: results on stdout, progress and notes on stderr. The only module that prints.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "printing is this module's purpose")]

use std::{
    io::{ErrorKind, IsTerminal, Result, Write},
    sync::OnceLock,
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Why results did not reach who asked for them, the first time.
static LOST: OnceLock<std::io::Error> = OnceLock::new();

/// A line of results.
pub(crate) fn say(line: impl AsRef<str>) {
    keep(writeln!(std::io::stdout(), "{}", line.as_ref()));
}

/// A piece of streamed results, shown at once.
pub(crate) fn piece(text: &str) {
    let mut out = std::io::stdout();
    keep(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
}

fn keep(written: Result<()>) {
    // A reader that went away (`| head`) wants no more of it; that is no fault of ours.
    if let Err(error) = written
        && error.kind() != ErrorKind::BrokenPipe
    {
        let _ = LOST.set(error);
    }
}

/// Whether all results were written, to who still wanted them.
pub(crate) fn written() -> anyhow::Result<()> {
    match LOST.get() {
        None => Ok(()),
        Some(error) => {
            Err(anyhow::anyhow!("results cannot be written: {error}; hint: what was written is not whole"))
        }
    }
}

/// A note beside the results.
pub(crate) fn note(line: impl AsRef<str>) {
    tell(line.as_ref());
}

/// An error with its causes, and a remedy where the text carries one.
pub(crate) fn fail(error: &anyhow::Error) {
    tell(&format!("longshore: {}", text(error)));
}

/// Nobody may read it, or it goes to a full disk: whoever serves goes on, and ends as it should.
fn tell(line: &str) {
    let _unheard = writeln!(std::io::stderr(), "{line}");
}

/// An error with its causes. Those whose text the one above them repeats are left out: many of ours do, so that they read well alone.
pub(crate) fn text(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    let mut last = text.clone();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !last.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        last = cause;
    }
    text
}

/// A bar over bytes on stderr; silent when stderr is no terminal.
pub(crate) fn byte_bar(what: &str, total: u64) -> ProgressBar {
    bar(what, total, "{prefix} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} ETA {eta}")
}

/// A bar over tokens on stderr; silent when stderr is no terminal.
pub(crate) fn token_bar(what: &str, total: u64) -> ProgressBar {
    bar(what, total, "{prefix} [{bar:30}] {human_pos}/{human_len} tokens {per_sec} ETA {eta}")
}

/// A bar over points of a measurement on stderr, each with what it is; silent when stderr is no terminal.
pub(crate) fn point_bar(what: &str, total: u64) -> ProgressBar {
    bar(what, total, "{prefix} [{bar:30}] {pos}/{len} {elapsed} {msg}")
}

fn bar(what: &str, total: u64, template: &str) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr_with_hz(10)
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(total), target);
    let style = ProgressStyle::with_template(template).expect("the templates above are valid");
    bar.set_style(style.progress_chars("=> "));
    bar.set_prefix(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// `1234567` as `1,234,567`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let head = digits.len() % 3;
    let mut out = digits[..head].to_owned();
    for chunk in digits.as_bytes()[head..].chunks(3) {
        if !out.is_empty() {
            out.push(',');
        }
        out.push_str(std::str::from_utf8(chunk).expect("digits are ASCII"));
    }
    out
}

/// Two digits for each byte.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes with a binary unit, three digits.
pub(crate) fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Says what its cause says.
    #[derive(Debug, thiserror::Error)]
    #[error("cannot open: {0}, hint: look")]
    struct Repeats(#[source] std::io::Error);

    #[test]
    fn causes_are_told_once() {
        let system = || std::io::Error::from_raw_os_error(2);
        let plain = anyhow::Error::new(system()).context("cannot read `x`");
        assert_eq!(text(&plain), "cannot read `x`: No such file or directory (os error 2)");
        let repeated = anyhow::Error::new(Repeats(system())).context("while starting");
        assert_eq!(
            text(&repeated),
            "while starting: cannot open: No such file or directory (os error 2), hint: look"
        );
        assert_eq!(text(&anyhow::anyhow!("alone")), "alone");
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1000), "1,000");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(23_040), "22.5 KiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
    }
}
