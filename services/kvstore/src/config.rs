//! Settings of a shard.

use std::path::PathBuf;

use longshore_blocks::{AdmissionRule, ShardId, pool::Eviction};
use longshore_chassis::{
    Fault, Validate,
    config::{check_range, join},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How long a stop waits for writes that began before its time was over.
const LAST_WRITES_MS: u64 = 1_000;

/// Settings of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Bytes of memory that tiles, those of incomplete blocks included, and summaries may occupy.
    pub capacity_bytes: u64,
    /// How long a block is kept from eviction after it was stored or reported as held: the time that a worker has to open
    /// its view.
    pub retention_ms: u64,
    /// Which block goes first when room is needed: `reuse`, `lru`, `lru-2`, `lfu`, `s3-fifo` or `fifo`.
    pub eviction: String,
    /// Time between two searches for views whose lease ended.
    pub reap_interval_ms: u64,
    /// Put streams at a time.
    pub writers_max: usize,
    /// Get streams and streams of summaries at a time, and as many of inventory events.
    pub readers_max: usize,
    /// What one tenant alone may take of views, streams, incomplete blocks, and blocks that nothing may evict, per cent; the more tenants
    /// take all that they may, the less each gets. 100: whoever comes first takes all.
    pub tenant_percent: u32,
    /// How long a put stream with incomplete blocks may bring nothing that is missing, and any other stream take nothing that is there
    /// for it, before it is ended. After twice as long the connection of whoever does not even read that is closed.
    pub stall_ms: u64,
    /// Open views at a time.
    pub views_max: usize,
    /// Attention queries computed at the same time, over all streams.
    pub attend_concurrency: usize,
    /// Attention queries under way in one stream; further ones wait in the stream.
    pub attend_stream_concurrency: usize,
    /// Largest query: bytes of the rows of all its items.
    pub attend_query_bytes_max: usize,
    /// Size at which an answer is cut into messages.
    pub attend_message_bytes: usize,
    /// Bytes a second that the scrubber reads and checks, over all tiers; 0 turns it off.
    pub scrub_bytes_per_s: u64,
    /// Least time from the begin of one round of the scrubber to the begin of the next.
    pub scrub_interval_ms: u64,
    /// The tier below memory.
    pub disk: DiskConfig,
    /// Keeping up the copies of blocks.
    pub repair: RepairConfig,
}

/// The disk tier of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DiskConfig {
    /// Folder below which every shard makes one of its own; empty: no disk tier.
    pub path: String,
    /// Bytes that blocks may occupy there, for each shard.
    pub capacity_bytes: u64,
    /// Which blocks that nothing keeps are worth a write: `all`, `second-touch` or `frequency`.
    pub admission: String,
    /// Blocks that are written at a time, and as many read into memory.
    pub writes_max: usize,
    /// How long a put waits for others' writes before blocks are dropped instead.
    pub write_wait_ms: u64,
    /// How long nothing is written after a write failed or took too long.
    pub pause_ms: u64,
    /// Threads that read tiles for attention, and as many that read blocks for gets.
    pub readers: usize,
    /// How long attention waits for tiles.
    pub read_timeout_ms: u64,
    /// How long a clean stop writes blocks that are in memory alone; 0: they are lost.
    pub save_ms: u64,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            path: String::new(),
            capacity_bytes: 32 << 30,
            admission: AdmissionRule::All.name().to_owned(),
            writes_max: 4,
            write_wait_ms: 2_000,
            pause_ms: 5_000,
            readers: 4,
            read_timeout_ms: 10_000,
            save_ms: 10_000,
        }
    }
}

impl DiskConfig {
    /// Whether there is a disk tier.
    pub fn is_on(&self) -> bool {
        !self.path.is_empty()
    }

    /// How long a stop takes at most, milliseconds: [`Self::save_ms`], and for writes that began before they were over a second more; 0
    /// when nothing is saved.
    pub fn stop_ms(&self) -> u64 {
        match self.is_on() && self.save_ms > 0 {
            true => self.save_ms.saturating_add(LAST_WRITES_MS),
            false => 0,
        }
    }

    /// The folder of one shard. Characters that a file name may not have are spelled out, so that no id leads elsewhere.
    pub(crate) fn folder(&self, shard: &ShardId) -> PathBuf {
        let mut name = String::from("shard-");
        for byte in shard.0.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => name.push(char::from(byte)),
                other => name.push_str(&format!("%{other:02x}")),
            }
        }
        PathBuf::from(&self.path).join(name)
    }

    /// Size of a new segment file: large enough for few files, small enough to be read at once.
    pub(crate) fn segment_bytes(&self) -> u64 {
        (self.capacity_bytes / 1024).next_power_of_two().clamp(256 << 20, 64 << 30)
    }
}

impl Validate for DiskConfig {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        check_range(faults, path, "capacity_bytes", self.capacity_bytes, 1 << 20..=1 << 50);
        check_range(faults, path, "writes_max", self.writes_max, 1..=256);
        check_range(faults, path, "write_wait_ms", self.write_wait_ms, 0..=600_000);
        check_range(faults, path, "pause_ms", self.pause_ms, 1..=3_600_000);
        check_range(faults, path, "readers", self.readers, 1..=256);
        check_range(faults, path, "read_timeout_ms", self.read_timeout_ms, 1..=600_000);
        check_range(faults, path, "save_ms", self.save_ms, 0..=3_600_000);
        if let Err(longshore_blocks::Error::Invalid { problem, .. }) = self.admission.parse::<AdmissionRule>()
        {
            faults.push(Fault::new(path, "admission", problem));
        }
    }
}

