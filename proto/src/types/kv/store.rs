//! Checked conversions of what a shard is asked about blocks and views.

use bytes::Bytes;
use longshore_blocks::BlockKey;

use super::{
    GetBlocks, Lookup, OpenView, OpenedView, PutAck, PutOutcome, RepairStats, ScrubStats, ShardStats,
    TierStats, TileMessage, TileOrder,
};
use crate::{
    WireError,
    types::{check, operations::ScrubFinding},
    v1,
};

/// Leases that a view may have, milliseconds.
const LEASE_MS: std::ops::RangeInclusive<u32> = 1_000..=600_000;

impl TryFrom<v1::LookupRequest> for Lookup {
    type Error = WireError;

    fn try_from(wire: v1::LookupRequest) -> Result<Self, WireError> {
        Ok(Self {
            identity: check::required(wire.identity, "identity")?,
            keys: check::keys(&wire.keys, "keys")?,
            peek: wire.peek,
        })
    }
}

impl From<Lookup> for v1::LookupRequest {
    fn from(lookup: Lookup) -> Self {
        let keys = check::join_keys(lookup.keys.iter());
        Self { identity: Some(lookup.identity.into()), keys, peek: lookup.peek }
    }
}

impl From<Vec<bool>> for v1::LookupResponse {
    fn from(present: Vec<bool>) -> Self {
        let pack = |bits: &[bool]| bits.iter().rev().fold(0u8, |byte, bit| byte << 1 | u8::from(*bit));
        Self { present: present.chunks(8).map(pack).collect::<Vec<u8>>().into() }
    }
}

impl v1::LookupResponse {
    /// One bool for each of the `asked` keys; refuses an answer to another number of keys.
    pub fn into_present(self, asked: usize) -> Result<Vec<bool>, WireError> {
        if self.present.len() != asked.div_ceil(8) {
            let problem =
                format!("has {} bytes, must have {} for {asked} keys", self.present.len(), asked.div_ceil(8));
            return Err(WireError::invalid("present", problem));
        }
        Ok((0..asked).map(|index| self.present[index / 8] >> (index % 8) & 1 == 1).collect())
    }
}

impl TryFrom<v1::PutBlocksResponse> for PutAck {
    type Error = WireError;

    fn try_from(wire: v1::PutBlocksResponse) -> Result<Self, WireError> {
        let outcome = match v1::PutOutcome::try_from(wire.outcome) {
            Ok(v1::PutOutcome::Stored) => PutOutcome::Stored,
            Ok(v1::PutOutcome::Duplicate) => PutOutcome::Duplicate,
            Ok(v1::PutOutcome::Corrupt) => PutOutcome::Corrupt,
            Ok(v1::PutOutcome::NoSpace) => PutOutcome::NoSpace,
            Ok(v1::PutOutcome::Unspecified) => return Err(WireError::invalid("outcome", "is not set")),
            Err(_) => {
                let problem = format!("is {}, which is no known outcome", wire.outcome);
                return Err(WireError::invalid("outcome", problem));
            }
        };
        Ok(Self { key: BlockKey(check::exact(&wire.key, "key")?), outcome, message: wire.message })
    }
}

impl From<PutAck> for v1::PutBlocksResponse {
    fn from(ack: PutAck) -> Self {
        let outcome = match ack.outcome {
            PutOutcome::Stored => v1::PutOutcome::Stored,
            PutOutcome::Duplicate => v1::PutOutcome::Duplicate,
            PutOutcome::Corrupt => v1::PutOutcome::Corrupt,
            PutOutcome::NoSpace => v1::PutOutcome::NoSpace,
        };
        Self { key: Bytes::copy_from_slice(&ack.key.0), outcome: outcome.into(), message: ack.message }
    }
}

impl TryFrom<v1::GetBlocksRequest> for GetBlocks {
    type Error = WireError;

    fn try_from(wire: v1::GetBlocksRequest) -> Result<Self, WireError> {
        let order = match v1::TileOrder::try_from(wire.order) {
            Ok(v1::TileOrder::Unspecified | v1::TileOrder::Blocks) => TileOrder::Blocks,
            Ok(v1::TileOrder::Layers) => TileOrder::Layers,
            Err(_) => {
                let problem = format!("is {}, which is no known order", wire.order);
                return Err(WireError::invalid("order", problem));
            }
        };
        Ok(Self {
            identity: check::required(wire.identity, "identity")?,
            keys: check::keys(&wire.keys, "keys")?,
            first_layer: wire.first_layer,
            layers: (wire.layers != 0).then_some(wire.layers),
            order,
        })
    }
}

impl From<GetBlocks> for v1::GetBlocksRequest {
    fn from(get: GetBlocks) -> Self {
        let order = match get.order {
            TileOrder::Blocks => v1::TileOrder::Blocks,
            TileOrder::Layers => v1::TileOrder::Layers,
        };
        Self {
            order: order.into(),
            identity: Some(get.identity.into()),
            keys: check::join_keys(get.keys.iter()),
            first_layer: get.first_layer,
            layers: get.layers.unwrap_or(0),
            connection: None,
            first_head: 0,
            heads: 0,
            nccl: None,
        }
    }
}

