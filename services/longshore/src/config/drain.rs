//! How long the end of a process may take, and what must fit into it.

use longshore_chassis::{Fault, Validate, config::check_range};
use longshore_kvstore::DiskConfig;
use serde::{Deserialize, Serialize};

/// End of the process.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct DrainConfig {
    /// Milliseconds that streams get to finish after the first Ctrl-C or SIGTERM.
    pub(crate) deadline_ms: u64,
}

impl Default for DrainConfig {
    fn default() -> Self {
        Self { deadline_ms: 20_000 }
    }
}

impl Validate for DrainConfig {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        check_range(faults, path, "deadline_ms", self.deadline_ms, 0..=3_600_000);
    }
}

impl DrainConfig {
    /// A shard that may save for longer than its process ends would be cut off in the middle, whatever it was promised.
    pub(super) fn save_faults(&self, disk: &DiskConfig, path: &str, faults: &mut Vec<Fault>) {
        if disk.is_on() && disk.save_ms > self.deadline_ms {
            let problem = format!(
                "is {}, but the process ends after `drain.deadline_ms`, which is {}, with blocks that are not saved yet; hint: raise \
                 `drain.deadline_ms`, or lower `kvstore.disk.save_ms` (0: save nothing)",
                disk.save_ms, self.deadline_ms
            );
            faults.push(Fault::new(path, "save_ms", problem));
        }
    }
}

#[cfg(test)]
mod tests {
    use longshore_chassis::Validate;

    use crate::config::Config;

    fn faults(path: &str, save_ms: u64, deadline_ms: u64) -> Vec<longshore_chassis::Fault> {
        let mut config = Config::default();
        config.kvstore.disk.path = path.to_owned();
        config.kvstore.disk.save_ms = save_ms;
        config.drain.deadline_ms = deadline_ms;
        let mut faults = Vec::new();
        config.faults("", &mut faults);
        faults
    }

    #[test]
    fn a_save_that_lasts_longer_than_the_process_is_refused() {
        let found = faults("/data", 20_001, 20_000);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].key, "kvstore.disk.save_ms");
        for named in ["20001", "`drain.deadline_ms`", "20000", "`kvstore.disk.save_ms`"] {
            assert!(found[0].problem.contains(named), "{named} in {found:?}");
        }
        assert_eq!(faults("/data", 1, 0).len(), 1);
    }

    #[test]
    fn a_save_that_fits_and_one_that_never_happens_are_not() {
        for (path, save_ms, deadline_ms) in [("/data", 20_000, 20_000), ("/data", 0, 0), ("", 10_000, 0)] {
            assert_eq!(faults(path, save_ms, deadline_ms), Vec::new(), "`{path}`, {save_ms}, {deadline_ms}");
        }
    }
}
