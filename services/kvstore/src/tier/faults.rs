//! Disks that are slow or fail when somebody wants them to, for simulations.

use std::{fmt::Debug, io, ops::Range, sync::Arc};

use super::{Record, Tier};

/// What goes wrong with a disk, and how long it takes. Called on threads that may block.
pub trait DiskFaults: Send + Sync + Debug {
    /// Before a block is written or a place emptied; an error takes the place of the write.
    fn before_write(&self) -> io::Result<()>;
    /// Before a tile is read; an error takes the place of the read.
    fn before_read(&self) -> io::Result<()>;
}

/// A disk tier with faults.
#[derive(Debug)]
pub(crate) struct FaultyTier {
    pub(crate) inner: Arc<dyn Tier>,
    pub(crate) faults: Arc<dyn DiskFaults>,
}

impl Tier for FaultyTier {
    fn write(&self, place: u64, record: &Record<'_>) -> io::Result<()> {
        self.faults.before_write()?;
        self.inner.write(place, record)
    }

    fn clear(&self, place: u64) -> io::Result<()> {
        self.faults.before_write()?;
        self.inner.clear(place)
    }

    fn read(&self, place: u64, layer: u32, into: &mut [u8]) -> io::Result<()> {
        self.faults.before_read()?;
        self.inner.read(place, layer, into)
    }

    fn will_read(&self, place: u64, layers: Range<u32>) {
        self.inner.will_read(place, layers);
    }
}
