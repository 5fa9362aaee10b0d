//! What an executor asked of its device so far.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::fallback::{FallbackStats, Fallbacks};
use crate::{Device, Error, Launch, Memory, PageStats, Queue, Span};

/// What a [`crate::CudaExecutor`] did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExecutorStats {
    /// Its copies of tiles.
    pub pages: PageStats,
    /// Kernels that were queued.
    pub launches: u64,
    /// Bytes that went to the device: tiles, queries, tables.
    pub uploaded_bytes: u64,
    /// Bytes of results that came back.
    pub downloaded_bytes: u64,
    /// Times that the device was waited for.
    pub waits: u64,
    /// Calls that the CPU did because the device had no room for them.
    pub fallbacks: FallbackStats,
    /// Calls whose lists or rows would have stayed on the device, had there been memory, and a page for each block: they went by lists of the
    /// host.
    pub to_lists: u64,
    /// Times that rows of keys and values became no pages where they were, for want of memory or pages: they go up as tiles.
    pub refused_appends: u64,
    /// The same of means, of which those of the host go up.
    pub refused_means: u64,
    /// Copies to the host that had no room on the way when they were to be begun, of everybody on the device.
    pub refused_departures: u64,
}

/// Counts the calls of the device behind it.
#[derive(Debug)]
pub(super) struct Tally {
    inner: Arc<dyn Device>,
    launches: AtomicU64,
    uploaded_bytes: AtomicU64,
    downloaded_bytes: AtomicU64,
    waits: AtomicU64,
}

impl Tally {
    pub(super) fn new(inner: Arc<dyn Device>) -> Self {
        let count = AtomicU64::default;
        let (launches, uploaded_bytes, downloaded_bytes, waits) = (count(), count(), count(), count());
        Self { inner, launches, uploaded_bytes, downloaded_bytes, waits }
    }

    /// Whether that is the device behind it.
    pub(super) fn is_over(&self, device: &Arc<dyn Device>) -> bool {
        Arc::ptr_eq(&self.inner, device)
    }

    pub(super) fn stats(&self, pages: PageStats, fallbacks: &Fallbacks) -> ExecutorStats {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        ExecutorStats {
            pages,
            launches: read(&self.launches),
            uploaded_bytes: read(&self.uploaded_bytes),
            downloaded_bytes: read(&self.downloaded_bytes),
            waits: read(&self.waits),
            fallbacks: fallbacks.stats(),
            to_lists: read(&fallbacks.to_lists),
            refused_appends: read(&fallbacks.appends),
            refused_means: read(&fallbacks.means),
            refused_departures: self.inner.refused_departures(),
        }
    }
}

fn add(count: &AtomicU64, number: usize) {
    count.fetch_add(number as u64, Ordering::Relaxed);
}

impl Device for Tally {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn multiprocessors(&self) -> usize {
        self.inner.multiprocessors()
    }

    fn capability(&self) -> u32 {
        self.inner.capability()
    }

    fn shared_bytes_limit(&self) -> usize {
        self.inner.shared_bytes_limit()
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, Error> {
        self.inner.allocate(bytes)
    }

    fn free(&self, memory: Memory) {
        self.inner.free(memory);
    }

    fn upload(&self, to: Span<'_>, from: &[u8]) -> Result<(), Error> {
        add(&self.uploaded_bytes, from.len());
        self.inner.upload(to, from)
    }

    fn upload_apart(&self, to: Span<'_>, from: &[u8]) -> Result<(), Error> {
        add(&self.uploaded_bytes, from.len());
        self.inner.upload_apart(to, from)
    }

    fn mark(&self, queue: Queue) -> Result<u64, Error> {
        self.inner.mark(queue)
    }

    fn hold_up(&self, queue: Queue, mark: u64) -> Result<(), Error> {
        self.inner.hold_up(queue, mark)
    }

    fn forget(&self, mark: u64) {
        self.inner.forget(mark);
    }

    fn download(&self, from: Span<'_>, to: &mut [u8]) -> Result<(), Error> {
        add(&self.downloaded_bytes, to.len());
        add(&self.waits, 1);
        self.inner.download(from, to)
    }

    fn depart(&self, from: Span<'_>) -> Result<Option<u64>, Error> {
        self.inner.depart(from)
    }

    fn refused_departures(&self) -> u64 {
        self.inner.refused_departures()
    }

    fn collect(&self, departure: u64, to: &mut [u8]) -> Result<(), Error> {
        add(&self.downloaded_bytes, to.len());
        add(&self.waits, 1);
        self.inner.collect(departure, to)
    }

    fn abandon(&self, departure: u64) {
        self.inner.abandon(departure);
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        add(&self.launches, 1);
        self.inner.launch(launch)
    }

    fn synchronize(&self) -> Result<(), Error> {
        add(&self.waits, 1);
        self.inner.synchronize()
    }
}
