//! Versions that are known before what they name is written.

use super::{Tile, next_version};
use crate::Error;

/// A version that was given out for what a tile is going to hold: copies on devices may be made under it first. One write uses it up. Dropped,
/// it is the version of nothing, and copies under it are found by nobody.
#[derive(Debug, PartialEq, Eq)]
pub struct Promise(u64);

impl Promise {
    /// The version.
    pub fn version(&self) -> u64 {
        self.0
    }
}

impl Tile {
    /// A version that no tile has, for what one is going to hold. The tile has its old version and its old bytes until the write.
    pub fn promise() -> Promise {
        Promise(next_version())
    }

    /// The tile has what was promised: it gets the version.
    pub(crate) fn keep(&mut self, promise: Promise) {
        self.version = promise.0;
    }

    /// [`Self::write`], after which the tile has the promised version. Copies that were made under it must have the same rows, and what the tile
    /// held before. A refused write uses the promise up too.
    pub fn write_promised(
        &mut self,
        promise: Promise,
        offset: usize,
        keys: &[f32],
        values: &[f32],
    ) -> Result<(), Error> {
        self.write(offset, keys, values)?;
        self.keep(promise);
        Ok(())
    }
}