impl TryFrom<v1::GetBlocksResponse> for Option<TileMessage> {
    type Error = WireError;

    fn try_from(wire: v1::GetBlocksResponse) -> Result<Self, WireError> {
        if wire.missing { Ok(None) } else { check::required(wire.tile, "tile").map(Some) }
    }
}

impl From<Option<TileMessage>> for v1::GetBlocksResponse {
    fn from(tile: Option<TileMessage>) -> Self {
        Self { missing: tile.is_none(), tile: tile.map(Into::into) }
    }
}

impl TryFrom<v1::OpenViewRequest> for OpenView {
    type Error = WireError;

    fn try_from(wire: v1::OpenViewRequest) -> Result<Self, WireError> {
        let identity = check::required(wire.identity, "identity")?;
        let keys = check::keys(&wire.keys, "keys")?;
        let indices = wire.block_indices;
        if indices.len() != keys.len() {
            let problem = format!("has {} entries for {} keys", indices.len(), keys.len());
            return Err(WireError::invalid("block_indices", problem));
        }
        if !indices.is_sorted_by(|a, b| a < b) {
            return Err(WireError::invalid("block_indices", "must ascend without repeats"));
        }
        if !LEASE_MS.contains(&wire.lease_ms) {
            let problem =
                format!("is {}, must be from {} to {}", wire.lease_ms, LEASE_MS.start(), LEASE_MS.end());
            return Err(WireError::invalid("lease_ms", problem));
        }
        let append_to = (wire.append_to_view_id != 0).then_some(wire.append_to_view_id);
        Ok(Self {
            identity,
            blocks: indices.into_iter().zip(keys).collect(),
            append_to,
            lease_ms: wire.lease_ms,
        })
    }
}

impl From<OpenView> for v1::OpenViewRequest {
    fn from(open: OpenView) -> Self {
        Self {
            identity: Some(open.identity.into()),
            keys: check::join_keys(open.blocks.iter().map(|(_, key)| key)),
            block_indices: open.blocks.iter().map(|(index, _)| *index).collect(),
            append_to_view_id: open.append_to.unwrap_or(0),
            lease_ms: open.lease_ms,
        }
    }
}

impl TryFrom<v1::OpenViewResponse> for OpenedView {
    type Error = WireError;

    fn try_from(wire: v1::OpenViewResponse) -> Result<Self, WireError> {
        let missing = check::keys(&wire.missing_keys, "missing_keys")?;
        match (wire.view_id, missing.is_empty()) {
            (0, false) => Ok(Self::Missing(missing)),
            (0, true) => Err(WireError::invalid("view_id", "is 0 although no block is missing")),
            (view_id, true) => Ok(Self::Open { view_id }),
            (_, false) => Err(WireError::invalid("view_id", "is set although blocks are missing")),
        }
    }
}

impl From<OpenedView> for v1::OpenViewResponse {
    fn from(opened: OpenedView) -> Self {
        match opened {
            OpenedView::Open { view_id } => Self { view_id, missing_keys: Bytes::new() },
            OpenedView::Missing(keys) => Self { view_id: 0, missing_keys: check::join_keys(keys.iter()) },
        }
    }
}

impl From<v1::StatsResponse> for ShardStats {
    fn from(wire: v1::StatsResponse) -> Self {
        Self {
            shard_id: wire.shard_id,
            capacity_bytes: wire.capacity_bytes,
            used_bytes: wire.used_bytes,
            blocks: wire.blocks,
            pinned_blocks: wire.pinned_blocks,
            open_blocks: wire.open_blocks,
            views: wire.views,
            stored_total: wire.stored_total,
            evicted_total: wire.evicted_total,
            corrupt_total: wire.corrupt_total,
            hits_total: wire.hits_total,
            misses_total: wire.misses_total,
            attend_total: wire.attend_total,
            tiers: wire.tiers.into_iter().map(Into::into).collect(),
            scrub: wire.scrub.map(Into::into).unwrap_or_default(),
            incarnation: wire.incarnation,
            shard_map_epoch: wire.shard_map_epoch,
            repair: RepairStats {
                unchecked_blocks: wire.repair_unchecked_blocks,
                backlog_blocks: wire.repair_backlog_blocks,
                sent_total: wire.repair_sent_total,
                sent_bytes_total: wire.repair_sent_bytes_total,
                failed_total: wire.repair_failed_total,
                dropped_total: wire.repair_dropped_total,
                passes_total: wire.repair_passes_total,
                peers_down: wire.peers_down,
            },
            room_bytes: wire.room_bytes,
            summary_bytes: wire.summary_bytes,
            uptime_ms: wire.uptime_ms,
            writers: wire.writers,
            condemned_blocks: wire.condemned_blocks,
            closed_views: wire.closed_views,
            waiting_turns: wire.waiting_turns,
            departures: wire.departures.map(Into::into).unwrap_or_default(),
            lanes: wire.lanes.into_iter().map(Into::into).collect(),
            copies: wire.copies.map(Into::into).unwrap_or_default(),
            drain: wire.drain.map(Into::into).unwrap_or_default(),
            scrub_findings: wire.scrub_findings.into_iter().filter_map(ScrubFinding::from_wire).collect(),
            tenants: wire.tenants.map(Into::into).unwrap_or_default(),
        }
    }
}

