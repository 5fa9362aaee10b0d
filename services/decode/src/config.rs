//! Settings of a decode worker.

use std::time::Duration;

use longshore_chassis::{
    Fault, Validate,
    config::{check_range, join},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of a decode worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Sequences that generate at the same time.
    pub max_sequences: usize,
    /// Sequences that may wait for a place.
    pub queue_max: usize,
    /// Tokens of one sequence that may be unread before it pauses.
    pub event_buffer: usize,
    /// How long a reader may leave a full buffer unread.
    pub stall_timeout_ms: u64,
    /// Full blocks of one sequence that may wait here for their shards.
    pub local_blocks_max: usize,
    /// How long opening a sequence's views may take.
    pub open_timeout_ms: u64,
    /// How long storing one block may take.
    pub put_timeout_ms: u64,
    /// How long handing stored blocks over to a view may take; the worker's other sequences wait meanwhile.
    pub append_timeout_ms: u64,
    /// Lease of views on shards.
    pub lease_ms: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_sequences: 16,
            queue_max: 64,
            event_buffer: 64,
            stall_timeout_ms: 60_000,
            local_blocks_max: 16,
            open_timeout_ms: 60_000,
            put_timeout_ms: 30_000,
            append_timeout_ms: 5_000,
            lease_ms: 120_000,
        }
    }
}

impl Config {
    /// How long a reader may leave a full buffer unread.
    pub(crate) fn stall_timeout(&self) -> Duration {
        Duration::from_millis(self.stall_timeout_ms)
    }

    /// How long opening a sequence's views may take.
    pub(crate) fn open_timeout(&self) -> Duration {
        Duration::from_millis(self.open_timeout_ms)
    }

    /// How long storing one block may take.
    pub(crate) fn put_timeout(&self) -> Duration {
        Duration::from_millis(self.put_timeout_ms)
    }

    /// How long views may be left unasked: a third of their lease, which leaves room for what fails or takes long.
    pub(crate) fn keep_after(&self) -> Duration {
        Duration::from_millis(u64::from(self.lease_ms) / 3)
    }

    /// How long handing blocks over to a view may take.
    pub(crate) fn append_timeout(&self) -> Duration {
        Duration::from_millis(self.append_timeout_ms)
    }
}

impl Validate for Config {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        check_range(faults, path, "max_sequences", self.max_sequences, 1..=4_096);
        check_range(faults, path, "queue_max", self.queue_max, 0..=65_536);
        check_range(faults, path, "event_buffer", self.event_buffer, 1..=65_536);
        check_range(faults, path, "stall_timeout_ms", self.stall_timeout_ms, 1..=600_000);
        check_range(faults, path, "local_blocks_max", self.local_blocks_max, 1..=65_536);
        check_range(faults, path, "open_timeout_ms", self.open_timeout_ms, 1..=600_000);
        check_range(faults, path, "put_timeout_ms", self.put_timeout_ms, 1..=600_000);
        check_range(faults, path, "append_timeout_ms", self.append_timeout_ms, 1..=60_000);
        check_range(faults, path, "lease_ms", self.lease_ms, 1_000..=600_000);
        if self.stall_timeout_ms >= u64::from(self.lease_ms) {
            let problem = format!("is {}, not less than `lease_ms`", self.stall_timeout_ms);
            faults.push(Fault { key: join(path, "stall_timeout_ms"), problem });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_every_bad_value_is_named_at_once() {
        let mut faults = Vec::new();
        Config::default().faults("decode", &mut faults);
        assert_eq!(faults, []);

        let bad = Config { max_sequences: 0, put_timeout_ms: 0, lease_ms: 2_000, ..Config::default() };
        bad.faults("decode", &mut faults);
        let keys: Vec<&str> = faults.iter().map(|fault| fault.key.as_str()).collect();
        assert_eq!(keys, ["decode.max_sequences", "decode.put_timeout_ms", "decode.stall_timeout_ms"]);
    }
}
