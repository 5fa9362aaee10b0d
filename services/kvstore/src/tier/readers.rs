//! Threads that read tiles of the disk tier, so that what waits for a slow disk is never a reactor, and reads of what is needed
//! next go on while something computes.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::Duration,
};

use longshore_attention::{Tile, TileShape};
use longshore_blocks::{crc32c, tier::Extent};
use longshore_chassis::Tasks;

use super::Tier;

/// Jobs that may wait; more are read by who asks.
const QUEUE_MAX: usize = 256;
/// How often a reader without work looks whether the process stops.
const LOOK: Duration = Duration::from_millis(100);

/// Why a tile could not be used.
#[derive(Debug)]
pub(crate) enum Bad {
    /// It does not match its checksum.
    Corrupt,
    /// It could not be read.
    Io(io::Error),
}

impl Bad {
    /// Whether it says that the disk fails, and not only that this tile is damaged or beyond the end of its file.
    pub(crate) fn is_of_disk(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() != io::ErrorKind::UnexpectedEof)
    }
}

/// A tile to be read.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// Where its block is; held until it is read.
    pub(crate) extent: Arc<Extent>,
    /// Layer.
    pub(crate) layer: u32,
    /// What it must match.
    pub(crate) crc32c: u32,
}

/// Tiles in the order in which they were asked for.
pub(crate) type Tiles = Vec<Result<Arc<Tile>, Bad>>;

struct Job {
    wanted: Vec<Wanted>,
    answer: SyncSender<Tiles>,
}

/// Reads and checks tiles.
#[derive(Debug, Clone)]
pub(crate) struct Reader {
    pub(crate) tier: Arc<dyn Tier>,
    pub(crate) shape: TileShape,
    /// Tiles of a block.
    pub(crate) layers: u32,
}

impl Reader {
    /// Reads one tile.
    pub(crate) fn read(&self, wanted: &Wanted) -> Result<Arc<Tile>, Bad> {
        let fill = |body: &mut [u8]| self.tier.read(wanted.extent.index(), wanted.layer, body);
        let (tile, read) = Tile::filled(self.shape, fill).expect("the shape of a shard is valid");
        read.map_err(Bad::Io)?;
        if crc32c(tile.as_bytes()) != wanted.crc32c {
            return Err(Bad::Corrupt);
        }
        Ok(Arc::new(tile.with_version(self.version(wanted))))
    }

    /// What copies of the tile on devices are found by, whenever it is read again.
    fn version(&self, wanted: &Wanted) -> u64 {
        wanted.extent.content(|| Tile::reserve_versions(self.layers)) + u64::from(wanted.layer)
    }

    /// Reads tiles, after telling the disk of all of them.
    pub(crate) fn read_all(&self, wanted: &[Wanted]) -> Tiles {
        for tile in wanted {
            self.tier.will_read(tile.extent.index(), tile.layer..tile.layer + 1);
        }
        wanted.iter().map(|tile| self.read(tile)).collect()
    }
}

/// The threads.
#[derive(Debug)]
pub(super) struct Readers {
    /// `None` where everybody reads himself ([`super::Reads::ByWhoAsks`]).
    jobs: Option<SyncSender<Job>>,
}

impl Readers {
    /// No threads.
    pub(super) fn none() -> Self {
        Self { jobs: None }
    }

    /// Starts `threads`, which is not 0.
    pub(super) fn start(reader: &Reader, threads: usize, tasks: &Tasks) -> Self {
        let (jobs, queue) = sync_channel::<Job>(QUEUE_MAX);
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..threads {
            let (reader, queue, token) = (reader.clone(), queue.clone(), tasks.token());
            tasks.spawn_blocking("kvstore-disk-reader", move || {
                while serve_one(&reader, &queue, || token.is_cancelled()) {}
            });
        }
        Self { jobs: Some(jobs) }
    }

    /// Begins to read. Gives the order back when too much is waiting or the process stops: the caller reads itself.
    pub(super) fn read(&self, wanted: Vec<Wanted>) -> Result<Receiver<Tiles>, Vec<Wanted>> {
        let Some(jobs) = &self.jobs else { return Err(wanted) };
        let (answer, tiles) = sync_channel(1);
        match jobs.try_send(Job { wanted, answer }) {
            Ok(()) => Ok(tiles),
            Err(refused) => {
                let (std::sync::mpsc::TrySendError::Full(job)
                | std::sync::mpsc::TrySendError::Disconnected(job)) = refused;
                Err(job.wanted)
            }
        }
    }
}

/// Waits a moment for a job and does it. False when nobody can send one any more or the process stops.
fn serve_one(reader: &Reader, queue: &Mutex<Receiver<Job>>, stops: impl Fn() -> bool) -> bool {
    let queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
    if stops() {
        return false;
    }
    let job = queue.recv_timeout(LOOK);
    drop(queue);
    match job {
        Ok(job) => {
            let _nobody_waits = job.answer.try_send(reader.read_all(&job.wanted));
            true
        }
        Err(RecvTimeoutError::Timeout) => true,
        Err(RecvTimeoutError::Disconnected) => false,
    }
}
