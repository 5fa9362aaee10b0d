//! Blocks on their way between memory and disk: whoever needs room writes the block that makes way, and waits no longer than
//! configured for others that do.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use longshore_attention::Tile;
use longshore_blocks::{
    AdmissionFilter, AdmissionRule, BlockKey, BlockPlace, Namespace,
    pool::{
        Admission, DiskConfig as PoolDisk, Eviction, Generation, Page, Promote, Promotion, SealedBlock,
        Spill, WriterId,
    },
    tier::Extent,
};
use longshore_chassis::Tasks;
use tokio::sync::mpsc;

use super::{
    DiskSeam, DiskTier, Reads, Record,
    format::Format,
    readers::{Reader, Readers, Wanted},
    restart::{Found, Setting},
};
use crate::{
    Config, Error, ShardIdentity,
    get::Places,
    store::{Pool, Store},
    turns::Turns,
};

/// Blocks that may wait to be read into memory; more are read from disk where they are needed.
const PROMOTIONS_MAX: usize = 16_384;

/// The disk of a shard.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(super) reader: Reader,
    pub(super) readers: Readers,
    pub(super) read_timeout: Duration,
    wait: Duration,
    /// Spills that ended, and who waits for the next one.
    ended: (Mutex<u64>, Condvar),
    promotions: mpsc::Sender<Generation>,
    /// Queries that may read at a time: fewer than all, so that a slow disk holds up nobody who does not need it.
    pub(crate) turns: Turns,
    /// Reads of get streams at a time.
    pub(crate) get_turns: Turns,
    /// Get streams that read ahead.
    pub(crate) ahead: Places,
}

/// What `open` makes.
pub(crate) struct Opened {
    pub(crate) disk: Disk,
    pub(crate) promotions: mpsc::Receiver<Generation>,
    pub(crate) pool: Pool,
    /// Where copies of the blocks that it found belong, the oldest first.
    pub(crate) placed: Vec<(Namespace, BlockKey, BlockPlace)>,
}

/// Opens the configured disk tier and puts it below `pool`. `seed` is nothing that clients know.
pub(crate) fn open(
    config: &Config,
    identity: &ShardIdentity,
    pool: Pool,
    seed: u64,
    seam: DiskSeam,
    tasks: &Tasks,
) -> Result<Opened, Error> {
    let started = Instant::now();
    let setting = Setting {
        folder: config.disk.folder(&identity.shard_id),
        capacity_bytes: config.disk.capacity_bytes,
        segment_bytes: config.disk.segment_bytes(),
    };
    let format = Format {
        deployment: identity.deployment,
        tile_bytes: identity.tile_shape.bytes() as u64,
        layers: identity.layers,
        places: 1,
    };
    let (tier, blocks, found) = DiskTier::open(&setting, format)?;
    let sizes = PoolDisk { blocks, moves_max: config.disk.writes_max, pause_ms: config.disk.pause_ms };
    // Configurations are checked before; one that was not is told here.
    let rule = config.disk.admission.parse::<AdmissionRule>()?;
    let filter = AdmissionFilter::new(rule, usize::try_from(blocks).unwrap_or(usize::MAX), seed);
    let mut pool = pool.with_disk(sizes, config.eviction.parse::<Eviction>()?.policy(), filter);
    let (restored, placed) = restore(&mut pool, &found);
    tracing::info!(
        shard = %identity.shard_id, folder = %setting.folder.display(), blocks, restored, placed = placed.len(),
        torn = found.torn, damaged_segments = found.damaged, block_bytes = tier.block_bytes(),
        seconds = started.elapsed().as_secs_f64(), "disk tier opened"
    );
    let (shape, layers) = (identity.tile_shape, identity.layers);
    let reader = Reader { tier: (seam.around)(tier), shape, layers };
    let (readers, gets_at_a_time) = match seam.reads {
        Reads::OnThreads => (Readers::start(&reader, config.disk.readers, tasks), config.disk.readers),
        Reads::ByWhoAsks => (Readers::none(), 1),
    };
    let (promotions, queue) = mpsc::channel(PROMOTIONS_MAX);
    let disk = Disk {
        readers,
        reader,
        read_timeout: Duration::from_millis(config.disk.read_timeout_ms),
        wait: Duration::from_millis(config.disk.write_wait_ms),
        ended: (Mutex::new(0), Condvar::new()),
        promotions,
        // A quarter; there may be fewer than four.
        turns: Turns::new((config.attend_concurrency / 4).max(1)),
        get_turns: Turns::new(gets_at_a_time),
        ahead: Places::default(),
    };
    Ok(Opened { disk, promotions: queue, pool, placed })
}

