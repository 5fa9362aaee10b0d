//! Tiles by the lane over which they came and went, and what is under way on the listeners.

use std::sync::{Mutex, MutexGuard, PoisonError};

use longshore_chassis::Metrics;
use longshore_fabric::{Lane, TileTraffic};
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

/// The listeners that serve a shard.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    serving: Vec<TileTraffic>,
    /// What listeners refused and ended that are over.
    before: UnderWay,
}

/// Tiles on all listeners together.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UnderWay {
    /// Open tile connections.
    pub(crate) connections: u64,
    /// Bytes of tiles on them.
    pub(crate) bytes_in_flight: u64,
    /// Bytes that tiles on all lanes take of the listeners' budgets.
    pub(crate) budget_taken_bytes: u64,
    /// Streams that those had no room for, ever.
    pub(crate) refused_total: u64,
    /// gRPC connections that they closed because an answer was not read, ever.
    pub(crate) ended_unread_total: u64,
    /// Bytes of partials that they had exchanged over the lane `nccl`, ever.
    pub(crate) exchanged_partials_bytes_total: u64,
    /// Epochs of that lane that attend streams lost, ever.
    pub(crate) attend_epochs_lost_total: u64,
}

impl Listeners {
    /// One more serves the shard. Those that are over are kept no longer than until then.
    pub(crate) fn add(&self, traffic: TileTraffic) {
        let mut state = self.lock();
        let State { serving, before } = &mut *state;
        for over in serving.extract_if(.., |one| one.is_over()) {
            before.refused_total += over.refused_total();
            before.ended_unread_total += over.ended_unread_total();
            before.exchanged_partials_bytes_total += over.exchanged_partials_bytes_total();
            before.attend_epochs_lost_total += over.attend_epochs_lost_total();
        }
        serving.push(traffic);
    }

    /// None while there never was one.
    pub(crate) fn under_way(&self) -> Option<UnderWay> {
        let state = self.lock();
        let add = |sum: UnderWay, one: &TileTraffic| UnderWay {
            connections: sum.connections + one.connections(),
            bytes_in_flight: sum.bytes_in_flight + one.bytes_in_flight(),
            budget_taken_bytes: sum.budget_taken_bytes + one.budget_taken_bytes(),
            refused_total: sum.refused_total + one.refused_total(),
            ended_unread_total: sum.ended_unread_total + one.ended_unread_total(),
            exchanged_partials_bytes_total: sum.exchanged_partials_bytes_total
                + one.exchanged_partials_bytes_total(),
            attend_epochs_lost_total: sum.attend_epochs_lost_total + one.attend_epochs_lost_total(),
        };
        (!state.serving.is_empty()).then(|| state.serving.iter().fold(state.before, add))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
