//! Checked conversions of a shard's inventory events.

use bytes::Bytes;
use longshore_blocks::BlockKey;

use super::{InventoryChange, InventoryNews, WatchInventory};
use crate::{WireError, types::check, v1};

impl TryFrom<v1::WatchInventoryRequest> for WatchInventory {
    type Error = WireError;

    fn try_from(wire: v1::WatchInventoryRequest) -> Result<Self, WireError> {
        Ok(Self {
            identity: check::required(wire.identity, "identity")?,
            after: (wire.incarnation != 0).then_some((wire.incarnation, wire.after)),
        })
    }
}

impl From<WatchInventory> for v1::WatchInventoryRequest {
    fn from(watch: WatchInventory) -> Self {
        let (incarnation, after) = watch.after.unwrap_or_default();
        Self { identity: Some(watch.identity.into()), incarnation, after }
    }
}

impl TryFrom<v1::WatchInventoryResponse> for InventoryNews {
    type Error = WireError;

    fn try_from(wire: v1::WatchInventoryResponse) -> Result<Self, WireError> {
        check::at_most(wire.events.len(), check::KEYS_MAX, "entries", "events")?;
        let event = |(index, event): (usize, v1::InventoryEvent)| {
            let field = |name: &str| format!("events[{index}].{name}");
            let change = match v1::InventoryChange::try_from(event.change) {
                Ok(v1::InventoryChange::Stored) => InventoryChange::Stored,
                Ok(v1::InventoryChange::Evicted) => InventoryChange::Evicted,
                Ok(v1::InventoryChange::Condemned) => InventoryChange::Condemned,
                Ok(v1::InventoryChange::Moved) => InventoryChange::Moved,
                Ok(v1::InventoryChange::Unspecified) | Err(_) => {
                    let problem = format!("is {}, which is no known change", event.change);
                    return Err(WireError::invalid(field("change"), problem));
                }
            };
            Ok((event.sequence, BlockKey(check::exact(&event.key, &field("key"))?), change))
        };
        let events: Vec<_> = wire.events.into_iter().enumerate().map(event).collect::<Result<_, _>>()?;
        if !events.is_sorted_by_key(|event| event.0) {
            return Err(WireError::invalid("events", "must ascend by `sequence`"));
        }
        let (incarnation, reset) = (wire.incarnation, wire.reset);
        Ok(Self { incarnation, reset, events, told: wire.told, blocks: wire.blocks, digest: wire.digest })
    }
}

impl From<InventoryNews> for v1::WatchInventoryResponse {
    fn from(news: InventoryNews) -> Self {
        let event = |(sequence, key, change): (u64, BlockKey, InventoryChange)| {
            let change = match change {
                InventoryChange::Stored => v1::InventoryChange::Stored,
                InventoryChange::Evicted => v1::InventoryChange::Evicted,
                InventoryChange::Condemned => v1::InventoryChange::Condemned,
                InventoryChange::Moved => v1::InventoryChange::Moved,
            };
            v1::InventoryEvent { sequence, key: Bytes::copy_from_slice(&key.0), change: change.into() }
        };
        Self {
            incarnation: news.incarnation,
            reset: news.reset,
            events: news.events.into_iter().map(event).collect(),
            told: news.told,
            blocks: news.blocks,
            digest: news.digest,
        }
    }
}