/// Takes the blocks in; tells how many were taken, and where those of them belong of which it is known.
fn restore(pool: &mut Pool, found: &Found) -> (usize, Vec<(Namespace, BlockKey, BlockPlace)>) {
    let (mut restored, mut placed) = (0, Vec::new());
    for entry in &found.entries {
        let checksums = entry.checksums.clone();
        if pool.restore(entry.namespace, entry.key, entry.generation, checksums, entry.place) {
            restored += 1;
            placed.extend(entry.belongs.map(|belongs| (entry.namespace, entry.key, belongs)));
        }
    }
    (restored, placed)
}

/// A spill under way: told to the pool as failed unless it is told as written.
struct Spilling<'a> {
    store: &'a Store,
    disk: &'a Disk,
    spill: Option<Spill<Arc<Tile>>>,
    written: bool,
}

impl Drop for Spilling<'_> {
    fn drop(&mut self) {
        if let Some(spill) = self.spill.take() {
            self.store.with_pool(|pool, now| pool.finish_spill(spill, self.written, now));
            *self.disk.ended.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
            self.disk.ended.1.notify_all();
        }
    }
}

/// A promotion under way: told to the pool as failed unless it is told with its tiles.
struct Promoting<'a> {
    store: &'a Store,
    promotion: Option<Promotion<Arc<Tile>>>,
    pages: Option<Vec<Page<Arc<Tile>>>>,
}

impl Drop for Promoting<'_> {
    fn drop(&mut self) {
        if let Some(promotion) = self.promotion.take() {
            let pages = self.pages.take().map(Into::into);
            self.store.with_pool(|pool, _| pool.finish_promotion(promotion, pages));
        }
    }
}

impl Store {
    /// Asks the pool for a tile's place and makes room for its block, on the calling thread, which may block.
    pub(crate) fn admit(
        &self,
        writer: WriterId,
        key: BlockKey,
        layer: u32,
    ) -> Result<Admission, longshore_blocks::Error> {
        let started = Instant::now();
        loop {
            let before = self.spills_ended();
            match self.with_pool(|pool, now| pool.admit(writer, key, layer, now))? {
                Admission::MakeRoom => {
                    if !self.make_room(before, started) {
                        tracing::warn!(shard = %self.identity().shard_id, "the disk tier does not keep up: blocks are dropped instead of written for a while");
                        self.with_pool(|pool, now| pool.pause_spills(now));
                    }
                }
                other => return Ok(other),
            }
        }
    }

