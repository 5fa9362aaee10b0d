//! Settings of a prefill worker.

use std::time::Duration;

use longshore_chassis::{
    Fault, Validate,
    config::{check_range, join},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a cached prefix that lies on shards is attended to. The bits are the same either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PrefixPolicy {
    /// Whatever moves fewer bytes.
    #[default]
    Auto,
    /// Ship queries, get partials back.
    Ship,
    /// Fetch the tiles.
    Fetch,
}

/// Settings of a prefill worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Prompt tokens that go through the layers together.
    pub chunk_tokens: u32,
    /// Prompts computed at the same time, each on its own engine thread.
    pub concurrency: usize,
    /// Prompts that may wait for an engine thread.
    pub queue_max: usize,
    /// Tiles that one prompt may keep in this process; older blocks are read from their shards.
    pub local_kv_bytes: u64,
    /// Tiles that may wait for one shard.
    pub put_buffer_bytes: u64,
    /// Lease of views on shards.
    pub lease_ms: u32,
    /// Longest time that a shard may take to open a prefix, take a tile or acknowledge the next block.
    pub shard_timeout_ms: u64,
    /// Layers between two progress events.
    pub progress_layers: usize,
    /// Progress events that may be unread; further ones are dropped.
    pub event_buffer: usize,
    /// How a cached prefix is attended to.
    pub prefix: PrefixPolicy,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            chunk_tokens: 512,
            concurrency: 1,
            queue_max: 32,
            local_kv_bytes: 1 << 30,
            put_buffer_bytes: 8 << 20,
            lease_ms: 120_000,
            shard_timeout_ms: 60_000,
            progress_layers: 8,
            event_buffer: 64,
            prefix: PrefixPolicy::Auto,
        }
    }
}

impl Config {
    /// Longest time that a shard may show no progress.
    pub(crate) fn shard_timeout(&self) -> Duration {
        Duration::from_millis(self.shard_timeout_ms)
    }

    /// How long views may be left unasked, as policies may leave a shard out: a third of their lease.
    pub(crate) fn keep_after(&self) -> Duration {
        Duration::from_millis(u64::from(self.lease_ms) / 3)
    }
}

impl Validate for Config {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        check_range(faults, path, "chunk_tokens", self.chunk_tokens, 16..=65_536);
        check_range(faults, path, "concurrency", self.concurrency, 1..=64);
        check_range(faults, path, "queue_max", self.queue_max, 0..=65_536);
        check_range(faults, path, "local_kv_bytes", self.local_kv_bytes, 1 << 20..=1 << 44);
        check_range(faults, path, "put_buffer_bytes", self.put_buffer_bytes, 1 << 10..=1 << 34);
        check_range(faults, path, "lease_ms", self.lease_ms, 1_000..=600_000);
        check_range(faults, path, "shard_timeout_ms", self.shard_timeout_ms, 1..=3_600_000);
        check_range(faults, path, "progress_layers", self.progress_layers, 1..=1_024);
        check_range(faults, path, "event_buffer", self.event_buffer, 1..=65_536);
        if self.put_buffer_bytes > self.local_kv_bytes {
            let problem = format!("is {}, more than `local_kv_bytes`", self.put_buffer_bytes);
            faults.push(Fault { key: join(path, "put_buffer_bytes"), problem });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_every_bad_value_is_named_at_once() {
        let mut faults = Vec::new();
        Config::default().faults("prefill", &mut faults);
        assert_eq!(faults, []);

        let bad = Config { chunk_tokens: 1, lease_ms: 5, put_buffer_bytes: 1 << 33, ..Config::default() };
        bad.faults("prefill", &mut faults);
        let keys: Vec<&str> = faults.iter().map(|fault| fault.key.as_str()).collect();
        assert_eq!(keys, ["prefill.chunk_tokens", "prefill.lease_ms", "prefill.put_buffer_bytes"]);
    }
}
