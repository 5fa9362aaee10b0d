//! Processor time of processes, as Linux counts it.

use std::fs;

/// Ticks of `/proc/PID/stat` in a second, on every Linux of today.
const TICKS_PER_SECOND: f64 = 100.0;

/// Seconds of processor time that a process used so far, in user and kernel mode; 0 where the system does not tell.
pub(super) fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    ticks(&stat).map_or(0.0, |ticks| ticks as f64 / TICKS_PER_SECOND)
}

/// Fields 14 and 15, counted from the process id; the second one is a name in parentheses that may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_times_whatever_the_name_is() {
        let stat = "12 (a) b c) R 1 12 12 0 -1 4194304 90 0 0 0 7 5 0 0 20 0 1 0 100 0 0";
        assert_eq!(ticks(stat), Some(12));
        assert_eq!(ticks(""), None);
        // On a busy machine a tick of work may take long to get.
        let begun = std::time::Instant::now();
        while cpu_seconds(std::process::id()) <= 0.0 {
            assert!(begun.elapsed().as_secs() < 60, "no time is counted");
        }
    }
}
