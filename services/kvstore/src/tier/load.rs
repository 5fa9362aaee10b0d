//! Tiles for one attention query, from memory or from disk: begun early, waited for when they are needed.

use std::sync::{Arc, mpsc::Receiver};

use longshore_attention::Tile;
use longshore_blocks::{
    pool::{Pages, Payload, SealedBlock, ViewBlock},
    tier::Extent,
};

use super::{
    moves::Disk,
    readers::{Bad, Tiles, Wanted},
};
use crate::{Error, store::Store};

/// A tile that is held while it is used.
pub(crate) enum Body {
    /// All tiles of its block, in memory.
    Memory(Pages<Arc<Tile>>),
    /// Read and checked for this use.
    Read(Arc<Tile>),
}

impl Body {
    /// The tile of `layer`, which is the layer that was loaded.
    pub(crate) fn tile(&self, layer: usize) -> &Tile {
        match self {
            Self::Memory(pages) => &pages[layer].payload,
            Self::Read(tile) => tile,
        }
    }
}

type Sealed = Arc<SealedBlock<Arc<Tile>>>;

/// Tiles of some blocks in one layer, some still on their way.
pub(crate) struct Loading {
    /// In the order of the blocks; none for those that are read.
    bodies: Vec<Option<Body>>,
    /// Blocks, and the places that are read.
    read: Vec<(Sealed, Arc<Extent>)>,
    source: Source,
}

enum Source {
    Threads(Receiver<Tiles>),
    /// Nobody had time: the caller reads.
    Caller(Vec<Wanted>),
}

impl Loading {
    /// Tiles that are read from disk.
    pub(crate) fn tiles_read(&self) -> usize {
        self.read.len()
    }

    /// Waits for the tiles. A tile that is bad or cannot be read takes its block away, as one that rotted in memory does; a
    /// disk that does not answer in time is the query's failure alone.
    pub(crate) fn wait(self, store: &Store) -> Result<Vec<Body>, Error> {
        let Self { mut bodies, read, source } = self;
        let mut tiles = match (source, store.disk()) {
            (_, _) if read.is_empty() => Vec::new(),
            (Source::Threads(answer), Some(disk)) => disk.receive(&answer, store)?,
            (Source::Caller(wanted), Some(disk)) => disk.reader.read_all(&wanted),
            (_, None) => Vec::new(),
        }
        .into_iter();
        let mut read = read.into_iter();
        for body in bodies.iter_mut().filter(|body| body.is_none()) {
            let (Some((block, extent)), Some(tile)) = (read.next(), tiles.next()) else {
                return Err(store.panicked());
            };
            *body = Some(Body::Read(tile.map_err(|bad| store.lose(&block, &extent, &bad))?));
        }
        Ok(bodies.into_iter().flatten().collect())
    }
}

impl Store {
    /// Begins to load the tiles of `blocks` in one layer.
    pub(crate) fn begin_load<'a>(
        &self,
        blocks: impl Iterator<Item = &'a ViewBlock<Arc<Tile>>>,
        layer: usize,
    ) -> Loading {
        let (mut read, mut wanted) = (Vec::new(), Vec::new());
        let bodies = blocks
            .map(|entry| match entry.block.payload() {
                Payload::Memory(pages) => Some(Body::Memory(pages)),
                Payload::Disk(extent) => {
                    let crc32c = entry.block.checksums()[layer];
                    read.push((entry.block.clone(), extent.clone()));
                    wanted.push(Wanted { extent, layer: layer as u32, crc32c });
                    None
                }
            })
            .collect();
        let source = match self.disk().filter(|_| !wanted.is_empty()) {
            Some(disk) => disk.begin_read(wanted),
            None => Source::Caller(wanted),
        };
        Loading { bodies, read, source }
    }

    /// Takes a block away of which a tile in `extent` cannot be used; says so as an error of the view.
    pub(crate) fn lose(&self, block: &SealedBlock<Arc<Tile>>, extent: &Extent, bad: &Bad) -> Error {
        let problem = match bad {
            Bad::Corrupt => "a tile does not match its checksum".to_owned(),
            Bad::Io(error) => format!("a tile cannot be read: {error}"),
        };
        if matches!(bad, Bad::Io(_)) {
            self.metrics.disk_read_errors.inc();
        }
        tracing::warn!(shard = %self.identity().shard_id, block = %block.key(), "{problem}: its block is dropped from disk");
        self.with_pool(|pool, now| {
            if bad.is_of_disk() {
                pool.read_failed(now);
            }
            pool.condemn(block.generation());
        });
        self.clear_damage(block, extent, bad);
        let what = format!("block `{}` on disk", block.key());
        longshore_blocks::Error::Corrupt { what, problem }.into()
    }

    /// Empties a place that holds damage, or a restart would find the block there and read it once more to see that. Nobody else can have
    /// the place yet, since the caller holds it. A disk that fails may give the block after all when it is asked later.
    pub(super) fn clear_damage(&self, block: &SealedBlock<Arc<Tile>>, extent: &Extent, bad: &Bad) {
        let Some(disk) = self.disk().filter(|_| !bad.is_of_disk()) else { return };
        if let Err(error) = disk.reader.tier.clear(extent.index()) {
            self.metrics.disk_write_errors.inc();
            tracing::warn!(shard = %self.identity().shard_id, block = %block.key(), %error, "a damaged block cannot be taken off the disk: a restart will find it, and its damage");
        }
    }
}

impl Disk {
    fn begin_read(&self, wanted: Vec<Wanted>) -> Source {
        match self.readers.read(wanted) {
            Ok(answer) => Source::Threads(answer),
            Err(wanted) => Source::Caller(wanted),
        }
    }

    fn receive(&self, answer: &Receiver<Tiles>, store: &Store) -> Result<Tiles, Error> {
        answer.recv_timeout(self.read_timeout).map_err(|_late_or_stopped| {
            store.metrics.disk_slow.inc();
            store.with_pool(|pool, now| pool.read_failed(now));
            Error::SlowDisk { shard: store.identity().shard_id.clone() }
        })
    }
}