    pub(crate) fn spills_ended(&self) -> u64 {
        self.disk().map_or(0, |disk| *disk.ended.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Writes one block out, or waits until somebody else did. False when that takes too long since `started`: a put then does without
    /// the disk for a while, so that nobody waits, and blocks that make way are lost; what can be made again or read again does without
    /// room.
    pub(crate) fn make_room(&self, ended_before: u64, started: Instant) -> bool {
        let Some(disk) = self.disk() else { return true };
        if let Some(spill) = self.with_pool(|pool, _| pool.next_spill()) {
            self.spill(disk, spill);
            return true;
        }
        let left = disk.wait.saturating_sub(started.elapsed());
        let ended = disk.ended.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = disk.ended.1.wait_timeout_while(ended, left, |ended| *ended == ended_before);
        let late = waited.unwrap_or_else(PoisonError::into_inner).1.timed_out();
        if late {
            self.metrics.disk_slow.inc();
        }
        !late
    }

    /// Carries out an order of the pool; false when it failed.
    pub(super) fn spill(&self, disk: &Disk, spill: Spill<Arc<Tile>>) -> bool {
        let (block, pages, extent) = (spill.block.clone(), spill.pages.clone(), spill.extent.clone());
        let is_check = spill.is_check;
        let mut under_way = Spilling { store: self, disk, spill: Some(spill), written: false };
        under_way.written = match is_check {
            true => self.is_readable(disk, &block, extent),
            false => self.write(disk, &block, &pages, extent.index()),
        };
        // Its memory goes with the last handle, which is not to be this one.
        drop(pages);
        under_way.written
    }

    fn write(
        &self,
        disk: &Disk,
        block: &SealedBlock<Arc<Tile>>,
        pages: &[Page<Arc<Tile>>],
        place: u64,
    ) -> bool {
        let (namespace, key) = (block.namespace(), block.key());
        let record = Record {
            namespace,
            key,
            generation: block.generation().number(),
            belongs: self.with_inventory(|_, inventory, _| inventory.place_of(namespace, key)),
            pages,
        };
        match disk.reader.tier.write(place, &record) {
            Ok(()) => true,
            Err(error) => {
                self.metrics.disk_write_errors.inc();
                tracing::warn!(shard = %self.identity().shard_id, block = %block.key(), %error, "a block cannot be written to disk: nothing is written for a while, blocks that make way are lost");
                false
            }
        }
    }

    /// Whether the copy of a block on disk can be read and is sound.
    fn is_readable(&self, disk: &Disk, block: &SealedBlock<Arc<Tile>>, extent: Arc<Extent>) -> bool {
        let checksums = block.checksums().iter().zip(0..);
        let mut bad = checksums.filter_map(|(crc32c, layer)| {
            let wanted = Wanted { extent: extent.clone(), layer, crc32c: *crc32c };
            disk.reader.read(&wanted).err()
        });
        let Some(bad) = bad.next() else { return true };
        self.metrics.disk_read_errors.inc();
        tracing::warn!(shard = %self.identity().shard_id, block = %block.key(), ?bad, "the copy of a block on disk cannot be read: the block stays in memory");
        self.clear_damage(block, &extent, &bad);
        false
    }

    /// Reads the tiles of some layers of a block on disk and checks them.
    pub(crate) fn read_layers(
        &self,
        block: &SealedBlock<Arc<Tile>>,
        extent: &Arc<Extent>,
        layers: std::ops::Range<u32>,
    ) -> Result<Vec<Arc<Tile>>, Error> {
        let Some(disk) = self.disk() else { return Err(self.panicked()) };
        disk.reader.tier.will_read(extent.index(), layers.clone());
        let wanted =
            |layer| Wanted { extent: extent.clone(), layer, crc32c: block.checksums()[layer as usize] };
        let tiles = layers.map(|layer| disk.reader.read(&wanted(layer)));
        tiles.collect::<Result<_, _>>().map_err(|bad| self.lose(block, extent, &bad))
    }

    /// Wishes blocks of the disk tier into memory; they come when there is time and room.
    pub(crate) fn wish(&self, generations: impl Iterator<Item = Generation>) {
        let Some(disk) = self.disk() else { return };
        for generation in generations {
            if disk.promotions.try_send(generation).is_err() {
                return;
            }
        }
    }

    /// Reads a block into memory if there is room for it.
    pub(crate) fn promote(&self, generation: Generation) {
        let started = Instant::now();
        loop {
            let before = self.spills_ended();
            match self.with_pool(|pool, now| pool.begin_promotion(generation, now)) {
                Promote::No => return,
                Promote::MakeRoom if self.make_room(before, started) => {}
                Promote::MakeRoom => return,
                Promote::Read(promotion) => return self.read_into_memory(promotion),
            }
        }
    }

    fn read_into_memory(&self, promotion: Promotion<Arc<Tile>>) {
        let (block, extent) = (promotion.block.clone(), promotion.extent.clone());
        let mut under_way = Promoting { store: self, promotion: Some(promotion), pages: None };
        let layers = 0..self.identity().layers;
        // A failure was told where it happened.
        if let Ok(tiles) = self.read_layers(&block, &extent, layers) {
            let pages = tiles.into_iter().zip(block.checksums());
            under_way.pages = Some(pages.map(|(payload, crc)| Page { payload, crc32c: *crc }).collect());
        }
    }
}

/// Carries out wishes, one at a time, until the shard is gone.
pub(crate) async fn promoter(store: std::sync::Weak<Store>, mut wishes: mpsc::Receiver<Generation>) {
    while let Some(generation) = wishes.recv().await {
        let Some(store) = store.upgrade() else { return };
        let worker = store.clone();
        let _panics_are_logged = store.off_reactor(move || worker.promote(generation)).await;
    }
}