/// How a shard keeps up the copies of its blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RepairConfig {
    /// Time between two looks at whether the other shards live.
    pub ping_interval_ms: u64,
    /// Time without an answer after which another shard counts as down and its copies are made anew.
    pub down_after_ms: u64,
    /// Time between two searches for missing copies while nothing happens to any shard.
    pub scan_interval_ms: u64,
    /// Pause before blocks that could not be dealt with are looked at again.
    pub retry_ms: u64,
    /// Bytes per second that copies to other shards may take.
    pub bytes_per_second: u64,
    /// Least age of a drain when the search begins that finds everything moved: what other shards were told before the drain
    /// has had its effects by then. More than the six seconds for which they believe an answer.
    pub drain_settle_ms: u64,
}

impl Default for RepairConfig {
    fn default() -> Self {
        Self {
            ping_interval_ms: 500,
            down_after_ms: 10_000,
            scan_interval_ms: 60_000,
            retry_ms: 2_000,
            bytes_per_second: 64 << 20,
            drain_settle_ms: 8_000,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            capacity_bytes: 2 << 30,
            retention_ms: 10_000,
            eviction: Eviction::default().name().to_owned(),
            reap_interval_ms: 500,
            writers_max: 1_024,
            readers_max: 1_024,
            tenant_percent: 75,
            stall_ms: 120_000,
            views_max: 65_536,
            attend_concurrency: 16,
            attend_stream_concurrency: 8,
            attend_query_bytes_max: 4 << 20,
            attend_message_bytes: 1 << 20,
            scrub_bytes_per_s: 16 << 20,
            scrub_interval_ms: 60_000,
            disk: DiskConfig::default(),
            repair: RepairConfig::default(),
        }
    }
}

impl Validate for Config {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        check_range(faults, path, "capacity_bytes", self.capacity_bytes, 1 << 20..=1 << 50);
        check_range(faults, path, "retention_ms", self.retention_ms, 0..=3_600_000);
        if let Err(longshore_blocks::Error::Invalid { problem, .. }) = self.eviction.parse::<Eviction>() {
            faults.push(Fault::new(path, "eviction", problem));
        }
        check_range(faults, path, "reap_interval_ms", self.reap_interval_ms, 10..=60_000);
        check_range(faults, path, "writers_max", self.writers_max, 1..=65_536);
        check_range(faults, path, "readers_max", self.readers_max, 1..=65_536);
        check_range(faults, path, "tenant_percent", self.tenant_percent, 1..=100);
        check_range(faults, path, "stall_ms", self.stall_ms, 100..=3_600_000);
        check_range(faults, path, "views_max", self.views_max, 1..=1 << 24);
        check_range(faults, path, "attend_concurrency", self.attend_concurrency, 1..=4_096);
        check_range(faults, path, "attend_stream_concurrency", self.attend_stream_concurrency, 1..=1_024);
        check_range(faults, path, "attend_query_bytes_max", self.attend_query_bytes_max, 1 << 10..=14 << 20);
        check_range(faults, path, "attend_message_bytes", self.attend_message_bytes, 1 << 10..=8 << 20);
        check_range(faults, path, "scrub_bytes_per_s", self.scrub_bytes_per_s, 0..=1 << 40);
        check_range(faults, path, "scrub_interval_ms", self.scrub_interval_ms, 10..=86_400_000);
        self.disk.faults(&join(path, "disk"), faults);
        self.repair.faults(&join(path, "repair"), faults);
    }
}

impl Validate for RepairConfig {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        check_range(faults, path, "ping_interval_ms", self.ping_interval_ms, 10..=60_000);
        check_range(faults, path, "down_after_ms", self.down_after_ms, self.ping_interval_ms..=3_600_000);
        check_range(faults, path, "scan_interval_ms", self.scan_interval_ms, 100..=86_400_000);
        check_range(faults, path, "retry_ms", self.retry_ms, 10..=3_600_000);
        check_range(faults, path, "bytes_per_second", self.bytes_per_second, 1 << 10..=1 << 40);
        check_range(faults, path, "drain_settle_ms", self.drain_settle_ms, 6_500..=600_000);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_every_bad_value_is_named_at_once() {
        let mut faults = Vec::new();
        Config::default().faults("kvstore", &mut faults);
        assert_eq!(faults, []);

        let bad = Config {
            capacity_bytes: 5,
            eviction: "mru".to_owned(),
            tenant_percent: 0,
            views_max: 0,
            attend_query_bytes_max: 1 << 30,
            disk: DiskConfig {
                capacity_bytes: 7,
                readers: 0,
                admission: "some".to_owned(),
                ..DiskConfig::default()
            },
            ..Config::default()
        };
        bad.faults("kvstore", &mut faults);
        let keys: Vec<&str> = faults.iter().map(|fault| fault.key.as_str()).collect();
        let named = [
            "capacity_bytes",
            "eviction",
            "tenant_percent",
            "views_max",
            "attend_query_bytes_max",
            "disk.capacity_bytes",
            "disk.readers",
            "disk.admission",
        ];
        assert_eq!(keys, named.map(|field| format!("kvstore.{field}")));
        let names = "is `mru`, must be one of `reuse`, `lru`, `lru-2`, `lfu`, `s3-fifo`, `fifo`";
        assert_eq!(faults[1].problem, names);
    }

    #[test]
    fn no_shard_id_leads_out_of_the_folder() {
        let config = DiskConfig { path: "/data".to_owned(), ..DiskConfig::default() };
        let folder = |id: &str| config.folder(&ShardId(id.to_owned())).display().to_string();
        assert_eq!(folder("kv-0"), "/data/shard-kv-0");
        assert_eq!(folder("../x"), "/data/shard-%2e%2e%2fx");
        assert_eq!(folder("%2e"), "/data/shard-%252e");
    }
}