impl From<ShardStats> for v1::StatsResponse {
    fn from(stats: ShardStats) -> Self {
        Self {
            shard_id: stats.shard_id,
            capacity_bytes: stats.capacity_bytes,
            used_bytes: stats.used_bytes,
            blocks: stats.blocks,
            pinned_blocks: stats.pinned_blocks,
            open_blocks: stats.open_blocks,
            views: stats.views,
            stored_total: stats.stored_total,
            evicted_total: stats.evicted_total,
            corrupt_total: stats.corrupt_total,
            hits_total: stats.hits_total,
            misses_total: stats.misses_total,
            attend_total: stats.attend_total,
            tiers: stats.tiers.into_iter().map(Into::into).collect(),
            scrub: Some(stats.scrub.into()),
            incarnation: stats.incarnation,
            shard_map_epoch: stats.shard_map_epoch,
            repair_unchecked_blocks: stats.repair.unchecked_blocks,
            repair_backlog_blocks: stats.repair.backlog_blocks,
            repair_sent_total: stats.repair.sent_total,
            repair_sent_bytes_total: stats.repair.sent_bytes_total,
            repair_failed_total: stats.repair.failed_total,
            repair_dropped_total: stats.repair.dropped_total,
            repair_passes_total: stats.repair.passes_total,
            peers_down: stats.repair.peers_down,
            room_bytes: stats.room_bytes,
            summary_bytes: stats.summary_bytes,
            uptime_ms: stats.uptime_ms,
            writers: stats.writers,
            condemned_blocks: stats.condemned_blocks,
            closed_views: stats.closed_views,
            waiting_turns: stats.waiting_turns,
            departures: Some(stats.departures.into()),
            lanes: stats.lanes.into_iter().map(Into::into).collect(),
            copies: Some(stats.copies.into()),
            drain: Some(stats.drain.into()),
            scrub_findings: stats.scrub_findings.into_iter().map(Into::into).collect(),
            tenants: Some(stats.tenants.into()),
        }
    }
}

impl From<v1::TierStats> for TierStats {
    fn from(wire: v1::TierStats) -> Self {
        Self {
            name: wire.name,
            capacity_bytes: wire.capacity_bytes,
            used_bytes: wire.used_bytes,
            blocks: wire.blocks,
            copies: wire.copies,
            leaving_blocks: wire.leaving_blocks,
            rising_blocks: wire.rising_blocks,
            hits_total: wire.hits_total,
            evicted_total: wire.evicted_total,
            spilled_total: wire.spilled_total,
            promoted_total: wire.promoted_total,
            restored_total: wire.restored_total,
            io_errors_total: wire.io_errors_total,
            slow_total: wire.slow_total,
            refused_total: wire.refused_total,
            skipped_total: wire.skipped_total,
        }
    }
}

impl From<TierStats> for v1::TierStats {
    fn from(stats: TierStats) -> Self {
        Self {
            name: stats.name,
            capacity_bytes: stats.capacity_bytes,
            used_bytes: stats.used_bytes,
            blocks: stats.blocks,
            copies: stats.copies,
            leaving_blocks: stats.leaving_blocks,
            rising_blocks: stats.rising_blocks,
            hits_total: stats.hits_total,
            evicted_total: stats.evicted_total,
            spilled_total: stats.spilled_total,
            promoted_total: stats.promoted_total,
            restored_total: stats.restored_total,
            io_errors_total: stats.io_errors_total,
            slow_total: stats.slow_total,
            refused_total: stats.refused_total,
            skipped_total: stats.skipped_total,
        }
    }
}

impl From<v1::ScrubStats> for ScrubStats {
    fn from(wire: v1::ScrubStats) -> Self {
        Self {
            done_blocks: wire.done_blocks,
            round_blocks: wire.round_blocks,
            rounds_total: wire.rounds_total,
            checked_total: wire.checked_total,
            bad_total: wire.bad_total,
        }
    }
}

impl From<ScrubStats> for v1::ScrubStats {
    fn from(stats: ScrubStats) -> Self {
        Self {
            done_blocks: stats.done_blocks,
            round_blocks: stats.round_blocks,
            rounds_total: stats.rounds_total,
            checked_total: stats.checked_total,
            bad_total: stats.bad_total,
        }
    }
}
