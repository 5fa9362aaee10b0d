//! The pool under load: every task once, turns, nesting, panics, sleep.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use super::{ComputePool, PoolOptions};
use crate::Error;

fn pool(threads: usize) -> Arc<ComputePool> {
    ComputePool::new(&PoolOptions { threads, pin: Vec::new() }).unwrap()
}

#[test]
fn every_task_runs_once() {
    for threads in [1, 2, 3, 8] {
        let pool = pool(threads);
        assert_eq!(pool.threads(), threads);
        for tasks in [0, 1, 2, 3, 7, 64, 1000] {
            for _ in 0..20 {
                let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |task| _ = runs[task].fetch_add(1, SeqCst));
                assert!(runs.iter().all(|runs| runs.load(SeqCst) == 1), "{tasks} tasks on {threads} threads");
            }
        }
    }
}

#[test]
fn workers_that_slept_come_back() {
    let pool = pool(3);
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(pool.map(100, |task| task * 2), (0..200).step_by(2).collect::<Vec<_>>());
    }
}

/// Two tasks that wait for each other end only when two threads run them.
#[test]
fn workers_take_part() {
    let (pool, met) = (pool(2), AtomicUsize::new(0));
    pool.run(2, |_| {
        met.fetch_add(1, SeqCst);
        while met.load(SeqCst) < 2 {
            std::thread::yield_now();
        }
    });
}

#[test]
fn chunks_cover_the_data() {
    let pool = pool(2);
    let mut data = vec![0; 103];
    pool.run_chunks(&mut data, 10, |index, chunk| chunk.fill(index));
    assert_eq!(data, (0..103).map(|i| i / 10).collect::<Vec<_>>());
    pool.run_chunks(&mut Vec::<u8>::new(), 10, |_, _| unreachable!());
}

/// Callers from many threads get whole regions, one after the other, also regions of one task.
#[test]
fn callers_take_turns() {
    for (threads, tasks) in [(3, 6), (3, 1), (1, 6), (1, 1)] {
        let (pool, inside, most) = (pool(threads), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(tasks, |_| {
                            most.fetch_max(inside.fetch_add(1, SeqCst) + 1, SeqCst);
                            std::thread::yield_now();
                            inside.fetch_sub(1, SeqCst);
                        });
                    }
                });
            }
        });
        assert!(most.load(SeqCst) <= threads.min(tasks), "{most:?} of {threads} threads computed at once");
    }
}

/// Nobody computes between two regions of a caller that holds its turn, and everybody while it waits.
#[test]
fn a_turn_may_be_held_and_lent() {
    let (pool, others) = (pool(2), AtomicUsize::new(0));
    let stopped = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stopped.load(SeqCst) {
                pool.run(2, |_| _ = others.fetch_add(1, SeqCst));
            }
        });
        for _ in 0..20 {
            let held = pool.hold();
            let before = others.load(SeqCst);
            for _ in 0..10 {
                std::thread::sleep(Duration::from_micros(100));
                drop(pool.hold());
                pool.run(2, |_| std::thread::yield_now());
            }
            assert_eq!(others.load(SeqCst), before, "somebody computed in a held turn");
            pool.while_waiting(|| {
                while others.load(SeqCst) == before {
                    std::thread::yield_now();
                }
            });
            drop(held);
        }
        stopped.store(true, SeqCst);
    });
    assert!(catch_unwind(AssertUnwindSafe(|| pool.run(1, |_| panic!("as a test")))).is_err());
    assert_eq!(pool.map(4, |task| task), [0, 1, 2, 3]);
}

#[test]
fn a_call_out_of_a_task_runs_inline() {
    let (pool, runs) = (pool(2), AtomicUsize::new(0));
    pool.run(4, |_| {
        let caller = std::thread::current().id();
        pool.run(5, |_| {
            assert_eq!(std::thread::current().id(), caller);
            runs.fetch_add(1, SeqCst);
        });
    });
    assert_eq!(runs.load(SeqCst), 20);
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
    let pool = pool(2);
    for round in 0..50 {
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            pool.run(16, |task| assert!(task != round % 16, "task {task} failed"));
        }));
        let message = *panicked.unwrap_err().downcast::<String>().unwrap();
        assert_eq!(message, format!("task {} failed", round % 16));
        assert_eq!(pool.map(8, |task| task), (0..8).collect::<Vec<_>>());
    }
}

#[test]
fn what_cannot_work_is_refused() {
    let error = ComputePool::new(&PoolOptions { threads: 1025, pin: Vec::new() }).unwrap_err();
    assert!(matches!(error, Error::TooManyThreads { found: 1025, .. }));
    for core in [1000, usize::MAX] {
        let error = ComputePool::new(&PoolOptions { threads: 2, pin: vec![core] }).unwrap_err();
        assert!(error.to_string().contains(&format!("core {core}")), "{error}");
        assert!(!error.retryable());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn workers_are_bound_to_their_cores() {
    use rustix::thread::sched_getaffinity;
    let allowed = sched_getaffinity(None).unwrap();
    let first = (0..1024).find(|core| allowed.is_set(*core)).unwrap();
    let pool = ComputePool::new(&PoolOptions { threads: 2, pin: vec![first] }).unwrap();
    let (caller, met) = (std::thread::current().id(), AtomicUsize::new(0));
    let counts = pool.map(2, |_| {
        met.fetch_add(1, SeqCst);
        while met.load(SeqCst) < 2 {
            std::thread::yield_now();
        }
        (std::thread::current().id(), sched_getaffinity(None).unwrap().count())
    });
    let (_, cores) = counts.into_iter().find(|(thread, _)| *thread != caller).unwrap();
    assert_eq!(cores, 1);
}

/// A task must not give away the turn of the region that it belongs to.
#[test]
fn tasks_that_wait_keep_their_region() {
    let pool = pool(3);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let sum = AtomicUsize::new(0);
                    pool.run(8, |task| {
                        pool.while_waiting(std::thread::yield_now);
                        sum.fetch_add(task, SeqCst);
                    });
                    assert_eq!(sum.load(SeqCst), 28);
                }
            });
        }
    });
}

/// A turn that ends while its thread waits is neither given back twice nor taken again.
#[test]
fn turns_may_end_in_a_wait() {
    let pool = pool(2);
    for _ in 0..3 {
        let held = pool.hold();
        pool.while_waiting(|| drop(held));
        assert!(!pool.is_held());
        // Another thread gets its turn, and only one at a time.
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert_eq!(pool.map(20, |task| task), (0..20).collect::<Vec<_>>()));
            }
        });
        assert_eq!(pool.map(3, |task| task), [0, 1, 2]);
    }
}
