//! Tiers below memory: the bytes. Which block lies where is decided by the pool of `longshore-blocks`.

mod disk;
mod error;
mod faults;
mod format;
mod load;
mod moves;
mod readers;
mod restart;
mod save;
mod seam;

use std::{io, ops::Range, sync::Arc};

use longshore_attention::Tile;
use longshore_blocks::{BlockKey, BlockPlace, Namespace, pool::Page};

pub(crate) use disk::DiskTier;
pub use error::DiskError;
pub use faults::DiskFaults;
pub(crate) use faults::FaultyTier;
pub(crate) use load::{Body, Loading};
pub(crate) use moves::{Disk, open as open_disk, promoter};
pub(crate) use save::at_stop;
pub(crate) use seam::{DiskSeam, Reads};

/// A block on its way to a tier.
pub(crate) struct Record<'a> {
    /// Whose block it is.
    pub(crate) namespace: Namespace,
    /// Key.
    pub(crate) key: BlockKey,
    /// Number of its generation.
    pub(crate) generation: u64,
    /// Where its copies belong, when that is known: a restart has it from here.
    pub(crate) belongs: Option<BlockPlace>,
    /// Tiles by layer.
    pub(crate) pages: &'a [Page<Arc<Tile>>],
}

/// Where blocks can be kept beside main memory. Places are numbered; who may use which one, and when, is not its business.
/// Bytes come back as they are found: the caller checks them.
pub(crate) trait Tier: Send + Sync + std::fmt::Debug {
    /// Writes a block to a place. What was there before is lost even if this fails; a block that was not written whole is
    /// never found by a restart.
    fn write(&self, place: u64, record: &Record<'_>) -> io::Result<()>;
    /// Empties a place whose block is damaged, so that a restart does not find it.
    fn clear(&self, place: u64) -> io::Result<()>;
    /// Reads the tile of one layer; `into` has its size.
    fn read(&self, place: u64, layer: u32, into: &mut [u8]) -> io::Result<()>;
    /// Says that tiles will be read soon. May do nothing.
    fn will_read(&self, place: u64, layers: Range<u32>);
}
