//! Tiles by the lane over which they came and went.

use longshore_chassis::Metrics;
use longshore_fabric::Lane;
use longshore_proto::types::LaneStats;
use prometheus_client::metrics::{counter::Counter, family::Family};

type ByLane = Family<[(&'static str, &'static str); 1], Counter>;

/// Counters by lane; clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct LaneCounters {
    received_bytes: ByLane,
    sent_bytes: ByLane,
    puts: ByLane,
    gets: ByLane,
}

impl LaneCounters {
    pub(crate) fn register(metrics: &Metrics) -> Self {
        let own = Self::default();
        let all = [
            ("lane_received_bytes", "Bytes of tiles that came, by lane", &own.received_bytes),
            ("lane_sent_bytes", "Bytes of tiles that were read, by lane", &own.sent_bytes),
            ("lane_puts", "Put streams, by lane", &own.puts),
            ("lane_gets", "Get streams, by lane", &own.gets),
        ];
        for (name, help, family) in all {
            metrics.register(name, help, family.clone());
        }
        own
    }

    /// A put stream began.
    pub(crate) fn put(&self, lane: Lane) {
        self.puts.get_or_create(&label(lane)).inc();
    }

    /// A get stream began.
    pub(crate) fn get(&self, lane: Lane) {
        self.gets.get_or_create(&label(lane)).inc();
    }

    /// Tiles came.
    pub(crate) fn received(&self, lane: Lane, bytes: u64) {
        self.received_bytes.get_or_create(&label(lane)).inc_by(bytes);
    }

    /// Tiles go out.
    pub(crate) fn sent(&self, lane: Lane, bytes: u64) {
        self.sent_bytes.get_or_create(&label(lane)).inc_by(bytes);
    }

    /// All lanes, as `Stats` tells them.
    pub(crate) fn stats(&self) -> Vec<LaneStats> {
        let of = |lane: Lane| {
            let value = |family: &ByLane| family.get_or_create(&label(lane)).get();
            LaneStats {
                name: lane.name().to_owned(),
                received_bytes_total: value(&self.received_bytes),
                sent_bytes_total: value(&self.sent_bytes),
                puts_total: value(&self.puts),
                gets_total: value(&self.gets),
            }
        };
        Lane::ALL.map(of).to_vec()
    }
}

fn label(lane: Lane) -> [(&'static str, &'static str); 1] {
    [("lane", lane.name())]
}
