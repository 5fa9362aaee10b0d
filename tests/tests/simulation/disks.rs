//! Disks of the simulated shards: slow while faults are about, and one that writes little. What becomes of a read or a write is a function
//! of (seed, shard, number of it on this shard). It takes its time on the virtual clock: the one thread that the simulation has for
//! blocking work waits, and a task moves the clock on, in steps, as it would move by itself if nothing waited.

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{SyncSender, sync_channel},
    },
    time::Duration,
};

use longshore_kvstore::DiskFaults;
use longshore_tests::draws::Draws;
use tokio::sync::mpsc;

use super::network::NODES;

/// Milliseconds, and who is told when they passed.
type Wait = (u64, SyncSender<()>);

/// Reads and writes of a thousand that take long while disks are slow.
const LATE: u64 = 500;
/// Longest of them, milliseconds.
const LATEST_MS: u64 = 900;
/// Writes of a thousand that fail on a bad disk.
const FAILING: u64 = 700;
/// Turns that everybody gets in each millisecond: after so many nobody has anything left to do in it.
const TURNS: usize = 16;
const ENOSPC: i32 = 28;

#[derive(Debug, Default)]
struct State {
    slow: bool,
    bad: [bool; NODES],
    used: [u64; NODES],
    late: u64,
    failed: u64,
}

/// All disks of a simulation.
#[derive(Debug)]
pub(crate) struct Disks {
    seed: u64,
    state: Mutex<State>,
    waits: mpsc::Sender<Wait>,
}

impl Disks {
    /// The disks, and what [`pass_time`] needs.
    pub(crate) fn new(seed: u64) -> (Arc<Self>, mpsc::Receiver<Wait>) {
        let (waits, clock) = mpsc::channel(1);
        (Arc::new(Self { seed, state: Mutex::default(), waits }), clock)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether they are slow now.
    pub(crate) fn set_slow(&self, slow: bool) {
        self.state().slow = slow;
    }

    /// Whether the disk of a shard is bad now.
    pub(crate) fn set_bad(&self, node: usize, bad: bool) {
        self.state().bad[node] = bad;
    }

    /// All disks are sound and quick again.
    pub(crate) fn calm(&self) {
        let mut state = self.state();
        (state.slow, state.bad) = (false, [false; NODES]);
    }

    /// Reads and writes that took long, and writes that failed.
    pub(crate) fn told(&self) -> (u64, u64) {
        let state = self.state();
        (state.late, state.failed)
    }

    /// How long the next use of a shard's disk takes, and whether it fails.
    fn next(&self, node: usize, writes: bool) -> (u64, bool) {
        let mut state = self.state();
        state.used[node] += 1;
        let mut draws = Draws::new(&[self.seed, 4, node as u64, state.used[node]]);
        let late = if draws.per_mille(LATE) { 1 + draws.below(LATEST_MS) } else { 0 };
        let delay_ms = if state.slow { late } else { 0 };
        let fails = draws.per_mille(FAILING) && state.bad[node] && writes;
        state.late += u64::from(delay_ms > 0);
        state.failed += u64::from(fails);
        (delay_ms, fails)
    }
}

/// Moves the clock for as long as somebody waits for a disk.
pub(crate) async fn pass_time(mut waits: mpsc::Receiver<Wait>) {
    while let Some((delay_ms, done)) = waits.recv().await {
        everybody().await;
        for _ in 0..delay_ms {
            tokio::time::advance(Duration::from_millis(1)).await;
            everybody().await;
        }
        // A thread that stopped waiting is no matter.
        let _told = done.send(());
    }
}

/// Lets everybody do what there is to do now.
async fn everybody() {
    for _ in 0..TURNS {
        tokio::task::yield_now().await;
    }
}

/// The disk of one shard.
#[derive(Debug)]
pub(crate) struct SimDisk {
    pub(crate) disks: Arc<Disks>,
    pub(crate) node: usize,
}

impl SimDisk {
    fn pass(&self, writes: bool) -> io::Result<()> {
        let (delay_ms, fails) = self.disks.next(self.node, writes);
        if delay_ms > 0 {
            let (done, passed) = sync_channel(1);
            // When the simulation is over nobody moves the clock.
            if self.disks.waits.blocking_send((delay_ms, done)).is_ok() {
                let _passed_or_over = passed.recv();
            }
        }
        if fails { Err(io::Error::from_raw_os_error(ENOSPC)) } else { Ok(()) }
    }
}

impl DiskFaults for SimDisk {
    fn before_write(&self) -> io::Result<()> {
        self.pass(true)
    }

    fn before_read(&self) -> io::Result<()> {
        self.pass(false)
    }
}
