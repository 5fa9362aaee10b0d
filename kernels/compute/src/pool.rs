//! The compute pool of a process: fork and join with about a microsecond of overhead, so that a decode step can afford its
//! regions, six with several tasks and some with one in each layer.
//!
//! The calling thread takes part, so N threads are one caller and N − 1 workers. Concurrent callers take turns in the order in
//! which they came: never more than N threads of a process compute, and each region has all of them. Workers look for the
//! next region for some tens of microseconds, giving way to other threads of the machine, and then sleep.
//!
//! A caller with many short regions, a decode step, may keep its turn over all of them ([`ComputePool::hold`]): it would else wait for
//! a region of a prefill before each.
//!
//! Tasks are handed out one at a time, in order. Which thread runs a task depends on luck; kernels therefore give each
//! task its own output, and no result depends on the number of threads.

mod region;
mod turns;

use std::{
    cell::Cell,
    marker::PhantomData,
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use crate::{DisjointSlice, Error};
use region::Regions;
use turns::Turns;

/// The most threads that a pool may have.
const THREADS_MAX: usize = 1024;

/// Settings of a pool.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PoolOptions {
    /// Threads that compute, the caller's among them; 0: one per core that the process may use.
    pub threads: usize,
    /// Cores that the workers are bound to, in turn; empty: wherever the system puts them. The first is for callers that
    /// ask for it ([`ComputePool::pin_caller`]).
    pub pin: Vec<usize>,
}

/// Threads that compute together, one region at a time.
#[derive(Debug)]
pub struct ComputePool {
    regions: Arc<Regions>,
    turns: Turns,
    threads: usize,
    pin: Vec<usize>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

impl ComputePool {
    /// Starts the workers.
    pub fn new(options: &PoolOptions) -> Result<Arc<Self>, Error> {
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads if threads > THREADS_MAX => {
                return Err(Error::TooManyThreads { found: threads, limit: THREADS_MAX });
            }
            threads => threads,
        };
        let pool = Self {
            regions: Arc::new(Regions::new(threads - 1)),
            turns: Turns::default(),
            threads,
            pin: options.pin.clone(),
            workers: Mutex::new(Vec::new()),
        };
        for &core in &options.pin {
            check_core(core)?;
        }
        for worker in 1..threads {
            pool.start(worker)?;
        }
        Ok(Arc::new(pool))
    }

    /// A pool of the caller alone.
    pub fn serial() -> Arc<Self> {
        Self::new(&PoolOptions { threads: 1, pin: Vec::new() })
            .expect("a pool without workers starts nothing")
    }

