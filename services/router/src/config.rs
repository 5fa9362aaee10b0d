//! Settings of the front door.

use std::time::Duration;

use longshore_chassis::{Fault, Validate, config};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::DEFAULT_PREFILL_POLICY;

/// Settings of a router.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Requests that run at the same time.
    pub requests_max: u32,
    /// Requests that wait for a place; more are refused.
    pub queue_max: u32,
    /// How long a request waits for a place, in milliseconds.
    pub queue_wait_ms: u64,
    /// What a refused client is told to wait, in milliseconds.
    pub retry_after_ms: u64,
    /// Deadline of requests that bring none, in milliseconds; 0 means none.
    pub request_timeout_ms: u64,
    /// Longest pause between two pieces of a prompt, in milliseconds.
    pub prompt_idle_ms: u64,
    /// Longest time that a client may leave its answer unread, in milliseconds.
    pub client_stall_ms: u64,
    /// Limit of one batched lookup on a shard, in milliseconds; a shard that takes longer counts as a miss.
    pub lookup_timeout_ms: u64,
    /// Limit of describing a worker before it is used, in milliseconds.
    pub handshake_timeout_ms: u64,
    /// Prefill policy of requests that name none, for example `exact` or `balanced`. Different defaults make no different
    /// deployments: only blocks of different policies are kept apart.
    pub prefill_policy: String,
    /// Namespaces (a tenant under a prefill policy) whose blocks are followed by the shards' inventories, so that shards are asked only for
    /// what they may hold; 0 turns that off. Those that were used least lately make way.
    pub index_namespaces_max: u32,
    /// Blocks of all these namespaces, counted once for each shard that holds them; about 16 bytes each.
    pub index_blocks_max: u64,
    /// Copies of each block in the store, as all processes of the cluster are told. No setting of the router's: whoever starts it says
    /// it.
    #[serde(skip)]
    pub copies: u32,
    /// How often a request may be begun again after a worker failed; a block of new tokens restarts the count.
    pub retries_max: u32,
    /// Pause before the first retry, in milliseconds; it doubles with every further one.
    pub retry_backoff_ms: u64,
    /// How long running requests may go on after the router was asked to stop, in milliseconds.
    pub drain_ms: u64,
    /// OpenAI HTTP.
    pub http: HttpConfig,
}

/// Settings of the OpenAI HTTP listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    /// Largest request body, in bytes.
    pub body_max_bytes: u64,
    /// Bytes of request bodies that may be in memory at the same time.
    pub bodies_max_bytes: u64,
    /// Longest pause between two pieces of a request body, in milliseconds.
    pub body_idle_ms: u64,
    /// Longest time for a request's headers, in milliseconds.
    pub header_timeout_ms: u64,
    /// Pause after which a silent stream gets a keep-alive comment, in milliseconds.
    pub keep_alive_ms: u64,
    /// Connections at the same time; further ones wait in the listener's backlog.
    pub connections_max: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            requests_max: 256,
            queue_max: 1024,
            queue_wait_ms: 30_000,
            retry_after_ms: 1_000,
            request_timeout_ms: 0,
            prompt_idle_ms: 30_000,
            client_stall_ms: 60_000,
            lookup_timeout_ms: 2_000,
            handshake_timeout_ms: 3_000,
            prefill_policy: DEFAULT_PREFILL_POLICY.to_owned(),
            index_namespaces_max: 16,
            index_blocks_max: 1 << 20,
            copies: 1,
            retries_max: 3,
            retry_backoff_ms: 50,
            drain_ms: 15_000,
            http: HttpConfig::default(),
        }
    }
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            body_max_bytes: 16 << 20,
            bodies_max_bytes: 512 << 20,
            body_idle_ms: 10_000,
            header_timeout_ms: 10_000,
            keep_alive_ms: 5_000,
            connections_max: 4_096,
        }
    }
}

impl Config {
    /// What a refused client is told to wait.
    pub fn retry_after(&self) -> Duration {
        Duration::from_millis(self.retry_after_ms)
    }

    /// Deadline of requests that bring none.
    pub fn request_timeout(&self) -> Option<Duration> {
        (self.request_timeout_ms > 0).then(|| Duration::from_millis(self.request_timeout_ms))
    }
}

impl Validate for Config {
    /// Ranges. What `prefill_policy` means depends on the deployment's head plan, so [`Policies`](crate::Policies) checks it.
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        let hour = 3_600_000;
        let mut check =
            |key, value: u64, low, high| config::check_range(faults, path, key, value, low..=high);
        check("requests_max", self.requests_max.into(), 1, 65_536);
        check("queue_max", self.queue_max.into(), 0, 1 << 20);
        check("queue_wait_ms", self.queue_wait_ms, 1, hour);
        check("retry_after_ms", self.retry_after_ms, 1, hour);
        check("request_timeout_ms", self.request_timeout_ms, 0, 24 * hour);
        check("prompt_idle_ms", self.prompt_idle_ms, 1, hour);
        check("client_stall_ms", self.client_stall_ms, 1, hour);
        check("lookup_timeout_ms", self.lookup_timeout_ms, 1, hour);
        check("handshake_timeout_ms", self.handshake_timeout_ms, 1, hour);
        check("index_namespaces_max", self.index_namespaces_max.into(), 0, 4_096);
        check("index_blocks_max", self.index_blocks_max, 1, 1 << 32);
        check("copies", self.copies.into(), 1, 8);
        check("retries_max", self.retries_max.into(), 1, 100);
        check("retry_backoff_ms", self.retry_backoff_ms, 0, 60_000);
        check("drain_ms", self.drain_ms, 0, hour);
        self.http.faults(&config::join(path, "http"), faults);
    }
}

impl Validate for HttpConfig {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        let hour = 3_600_000;
        let mut check =
            |key, value: u64, low, high| config::check_range(faults, path, key, value, low..=high);
        check("body_max_bytes", self.body_max_bytes, 1_024, 1 << 30);
        check("bodies_max_bytes", self.bodies_max_bytes, self.body_max_bytes, 1 << 40);
        check("body_idle_ms", self.body_idle_ms, 1, hour);
        check("header_timeout_ms", self.header_timeout_ms, 1, hour);
        check("keep_alive_ms", self.keep_alive_ms, 1, hour);
        check("connections_max", self.connections_max.into(), 1, 1 << 20);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_have_no_faults() {
        let mut faults = Vec::new();
        Config::default().faults("router", &mut faults);
        assert!(faults.is_empty(), "{faults:?}");
    }

    #[test]
    fn tells_all_faults_at_once() {
        let mut config = Config { requests_max: 0, retries_max: 101, ..Config::default() };
        config.http.bodies_max_bytes = 1;
        let mut faults = Vec::new();
        config.faults("router", &mut faults);
        let keys: Vec<&str> = faults.iter().map(|fault| fault.key.as_str()).collect();
        assert_eq!(keys, ["router.requests_max", "router.retries_max", "router.http.bodies_max_bytes"]);
    }

    #[test]
    fn refuses_unknown_keys() {
        let error = serde_json::from_str::<Config>(r#"{"request_max": 3}"#).unwrap_err();
        assert!(error.to_string().contains("request_max"), "{error}");
    }
}
