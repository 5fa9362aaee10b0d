//! Streams of inventory events: resumed where a watcher left off, begun anew where that is gone.

use std::{sync::Arc, time::Duration};

use longshore_blocks::{BlockKey, pool::Resource};
use longshore_chassis::Tasks;
use longshore_fabric::{BoxStream, CallContext};
use longshore_proto::types::{InventoryChange, InventoryNews, WatchInventory};

use super::News;
use crate::{
    Error, lifetime,
    lifetime::{Kind, Outlet, Place, Taken},
    store::Store,
};

/// Events of one message.
const EVENTS_MAX: usize = 4_096;
const KIND: Kind =
    Kind { task: "kvstore-inventory", stream: "watch", stalling: "no event was taken", unread: 2 };
/// Longest time between two messages: the digest comes at least this often.
const DIGEST_EVERY: Duration = Duration::from_secs(5);

/// Starts a watch.
pub(crate) fn start(
    store: &Arc<Store>,
    tasks: &Tasks,
    ctx: &CallContext,
    watch: WatchInventory,
) -> Result<BoxStream<InventoryNews>, Error> {
    store.check_identity(&watch.identity)?;
    let place = Place::take(store, watch.identity.namespace, Resource::Watchers)?;
    Ok(lifetime::run((store, tasks, ctx), KIND, move |store, news| async move {
        let _place = place;
        follow(&store, &watch, &news).await
    }))
}

/// Tells events until the watcher is gone.
async fn follow(store: &Store, watch: &WatchInventory, told: &Outlet<InventoryNews>) -> Result<(), Error> {
    let (incarnation, mut changes) =
        store.with_inventory(|_, inventory, _| (inventory.incarnation(), inventory.changes()));
    let mut after = watch.after.filter(|(theirs, _)| *theirs == incarnation).map(|(_, after)| after);
    loop {
        changes.mark_unchanged();
        let messages = next(store, watch, after);
        let Some(last) = messages.last() else { return Ok(()) };
        after = Some(last.told);
        let more = messages.len() == 1 && messages[0].events.len() == EVENTS_MAX;
        for message in messages {
            if told.send(store, message).await? == Taken::Gone {
                return Ok(());
            }
        }
        if !more {
            // The inventory lives as long as the store. Without news the digest goes out at its time.
            let _digest_is_due = tokio::time::timeout(DIGEST_EVERY, changes.changed()).await;
        }
    }
}

/// What comes after event `after`, at least one message; all blocks when that is not known.
fn next(store: &Store, watch: &WatchInventory, after: Option<u64>) -> Vec<InventoryNews> {
    let namespace = watch.identity.namespace;
    store.with_inventory(|pool, inventory, _| {
        let tenant = inventory.tenant(namespace);
        let message = |reset, events, told| InventoryNews {
            incarnation: inventory.incarnation(),
            reset,
            events,
            told,
            blocks: tenant.blocks,
            digest: tenant.digest,
        };
        if let Some(after) = after
            && let News::Events(events, told) = inventory.news(namespace, after, EVENTS_MAX)
        {
            return vec![message(false, events, told)];
        }
        let keys = pool.keys(namespace);
        let stored = |key: &BlockKey| (0, *key, InventoryChange::Stored);
        let mut messages: Vec<InventoryNews> = keys
            .chunks(EVENTS_MAX)
            .map(|keys| message(false, keys.iter().map(stored).collect(), inventory.sequence()))
            .collect();
        if messages.is_empty() {
            messages.push(message(false, Vec::new(), inventory.sequence()));
        }
        messages[0].reset = true;
        messages
    })
}
