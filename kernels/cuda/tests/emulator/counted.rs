//! A device that counts the calls of another.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Sub;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use longshore_cuda::{Device, Error, Launch, Memory, Queue, Span};

use super::device::Emulator;

/// Calls so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) uploads: usize,
    /// Of much at once.
    pub(crate) uploads_apart: usize,
    /// Times that copies of much were told to wait for launches.
    pub(crate) arrivals_wait: usize,
    pub(crate) downloads: usize,
    pub(crate) downloaded_bytes: usize,
    /// Copies that were begun, to be taken later.
    pub(crate) departures: usize,
    /// Times that one of them was waited for with no launch queued behind it.
    pub(crate) stalls: usize,
    pub(crate) launches: usize,
    pub(crate) synchronizations: usize,
}

impl Counts {
    /// Calls that wait for the device while it has nothing more to do.
    pub(crate) fn waits(self) -> usize {
        self.downloads + self.stalls + self.synchronizations
    }
}

impl Sub for Counts {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            uploads: self.uploads - before.uploads,
            uploads_apart: self.uploads_apart - before.uploads_apart,
            arrivals_wait: self.arrivals_wait - before.arrivals_wait,
            downloads: self.downloads - before.downloads,
            downloaded_bytes: self.downloaded_bytes - before.downloaded_bytes,
            departures: self.departures - before.departures,
            stalls: self.stalls - before.stalls,
            launches: self.launches - before.launches,
            synchronizations: self.synchronizations - before.synchronizations,
        }
    }
}

/// A call of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    UploadApart,
    Download,
    Depart,
    /// Of a kernel with this entry: it may have to be compiled.
    Launch(&'static str),
}

/// Something that is done once.
type Action = Box<dyn FnOnce() + Send>;

/// Copies that were begun.
#[derive(Default)]
struct Departing {
    /// How many launches there were when each was begun.
    launches: BTreeMap<u64, usize>,
    /// All up to this one are known to be done.
    reached: u64,
    /// Whether staging memory is full.
    full: bool,
    refused: u64,
}

/// Counts calls, and has room for so many bytes.
pub(crate) struct Watched {
    pub(crate) inner: Arc<Emulator>,
    room: usize,
    /// Allocations until one is refused, once.
    until_refusal: AtomicUsize,
    refused: AtomicUsize,
    pub(crate) used: AtomicUsize,
    counts: Mutex<Counts>,
    departing: Mutex<Departing>,
    entries: Mutex<BTreeSet<&'static str>>,
    /// Done by the next such call, before it is passed on.
    before: Mutex<Option<(Moment, Action)>>,
}

impl Watched {
    pub(crate) fn with_room(room: usize) -> Arc<Self> {
        let (used, counts, before) = (AtomicUsize::new(0), Mutex::default(), Mutex::default());
        let (until_refusal, refused) = (AtomicUsize::new(usize::MAX), AtomicUsize::new(0));
        let (inner, entries, departing) = (Emulator::new(), Mutex::default(), Mutex::default());
        Arc::new(Self { inner, room, until_refusal, refused, used, counts, departing, entries, before })
    }

    /// Has no room for copies that are begun from now on, or has it again.
    pub(crate) fn fill_staging(&self, full: bool) {
        self.departing.lock().unwrap().full = full;
    }

    /// Copies that were begun and are neither taken nor abandoned.
    pub(crate) fn departing(&self) -> usize {
        self.departing.lock().unwrap().launches.len()
    }

    /// Everything that was queued is done.
    fn reach_all(&self) {
        let mut departing = self.departing.lock().unwrap();
        departing.reached = departing.launches.keys().next_back().copied().unwrap_or(departing.reached);
    }

    /// Refuses one allocation: the next but so many.
    pub(crate) fn refuse_allocation(&self, number: usize) {
        self.until_refusal.store(number, Ordering::Relaxed);
    }

    pub(crate) fn has_refused(&self) -> bool {
        self.refusals() > 0
    }

    /// Allocations that were refused.
    pub(crate) fn refusals(&self) -> usize {
        self.refused.load(Ordering::Relaxed)
    }

    pub(crate) fn counted(&self) -> Counts {
        *self.counts.lock().unwrap()
    }

