//! A link over a scripted shard.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio_util::task::TaskTracker;

use super::{
    expected_of, item, query,
    scripted::{Act, Arced, Scripted},
};
use crate::{AttendLink, CallContext, Code, Error, PendingAttend, StripePartial};

/// A link on a runtime of its own, asked from this thread.
struct Bench {
    link: AttendLink,
    shard: Arc<Scripted>,
    tasks: TaskTracker,
    runtime: tokio::runtime::Runtime,
}

fn bench(shard: Scripted, in_flight_max: usize) -> Bench {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let tasks = TaskTracker::new();
    let shard = Arc::new(shard);
    let _entered = runtime.enter();
    let link = AttendLink::new(Arc::new(Arced(Arc::clone(&shard), tasks.clone())), &tasks, in_flight_max);
    Bench { link, shard, tasks, runtime }
}

impl Bench {
    fn ask(&self, rows: usize) -> Result<Vec<StripePartial>, Error> {
        let context = CallContext::new("test").with_timeout(Duration::from_secs(60));
        self.link
            .query_blocking(&context, query(vec![item(1, rows, 9, 64), item(2, 1, 9, 64)]))?
            .wait_blocking()
    }

    #[track_caller]
    fn ask_well(&self, rows: usize) {
        let answer = self.ask(rows).unwrap();
        let asked = [item(1, rows, 9, 64), item(2, 1, 9, 64)];
        let wanted: Vec<_> = [(0, 0), (0, 1), (1, 0), (1, 1)]
            .map(|(item, stripe)| StripePartial {
                item,
                stripe,
                partial: expected_of(&asked[item as usize], stripe),
            })
            .into();
        assert_eq!(answer, wanted);
    }

    /// Waits until so many messages came to the shard.
    fn until_asked(&self, messages: usize) {
        while self.shard.asked.load(Ordering::SeqCst) < messages {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[track_caller]
    fn ask_badly(&self, code: Code) {
        assert_eq!(self.ask(3).unwrap_err().code, code);
    }
}

#[test]
fn answers_reach_their_queries_however_they_are_cut_and_ordered() {
    let bench = bench(Scripted { together: 4, ..Scripted::default() }, 16);
    bench.ask_well(1500);
    assert!(bench.shard.asked.load(Ordering::SeqCst) >= 4);
    bench.ask_well(1);
    assert_eq!(bench.shard.opened.load(Ordering::SeqCst), 1);
}

#[test]
fn more_messages_than_slots_go_one_after_the_other() {
    bench(Scripted::default(), 1).ask_well(3000);
}

#[test]
fn many_threads_share_one_stream() {
    let bench = bench(Scripted::default(), 3);
    std::thread::scope(|scope| {
        for rows in 1..9 {
            let bench = &bench;
            scope.spawn(move || (0..20).for_each(|round| bench.ask_well(rows * 40 + round)));
        }
    });
    assert_eq!(bench.shard.opened.load(Ordering::SeqCst), 1);
}

#[test]
fn a_lost_stream_is_unavailable_and_opened_again() {
    for act in [Act::Break, Act::End] {
        let bench = bench(Scripted::with(&[Act::Answer, act]), 4);
        bench.ask_well(2);
        bench.ask_badly(Code::Unavailable);
        bench.ask_well(2);
        assert_eq!(bench.shard.opened.load(Ordering::SeqCst), 2);
    }
}

#[test]
fn a_lost_stream_fails_everything_in_flight() {
    let bench = bench(Scripted::with(&[Act::Ignore, Act::Ignore, Act::Break]), 4);
    let context = CallContext::new("test");
    let ask = || bench.link.query_blocking(&context, query(vec![item(1, 1, 1, 1)])).unwrap();
    let pending = [ask(), ask(), ask()];
    for pending in pending {
        assert_eq!(pending.wait_blocking().unwrap_err().code, Code::Unavailable);
    }
}

#[test]
fn a_stream_that_cannot_be_opened_says_why() {
    let bench = bench(Scripted::default(), 4);
    *bench.shard.refuse_to_open.lock().unwrap() =
        Some(Error::new(Code::FailedPrecondition, "another deployment"));
    bench.ask_badly(Code::FailedPrecondition);
    *bench.shard.refuse_to_open.lock().unwrap() = None;
    bench.ask_well(1);
}

#[test]
fn one_failed_query_harms_no_other() {
    let bench = bench(Scripted::with(&[Act::Fail(Code::NotFound), Act::Misshapen]), 4);
    bench.ask_badly(Code::NotFound);
    bench.ask_badly(Code::DataLoss);
    bench.ask_well(5);
    assert_eq!(bench.shard.opened.load(Ordering::SeqCst), 1);
}

#[test]
fn deadline_and_cancellation_end_the_wait() {
    let bench = bench(Scripted::with(&[Act::Ignore, Act::Ignore]), 4);
    let hurried = CallContext::new("test").with_timeout(Duration::from_millis(200));
    // On a busy machine the time may be over before it waits.
    let late = bench.link.query_blocking(&hurried, query(vec![item(1, 1, 1, 1)]));
    assert_eq!(late.and_then(PendingAttend::wait_blocking).unwrap_err().code, Code::DeadlineExceeded);
    let cancelled = CallContext::new("test");
    let pending = bench.link.query_blocking(&cancelled, query(vec![item(1, 1, 1, 1)])).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(50));
            cancelled.cancel.cancel();
        });
        assert_eq!(pending.wait_blocking().unwrap_err().code, Code::Cancelled);
    });
    // A query whose caller left before it was sent never is: then what the shard is to do comes to the next one.
    bench.shard.script.lock().unwrap().clear();
    bench.ask_well(1);
}

#[test]
fn a_full_link_blocks_until_the_deadline_and_abandoned_slots_come_back() {
    let bench = bench(Scripted::with(&[Act::Ignore]), 1);
    let patient = CallContext::new("test");
    let stuck = bench.link.query_blocking(&patient, query(vec![item(1, 1, 1, 1)])).unwrap();
    // One that is given up before it is sent never is, and one that lies in the shard's queue leaves no room there.
    bench.until_asked(1);
    let hurried = CallContext::new("test").with_timeout(Duration::from_millis(50));
    let refused = bench.link.query_blocking(&hurried, query(vec![item(1, 1, 1, 1)]));
    assert_eq!(refused.unwrap_err().code, Code::DeadlineExceeded);
    drop(stuck);
    bench.ask_well(1);
}

#[test]
fn the_task_ends_with_the_last_clone() {
    let Bench { link, shard, tasks, runtime } = bench(Scripted::default(), 4);
    let clone = link.clone();
    drop(link);
    clone
        .query_blocking(&CallContext::new("test"), query(vec![item(1, 1, 1, 1)]))
        .unwrap()
        .wait_blocking()
        .unwrap();
    drop(clone);
    tasks.close();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), tasks.wait()).await }).unwrap();
    assert_eq!(shard.opened.load(Ordering::SeqCst), 1);
}

#[test]
fn an_empty_query_has_an_empty_answer() {
    let bench = bench(Scripted::default(), 1);
    let pending = bench.link.query_blocking(&CallContext::new("test"), query(Vec::new())).unwrap();
    assert_eq!(pending.wait_blocking().unwrap(), []);
    assert_eq!(bench.shard.opened.load(Ordering::SeqCst), 0);
}
