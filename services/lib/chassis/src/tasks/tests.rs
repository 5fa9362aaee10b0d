//! Panics, drains, scopes.

use std::{
    convert::Infallible,
    future::pending,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::sync::oneshot;

use super::*;

/// Long enough for any machine; only a paused clock waits for it.
const SOON: Duration = Duration::from_secs(60);

#[tokio::test(start_paused = true)]
async fn tasks_that_watch_the_token_drain() {
    let tasks = Tasks::new();
    for index in 0..10 {
        let cancelled = tasks.cancelled();
        tasks.spawn(format!("worker-{index}"), cancelled);
    }
    assert_eq!(tasks.running().len(), 10);
    assert!(tasks.drain(SOON).await.is_empty());
    assert!(tasks.running().is_empty());
    assert_eq!(tasks.failure(), None);
}

#[tokio::test(start_paused = true)]
async fn late_tasks_are_named_and_aborted() {
    struct Dropped(Arc<AtomicBool>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let tasks = Tasks::new();
    let dropped = Arc::new(AtomicBool::new(false));
    let guard = Dropped(dropped.clone());
    tasks.spawn("stuck", async move {
        let _guard = guard;
        pending::<()>().await;
    });
    tasks.spawn("quick", async {});
    assert_eq!(tasks.drain(SOON).await, ["stuck"]);
    tokio::time::timeout(SOON, tasks.tracker().wait()).await.expect("an aborted task ends");
    assert!(dropped.load(Ordering::SeqCst));
    assert!(tasks.running().is_empty());
}

#[tokio::test]
async fn a_panic_ends_its_task_only() {
    let tasks = Tasks::new();
    tasks.spawn("fragile", async { panic!("with {}", "text") });
    let (done, waits) = oneshot::channel();
    tasks.spawn("other", async move { done.send(7).unwrap() });
    assert_eq!(waits.await, Ok(7));
    while !tasks.running().is_empty() {
        tokio::task::yield_now().await;
    }
    assert!(!tasks.is_cancelled());
    assert_eq!(tasks.failure(), None);
}

#[tokio::test]
async fn a_critical_failure_starts_the_drain_of_the_root() {
    for panics in [false, true] {
        let root = Tasks::new();
        let scope = root.child().child();
        scope.spawn_critical("engine", async move {
            assert!(!panics, "broke");
            Err("ran dry")
        });
        tokio::time::timeout(SOON, root.cancelled()).await.unwrap();
        let expected = if panics { "task `engine` panicked: broke" } else { "task `engine` failed: ran dry" };
        assert_eq!(root.failure().as_deref(), Some(expected));
        assert_eq!(scope.failure(), root.failure());
        scope.spawn_critical("late", async { Err("too") });
        assert!(root.drain(SOON).await.is_empty());
        assert_eq!(root.failure().as_deref(), Some(expected), "the first failure is kept");
    }
}

#[tokio::test]
async fn a_critical_task_may_end_well() {
    let tasks = Tasks::new();
    tasks.spawn_critical("short", async { Ok::<(), Infallible>(()) });
    tasks.tracker().close();
    tasks.tracker().wait().await;
    assert!(!tasks.is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn children_end_with_their_parent_or_alone() {
    let root = Tasks::new();
    let (left, right) = (root.child(), root.child());
    for (scope, name) in [(&left, "left"), (&right, "right")] {
        scope.spawn(name, scope.cancelled());
    }
    root.spawn("root", root.cancelled());
    assert_eq!(root.running(), ["left", "right", "root"]);
    assert!(left.drain(SOON).await.is_empty());
    assert_eq!(root.running(), ["right", "root"]);
    assert!(!right.is_cancelled() && !root.is_cancelled());
    right.spawn("deaf", pending());
    assert_eq!(root.drain(SOON).await, ["deaf"], "a drain waits for the tasks of children");
    assert!(right.is_cancelled());
}

#[tokio::test(flavor = "multi_thread")]
async fn blocking_work_is_waited_for() {
    let tasks = Tasks::new();
    let token = tasks.token();
    let rounds = Arc::new(AtomicUsize::new(0));
    let counted = rounds.clone();
    tasks.spawn_blocking("compute", move || {
        while !token.is_cancelled() {
            std::thread::sleep(Duration::from_millis(1));
        }
        counted.fetch_add(1, Ordering::SeqCst);
        panic!("at the end");
    });
    assert_eq!(tasks.running(), ["compute"]);
    assert!(tasks.drain(SOON).await.is_empty());
    assert_eq!(rounds.load(Ordering::SeqCst), 1);
    assert!(tasks.running().is_empty());
}