    /// Entries that were launched since this was asked last.
    pub(crate) fn take_launched(&self) -> BTreeSet<&'static str> {
        std::mem::take(&mut *self.entries.lock().unwrap())
    }

    pub(crate) fn before(&self, moment: Moment, action: impl FnOnce() + Send + 'static) {
        *self.before.lock().unwrap() = Some((moment, Box::new(action)));
    }

    fn at(&self, moment: Moment) {
        let action = self.before.lock().unwrap().take_if(|(awaited, _)| *awaited == moment);
        if let Some((_, action)) = action {
            action();
        }
    }

    fn count(&self, which: impl FnOnce(&mut Counts) -> &mut usize) {
        *which(&mut self.counts.lock().unwrap()) += 1;
    }
}

impl Device for Watched {
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
        let refused = self.until_refusal.fetch_sub(1, Ordering::Relaxed) == 0;
        if refused || self.used.load(Ordering::Relaxed) + bytes > self.room {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Err(Error::OutOfMemory { bytes, problem: "the test leaves no room".to_owned() });
        }
        self.used.fetch_add(bytes, Ordering::Relaxed);
        self.inner.allocate(bytes)
    }

    fn free(&self, memory: Memory) {
        self.used.fetch_sub(memory.bytes(), Ordering::Relaxed);
        self.inner.free(memory);
    }

    fn upload(&self, to: Span<'_>, from: &[u8]) -> Result<(), Error> {
        self.count(|counts| &mut counts.uploads);
        self.inner.upload(to, from)
    }

    fn upload_apart(&self, to: Span<'_>, from: &[u8]) -> Result<(), Error> {
        self.count(|counts| &mut counts.uploads_apart);
        self.at(Moment::UploadApart);
        self.inner.upload_apart(to, from)
    }

    fn mark(&self, queue: Queue) -> Result<u64, Error> {
        self.inner.mark(queue)
    }

    fn hold_up(&self, queue: Queue, mark: u64) -> Result<(), Error> {
        if queue == Queue::Arrivals {
            self.count(|counts| &mut counts.arrivals_wait);
        }
        self.inner.hold_up(queue, mark)
    }

    fn forget(&self, mark: u64) {
        self.inner.forget(mark);
    }

    fn download(&self, from: Span<'_>, to: &mut [u8]) -> Result<(), Error> {
        self.count(|counts| &mut counts.downloads);
        self.counts.lock().unwrap().downloaded_bytes += to.len();
        self.at(Moment::Download);
        self.reach_all();
        self.inner.download(from, to)
    }

    fn depart(&self, from: Span<'_>) -> Result<Option<u64>, Error> {
        self.at(Moment::Depart);
        {
            let mut departing = self.departing.lock().unwrap();
            if departing.full {
                departing.refused += 1;
                return Ok(None);
            }
        }
        let departure = self.inner.depart(from)?;
        self.count(|counts| &mut counts.departures);
        if let Some(number) = departure {
            let launches = self.counted().launches;
            self.departing.lock().unwrap().launches.insert(number, launches);
        }
        Ok(departure)
    }

    fn refused_departures(&self) -> u64 {
        self.departing.lock().unwrap().refused
    }

    fn collect(&self, departure: u64, to: &mut [u8]) -> Result<(), Error> {
        let mut departing = self.departing.lock().unwrap();
        let since = departing.launches.remove(&departure).expect("it was begun");
        let waits = departure > departing.reached;
        departing.reached = departing.reached.max(departure);
        drop(departing);
        if waits && self.counted().launches == since {
            self.count(|counts| &mut counts.stalls);
        }
        self.inner.collect(departure, to)
    }

    fn abandon(&self, departure: u64) {
        self.departing.lock().unwrap().launches.remove(&departure);
        self.inner.abandon(departure);
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        self.count(|counts| &mut counts.launches);
        self.entries.lock().unwrap().insert(launch.kernel.entry);
        self.at(Moment::Launch(launch.kernel.entry));
        self.inner.launch(launch)
    }

    fn synchronize(&self) -> Result<(), Error> {
        self.count(|counts| &mut counts.synchronizations);
        self.reach_all();
        self.inner.synchronize()
    }
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("room", &self.room).finish_non_exhaustive()
    }
}
