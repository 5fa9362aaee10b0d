//! The way to the end, with and without real signals to this process.

use std::{future::pending, process::Command};

use tokio::sync::Mutex;

use super::*;

/// A signal reaches every test of a process that listens, so that one listens at a time.
static ALONE: Mutex<()> = Mutex::const_new(());

/// Long enough for any machine; no test waits for it.
const LONG: Duration = Duration::from_secs(60);

/// Sends a signal to this process, whose handlers are installed.
fn send(signal: &str) {
    let status = Command::new("kill").args([signal, &std::process::id().to_string()]).status().unwrap();
    assert!(status.success());
}

#[tokio::test(start_paused = true)]
async fn a_failed_task_drains_and_is_named() {
    let _alone = ALONE.lock().await;
    let tasks = Tasks::new();
    let mut signals = Signals::install().unwrap();
    tasks.spawn("deaf", pending());
    tasks.spawn_critical("engine", async { Err("ran dry") });
    let ended = until_drained(&tasks, &mut signals, LONG).await;
    assert_eq!(ended.signal, None);
    assert_eq!(ended.failure.as_deref(), Some("task `engine` failed: ran dry"));
    assert_eq!(ended.late, ["deaf"]);
    assert!(!ended.forced && !ended.clean());
}

#[tokio::test]
async fn a_wanted_end_is_clean() {
    let _alone = ALONE.lock().await;
    let tasks = Tasks::new();
    let mut signals = Signals::install().unwrap();
    tasks.spawn("polite", tasks.cancelled());
    tasks.cancel();
    let ended = until_drained(&tasks, &mut signals, LONG).await;
    assert!(ended.clean(), "{ended:?}");
}

#[tokio::test]
async fn each_signal_drains() {
    let _alone = ALONE.lock().await;
    for (name, expected) in [("-INT", Signal::Interrupt), ("-TERM", Signal::Terminate)] {
        let tasks = Tasks::new();
        let mut signals = Signals::install().unwrap();
        tasks.spawn("polite", tasks.cancelled());
        send(name);
        let ended = until_drained(&tasks, &mut signals, LONG).await;
        assert_eq!((ended.signal, ended.clean()), (Some(expected), true), "{ended:?}");
    }
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let _alone = ALONE.lock().await;
    let tasks = Tasks::new();
    let mut signals = Signals::install().unwrap();
    let cancelled = tasks.cancelled();
    tasks.spawn("slow", async move {
        cancelled.await;
        send("-INT");
        pending::<()>().await;
    });
    send("-INT");
    let started = std::time::Instant::now();
    let ended = until_drained(&tasks, &mut signals, LONG).await;
    assert!(started.elapsed() < LONG / 2);
    assert_eq!((ended.signal, ended.forced), (Some(Signal::Interrupt), true));
    assert_eq!(ended.late, ["slow"]);
    assert!(!ended.clean());
}