    fn start(&self, worker: usize) -> Result<(), Error> {
        let (regions, core) = (Arc::clone(&self.regions), self.core(worker));
        let run = move || {
            if let Some(core) = core {
                // Checked when the pool was made; a core that went away since costs speed only.
                drop(pin(core));
            }
            regions.work();
        };
        let thread = std::thread::Builder::new().name(format!("compute-{worker}")).spawn(run);
        let handle = thread.map_err(Error::Thread)?;
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).push(handle);
        Ok(())
    }

    /// Core of a thread of the pool; 0 is the caller.
    fn core(&self, thread: usize) -> Option<usize> {
        (!self.pin.is_empty()).then(|| self.pin[thread % self.pin.len()])
    }

    /// Binds the calling thread to the first core of `pin`, when there is one. For a thread that calls this pool and no other.
    pub fn pin_caller(&self) -> Result<(), Error> {
        self.core(0).map_or(Ok(()), pin)
    }

    /// Threads that compute, the caller's among them.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `f(task)` once for each of `0..tasks` and returns when all are done. Tasks are handed out in order, so the
    /// heaviest should come first. A call out of a task runs its tasks on that task's thread. A panic in a task ends the
    /// region and goes on in the caller.
    pub fn run(&self, tasks: usize, f: impl Fn(usize) + Sync) {
        if tasks == 0 || region::inside() {
            return (0..tasks).for_each(f);
        }
        let _turn = self.hold();
        if tasks == 1 || self.threads == 1 {
            region::alone(|| (0..tasks).for_each(f));
        } else {
            self.regions.run(tasks, &f);
        }
    }

    /// Waits for a turn and keeps it until the answer is dropped: regions of this thread then run one after the other with no
    /// other caller's between them. Keep it for some milliseconds; a thread that waits for others meanwhile uses
    /// [`Self::while_waiting`]. A thread that holds turns of two pools must give them back in the opposite order.
    pub fn hold(&self) -> Held<'_> {
        let before = (!self.is_held()).then(|| self.enter());
        Held { pool: self, before, here: PhantomData }
    }

    /// Runs `wait` without the turn that this thread may hold, and takes one again: what it waits for may need the pool.
    ///
    /// A task of a region has no turn to give: its region goes on. A turn that ends within `wait`, because that drops what
    /// [`Self::hold`] gave, is not taken again.
    pub fn while_waiting<R>(&self, wait: impl FnOnce() -> R) -> R {
        if region::inside() || HELD.get() != self.address() {
            return wait();
        }
        let outer = ENDED.replace(false);
        self.leave(0);
        let _again = Again { pool: self, outer };
        wait()
    }

    fn is_held(&self) -> bool {
        HELD.get() == self.address() || region::inside()
    }

    /// What tells pools apart.
    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Takes a turn; gives what the thread held before, a turn of another pool.
    fn enter(&self) -> usize {
        self.turns.take();
        HELD.replace(self.address())
    }

    fn leave(&self, before: usize) {
        HELD.set(before);
        self.turns.give_back();
    }

    /// Runs `f(index, chunk)` over consecutive chunks of `data`; the last one may be shorter.
    pub fn run_chunks<T: Send>(&self, data: &mut [T], chunk: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        assert!(chunk > 0, "chunks must have elements");
        let (len, shared) = (data.len(), DisjointSlice::new(data));
        self.run(len.div_ceil(chunk), |index| {
            let range = index * chunk..len.min((index + 1) * chunk);
            #[expect(unsafe_code, reason = "each task has its own chunk")]
            // SAFETY: chunks do not overlap and each index runs once.
            f(index, unsafe { shared.range(range) });
        });
    }

    /// Runs `f(task)` for each of `0..tasks` and returns the results in order.
    pub fn map<R: Send>(&self, tasks: usize, f: impl Fn(usize) -> R + Sync) -> Vec<R> {
        let mut results: Vec<Option<R>> = Vec::new();
        results.resize_with(tasks, || None);
        self.run_chunks(&mut results, 1, |task, result| result[0] = Some(f(task)));
        results.into_iter().map(|result| result.expect("every task ran")).collect()
    }
}

thread_local! {
    /// Address of the pool whose turn this thread holds; 0: none.
    static HELD: Cell<usize> = const { Cell::new(0) };
    /// Whether the turn ended while this thread waited without it.
    static ENDED: Cell<bool> = const { Cell::new(false) };
}

/// A turn that lasts until this is dropped, by the thread that took it.
#[derive(Debug)]
#[must_use = "the turn ends when this is dropped"]
pub struct Held<'a> {
    pool: &'a ComputePool,
    /// What the thread held before; `None` when that was a turn of this pool.
    before: Option<usize>,
    /// Turns belong to threads.
    here: PhantomData<*const ()>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        match self.before {
            Some(before) if HELD.get() == self.pool.address() => self.pool.leave(before),
            // Given back already: this thread is within [`ComputePool::while_waiting`].
            Some(_) => ENDED.set(true),
            None => {}
        }
    }
}

/// Takes the turn again, however a wait ends.
struct Again<'a> {
    pool: &'a ComputePool,
    /// [`ENDED`] of a wait around this one.
    outer: bool,
}

impl Drop for Again<'_> {
    fn drop(&mut self) {
        if !ENDED.replace(self.outer) {
            self.pool.enter();
        }
    }
}

impl Drop for ComputePool {
    fn drop(&mut self) {
        self.regions.stop();
        for worker in self.workers.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // Tasks' panics went to their callers.
            drop(worker.join());
        }
    }
}

/// Fails when this process may not run on `core`.
fn check_core(core: usize) -> Result<(), Error> {
    // On a thread of its own, which ends bound to the core.
    let checked = std::thread::scope(|scope| scope.spawn(|| pin(core)).join());
    checked.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[cfg(target_os = "linux")]
fn pin(core: usize) -> Result<(), Error> {
    use rustix::thread::{CpuSet, sched_setaffinity};
    if core >= CpuSet::MAX_CPU {
        return Err(Error::Pin { core, source: std::io::ErrorKind::InvalidInput.into() });
    }
    let mut cores = CpuSet::new();
    cores.set(core);
    sched_setaffinity(None, &cores).map_err(|error| Error::Pin { core, source: error.into() })
}

#[cfg(not(target_os = "linux"))]
fn pin(core: usize) -> Result<(), Error> {
    Err(Error::Pin { core, source: std::io::ErrorKind::Unsupported.into() })
}

#[cfg(test)]
mod tests;
