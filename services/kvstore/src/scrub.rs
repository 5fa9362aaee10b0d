//! The scrubber: reads every block in the background, at a bounded rate, and drops those whose bytes changed, so that damage is
//! found before somebody needs the block.

use std::{
    ops::Range,
    sync::{Arc, Weak},
    time::Duration,
};

use longshore_attention::Tile;
use longshore_blocks::{
    pool::{Generation, Payload, SealedBlock},
    tier::Tier,
};
use longshore_chassis::Tasks;
use tokio::time::Instant;

use crate::{get::is_sound, store::Store};

/// Starts the scrubber; it runs until `tasks` is cancelled or the shard is gone.
pub(crate) fn start(store: &Arc<Store>, tasks: &Tasks) {
    if store.config().scrub_bytes_per_s == 0 {
        return;
    }
    let (weak, scope) = (Arc::downgrade(store), tasks.clone());
    tasks.spawn("kvstore-scrubber", async move {
        tokio::select! {
            () = scrub(weak) => {}
            () = scope.cancelled() => {}
        }
    });
}

async fn scrub(weak: Weak<Store>) {
    let Some(interval) = weak.upgrade().map(|store| Duration::from_millis(store.config().scrub_interval_ms))
    else {
        return;
    };
    let mut next = Instant::now() + interval;
    loop {
        tokio::time::sleep_until(next).await;
        next = Instant::now() + interval;
        let Some(blocks) = weak.upgrade().map(|store| store.with_pool(|pool, _| pool.generations())) else {
            return;
        };
        let total = blocks.len();
        for (done, generation) in blocks.into_iter().enumerate() {
            let Some(store) = weak.upgrade() else { return };
            store.metrics.scrub_progress(done, total);
            let started = Instant::now();
            let bytes = check(&store, generation).await;
            let rate = store.config().scrub_bytes_per_s as f64;
            drop(store);
            tokio::time::sleep_until(started + Duration::from_secs_f64(bytes as f64 / rate)).await;
        }
        let Some(store) = weak.upgrade() else { return };
        store.metrics.scrub_progress(total, total);
        store.metrics.scrub_rounds.inc();
    }
}

/// Checks one block where it lies; returns the bytes that were read.
async fn check(store: &Arc<Store>, generation: Generation) -> u64 {
    let Some(block) = store.with_pool(|pool, _| pool.block(generation)) else { return 0 };
    let layers = 0..store.identity().layers;
    let worker = store.clone();
    let checked = store.off_reactor(move || worker.check_block(&block, layers)).await;
    // A panic was logged, and is no verdict on the block.
    let Ok((tier, sound)) = checked else { return 0 };
    store.metrics.scrubbed(tier, sound);
    store.identity().tile_shape.bytes() as u64 * u64::from(store.identity().layers)
}

impl Store {
    fn check_block(&self, block: &SealedBlock<Arc<Tile>>, mut layers: Range<u32>) -> (Tier, bool) {
        match block.payload() {
            Payload::Memory(pages) => {
                let sound = is_sound(&pages, layers);
                if !sound {
                    self.condemn(block);
                }
                (Tier::Dram, sound)
            }
            // Tile by tile: a block of a large model is not to be in memory twice.
            Payload::Disk(extent) => {
                let sound = layers.all(|at| self.read_layers(block, &extent, at..at + 1).is_ok());
                (Tier::Disk, sound)
            }
        }
    }
}
