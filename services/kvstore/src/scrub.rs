//! The scrubber: reads every block in the background, at a bounded rate, and drops those whose bytes changed, so that damage is
//! found before somebody needs the block.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use longshore_attention::Tile;
use longshore_blocks::{
    BlockKey,
    pool::{Generation, Payload, SealedBlock},
    tier::Tier,
};
use longshore_chassis::Tasks;
use longshore_proto::types::{ScrubFinding, ScrubStarted};
use tokio::{sync::Notify, time::Instant};

use crate::{get::is_sound, store::Store};

/// Damaged blocks that are told after they were dropped.
const FINDINGS_MAX: usize = 64;
/// Bytes a second of a round that somebody asked for, where the shard's own scrubber is off.
const ASKED_BYTES_PER_S: u64 = 16 << 20;

/// What operators ask of the scrubber, and what it found.
#[derive(Debug, Default)]
pub(crate) struct ScrubOrders {
    state: Mutex<Orders>,
    asked: Notify,
}

#[derive(Debug, Default)]
struct Orders {
    /// Rate of the round that somebody asked for, until it is done.
    wanted: Option<u64>,
    finished: u64,
    findings: VecDeque<ScrubFinding>,
}

impl ScrubOrders {
    /// Asks for a round; one that was asked for before and is not done is the same one.
    fn ask(&self, bytes_per_second: u64) -> ScrubStarted {
        let mut state = self.lock();
        let bytes_per_second = *state.wanted.get_or_insert(bytes_per_second);
        self.asked.notify_one();
        ScrubStarted { round: state.finished + 1, bytes_per_second }
    }

    /// Damaged blocks that were found last, the newest last.
    pub(crate) fn findings(&self) -> Vec<ScrubFinding> {
        self.lock().findings.iter().cloned().collect()
    }

    fn wanted(&self) -> Option<u64> {
        self.lock().wanted
    }

    /// Ends a round; whether it counts. A usual one does not when another was asked for meanwhile, which has its number.
    fn finish(&self, asked: bool) -> bool {
        let mut state = self.lock();
        if !asked && state.wanted.is_some() {
            return false;
        }
        state.finished += 1;
        if asked {
            state.wanted = None;
        }
        true
    }

    fn note(&self, key: BlockKey, tier: Tier) {
        let mut state = self.lock();
        if state.findings.len() == FINDINGS_MAX {
            state.findings.pop_front();
        }
        state.findings.push_back(ScrubFinding { key, tier: tier.name().to_owned() });
    }

    fn lock(&self) -> MutexGuard<'_, Orders> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks for a round at once, at the given rate or the usual one.
pub(crate) fn ask(store: &Store, bytes_per_second: Option<u64>) -> ScrubStarted {
    let usual = match store.config().scrub_bytes_per_s {
        0 => ASKED_BYTES_PER_S,
        rate => rate,
    };
    store.scrub.ask(bytes_per_second.unwrap_or(usual).max(1))
}

/// Starts the scrubber; it runs until `tasks` is cancelled or the shard is gone.
pub(crate) fn start(store: &Arc<Store>, tasks: &Tasks) {
    let (weak, orders, scope) = (Arc::downgrade(store), Arc::clone(&store.scrub), tasks.clone());
    let (interval, rate) =
        (Duration::from_millis(store.config().scrub_interval_ms), store.config().scrub_bytes_per_s);
    tasks.spawn("kvstore-scrubber", async move {
        tokio::select! {
            () = scrub(&weak, &orders, interval, rate) => {}
            () = scope.cancelled() => {}
        }
    });
}

/// Rounds at the usual rate, one each `interval` at most and none when it is 0, and those that are asked for.
async fn scrub(weak: &Weak<Store>, orders: &ScrubOrders, interval: Duration, usual: u64) {
    let mut next = Instant::now() + interval;
    loop {
        if orders.wanted().is_none() {
            let due = async {
                match usual {
                    0 => std::future::pending().await,
                    _ => tokio::time::sleep_until(next).await,
                }
            };
            tokio::select! {
                () = due => {}
                () = orders.asked.notified() => {}
            }
        }
        let asked = orders.wanted();
        if asked.is_none() && (usual == 0 || Instant::now() < next) {
            continue;
        }
        if asked.is_none() {
            next = Instant::now() + interval;
        }
        if !round(weak, orders, asked, usual).await {
            return;
        }
    }
}

/// One round over the blocks that are held now; the usual one makes way for one that is asked for. False when the shard is gone.
async fn round(weak: &Weak<Store>, orders: &ScrubOrders, asked: Option<u64>, usual: u64) -> bool {
    let Some(blocks) = weak.upgrade().map(|store| store.with_pool(|pool, _| pool.generations())) else {
        return false;
    };
    let (total, rate) = (blocks.len(), asked.unwrap_or(usual) as f64);
    for (done, generation) in blocks.into_iter().enumerate() {
        if asked.is_none() && orders.wanted().is_some() {
            return true;
        }
        let Some(store) = weak.upgrade() else { return false };
        store.metrics.scrub_progress(done, total);
        let started = Instant::now();
        let bytes = check(&store, generation).await;
        drop(store);
        tokio::time::sleep_until(started + Duration::from_secs_f64(bytes as f64 / rate)).await;
    }
    let Some(store) = weak.upgrade() else { return false };
    store.metrics.scrub_progress(total, total);
    if orders.finish(asked.is_some()) {
        store.metrics.scrub_rounds.inc();
    }
    true
}

/// Checks one block where it lies; returns the bytes that were read.
async fn check(store: &Arc<Store>, generation: Generation) -> u64 {
    let Some(block) = store.with_pool(|pool, _| pool.block(generation)) else { return 0 };
    let (key, layers, worker) = (block.key(), 0..store.identity().layers, store.clone());
    let checked = store.off_reactor(move || worker.check_block(&block, layers)).await;
    // A panic was logged, and is no verdict on the block.
    let Ok((tier, sound)) = checked else { return 0 };
    store.metrics.scrubbed(tier, sound);
    if !sound {
        store.scrub.note(key, tier);
    }
    store.identity().tile_shape.bytes() as u64 * u64::from(store.identity().layers)
}

impl Store {
    /// Reads a block where it lies, checks it, and drops it when it is damaged.
    pub(crate) fn check_block(&self, block: &SealedBlock<Arc<Tile>>, mut layers: Range<u32>) -> (Tier, bool) {
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
