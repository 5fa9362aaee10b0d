//! One region at a time: how its caller and the workers meet.
//!
//! The caller writes what to do, opens the region and takes part. A worker that sees an open region joins it: it counts
//! itself as active and then looks whether the region is still open. The caller closes the region when no task is left and
//! waits until nobody is active. Both sides write one word and read the other's, in sequentially consistent order, so
//! either the worker sees that the region is closed or the caller sees the worker. A worker that sleeps through a short
//! region costs its caller nothing.
#![allow(unsafe_code, reason = "workers run a closure that lives on the caller's stack")]

use std::{
    any::Any,
    cell::{Cell, UnsafeCell},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
};

/// Looks of a waiting thread that only pause the core, for the gap between two regions of a layer.
const PAUSES: u32 = 1000;

/// Looks that let other threads run, before a worker sleeps.
const YIELDS: u32 = 100;

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread runs a task of some region.
pub(super) fn inside() -> bool {
    INSIDE.get()
}

/// Runs `f` as a region of the calling thread alone.
pub(super) fn alone(f: impl FnOnce()) {
    struct Outside;
    impl Drop for Outside {
        fn drop(&mut self) {
            INSIDE.set(false);
        }
    }
    INSIDE.set(true);
    let _outside = Outside;
    f();
}

/// The tasks of a region, as workers see them.
#[derive(Clone, Copy)]
struct Job {
    /// `&F` of the caller.
    f: *const (),
    /// Calls it.
    call: unsafe fn(*const (), usize),
    tasks: usize,
}

/// Where caller and workers meet.
pub(super) struct Regions {
    job: UnsafeCell<Job>,
    /// Regions opened so far; tells workers that there is a new one.
    opened: AtomicU64,
    open: AtomicBool,
    active: AtomicUsize,
    next_task: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    workers: usize,
    /// Whether a region runs.
    busy: AtomicBool,
    asleep: AtomicUsize,
    /// Guards sleeping: held while a worker decides to, and while a caller wakes them.
    sleep: Mutex<()>,
    wake: Condvar,
    stopped: AtomicBool,
}

// SAFETY: `job` is written only by the one caller that made `busy` true, while the region is closed and after the former one's
// workers left, and read only by workers that joined an open region. Its pointers are valid until the region is closed and
// empty, and lead to a `Sync` closure.
unsafe impl Send for Regions {}
// SAFETY: as above.
unsafe impl Sync for Regions {}

impl std::fmt::Debug for Regions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Regions")
            .field("workers", &self.workers)
            .field("opened", &self.opened)
            .finish_non_exhaustive()
    }
}

unsafe fn call<F: Fn(usize)>(f: *const (), task: usize) {
    // SAFETY: `f` is the `&F` that `Regions::run` made a job of, and the region is open.
    let f = unsafe { &*f.cast::<F>() };
    f(task);
}

unsafe fn call_nothing(_: *const (), _: usize) {}

impl Regions {
    pub(super) fn new(workers: usize) -> Self {
        Self {
            job: UnsafeCell::new(Job { f: std::ptr::null(), call: call_nothing, tasks: 0 }),
            opened: AtomicU64::new(0),
            open: AtomicBool::new(false),
            active: AtomicUsize::new(0),
            next_task: AtomicUsize::new(0),
            panic: Mutex::new(None),
            workers,
            busy: AtomicBool::new(false),
            asleep: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            stopped: AtomicBool::new(false),
        }
    }

    /// Runs a region. The caller must have the turn.
    pub(super) fn run<F: Fn(usize) + Sync>(&self, tasks: usize, f: &F) {
        let job = Job { f: std::ptr::from_ref(f).cast(), call: call::<F>, tasks };
        assert!(!self.busy.swap(true, SeqCst), "a region runs already: somebody gave a turn away");
        // SAFETY: no other caller is between here and the end of this function, the former region is closed and empty, so nobody reads or writes the job.
        unsafe { *self.job.get() = job };
        self.next_task.store(0, SeqCst);
        self.open.store(true, SeqCst);
        self.opened.fetch_add(1, SeqCst);
        if self.asleep.load(SeqCst) > 0 {
            drop(self.sleep.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
        self.take_part(job);
        self.open.store(false, SeqCst);
        wait_until(|| self.active.load(SeqCst) == 0);
        self.busy.store(false, SeqCst);
        let panic = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Runs tasks until none is left.
    fn take_part(&self, job: Job) {
        INSIDE.set(true);
        let run = || {
            loop {
                let task = self.next_task.fetch_add(1, SeqCst);
                if task >= job.tasks {
                    return;
                }
                // SAFETY: the region cannot end before this thread leaves it, so the closure is there.
                unsafe { (job.call)(job.f, task) };
            }
        };
        let outcome = catch_unwind(AssertUnwindSafe(run));
        INSIDE.set(false);
        if let Err(panic) = outcome {
            // The others find no task any more. Adding cannot overflow: each thread adds one after this.
            self.next_task.store(job.tasks, SeqCst);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }

    /// What a worker does until the pool ends.
    pub(super) fn work(&self) {
        let mut seen = 0;
        while self.wait_for_region(&mut seen) {
            self.active.fetch_add(1, SeqCst);
            if self.open.load(SeqCst) {
                // SAFETY: the region is open and its caller sees this worker as active, so it keeps the job until it leaves.
                let job = unsafe { *self.job.get() };
                self.take_part(job);
            }
            self.active.fetch_sub(1, SeqCst);
        }
    }

    /// Waits for a region after the `seen`-th; false when the pool ends.
    fn wait_for_region(&self, seen: &mut u64) -> bool {
        let ready = || self.opened.load(SeqCst) != *seen || self.stopped.load(SeqCst);
        if !look(ready) {
            let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            self.asleep.fetch_add(1, SeqCst);
            while !ready() {
                guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
            self.asleep.fetch_sub(1, SeqCst);
        }
        *seen = self.opened.load(SeqCst);
        !self.stopped.load(SeqCst)
    }

    /// Ends the workers.
    pub(super) fn stop(&self) {
        self.stopped.store(true, SeqCst);
        drop(self.sleep.lock().unwrap_or_else(PoisonError::into_inner));
        self.wake.notify_all();
    }
}

/// Looks for a while whether `ready`.
fn look(ready: impl Fn() -> bool) -> bool {
    for _ in 0..PAUSES {
        if ready() {
            return true;
        }
        std::hint::spin_loop();
    }
    for _ in 0..YIELDS {
        if ready() {
            return true;
        }
        std::thread::yield_now();
    }
    false
}

/// Looks until `ready`: for tasks that other threads are running right now.
fn wait_until(ready: impl Fn() -> bool) {
    for _ in 0..PAUSES {
        if ready() {
            return;
        }
        std::hint::spin_loop();
    }
    while !ready() {
        std::thread::yield_now();
    }
}
