//! A device of tests that gives out addresses, as many bytes as it has.
#![expect(unsafe_code, reason = "a device that gives out numbers; see SAFETY")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::{Device, Error, Launch, Memory, Queue, Span};

/// Addresses without memory behind them, for tests of what moves no bytes itself.
#[derive(Debug)]
pub(crate) struct Addresses {
    left: AtomicUsize,
    next: AtomicUsize,
}

impl Addresses {
    /// The first address.
    const FIRST: usize = 4096;

    /// Of so many bytes, from `FIRST` on.
    pub(crate) fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self { left: AtomicUsize::new(bytes), next: AtomicUsize::new(Self::FIRST) })
    }

    /// Bytes that nobody has.
    pub(crate) fn left(&self) -> usize {
        self.left.load(Ordering::Relaxed)
    }
}

impl Device for Addresses {
    fn name(&self) -> String {
        "addresses".to_owned()
    }

    fn multiprocessors(&self) -> usize {
        1
    }

    fn capability(&self) -> u32 {
        80
    }

    fn shared_bytes_limit(&self) -> usize {
        0
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, Error> {
        let taken =
            self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes));
        match taken {
            // SAFETY: a number that is given out once; nothing lies there.
            Ok(_) => Ok(unsafe { Memory::new(self.next.fetch_add(bytes, Ordering::Relaxed) as u64, bytes) }),
            Err(left) => Err(Error::OutOfMemory { bytes, problem: format!("{left} are left") }),
        }
    }

    fn free(&self, memory: Memory) {
        self.left.fetch_add(memory.bytes(), Ordering::Relaxed);
    }

    fn upload(&self, _: Span<'_>, _: &[u8]) -> Result<(), Error> {
        unreachable!("nothing is brought there")
    }

    fn upload_apart(&self, _: Span<'_>, _: &[u8]) -> Result<(), Error> {
        unreachable!("nothing is brought there")
    }

    fn mark(&self, _: Queue) -> Result<u64, Error> {
        unreachable!("nothing is ordered")
    }

    fn hold_up(&self, _: Queue, _: u64) -> Result<(), Error> {
        unreachable!("nothing is ordered")
    }

    fn forget(&self, _: u64) {}

    fn download(&self, _: Span<'_>, _: &mut [u8]) -> Result<(), Error> {
        unreachable!("nothing is read")
    }

    fn depart(&self, _: Span<'_>) -> Result<Option<u64>, Error> {
        unreachable!("nothing is read")
    }

    fn collect(&self, _: u64, _: &mut [u8]) -> Result<(), Error> {
        unreachable!("nothing is read")
    }

    fn abandon(&self, _: u64) {}

    fn launch(&self, _: &Launch<'_>) -> Result<(), Error> {
        unreachable!("nothing is launched")
    }

    fn synchronize(&self) -> Result<(), Error> {
        Ok(())
    }
}
