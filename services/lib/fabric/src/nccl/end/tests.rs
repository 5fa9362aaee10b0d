//! The thread of an end with a lane that does as it is told: what is left, what failed, what hangs.

use std::sync::{Mutex, PoisonError, mpsc};

use tokio::sync::Semaphore;

use super::*;

const LONG: Duration = Duration::from_secs(60);

/// What a lane was asked, and what comes of its exchanges.
#[derive(Debug, Clone, Default)]
struct Script(Arc<Mutex<Told>>);

#[derive(Debug, Default)]
struct Told {
    calls: Vec<String>,
    fails: bool,
    waits: bool,
    /// Held by a driver that asks nobody.
    hangs: Option<mpsc::Receiver<()>>,
}

impl Script {
    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn calls(&self) -> Vec<String> {
        self.told().calls.clone()
    }

    fn run(&self, call: String, go_on: &mut dyn FnMut() -> bool) -> Result<(), Error> {
        let (fails, waits, hangs) = {
            let mut told = self.told();
            told.calls.push(call);
            (told.fails, told.waits, told.hangs.take())
        };
        if let Some(until) = hangs {
            let _ended = until.recv();
        }
        if waits {
            while go_on() {}
            return Err(over("was left"));
        }
        if fails { Err(over("failed")) } else { Ok(()) }
    }
}

impl GpuLane for Script {
    fn invite(&mut self, _: u64) -> Result<GpuInvitation, Error> {
        let epoch = self.calls().len() as u64 + 1;
        Ok(GpuInvitation { incarnation: 5, epoch, unique_id: [1; 128] })
    }

    fn accept(
        &mut self,
        invitation: &GpuInvitation,
        _: u64,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        self.run(format!("accept {}", invitation.epoch), go_on)
    }

    fn send(
        &mut self,
        epoch: u64,
        body: &[Bytes],
        _: u64,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        self.run(format!("send {epoch} {}", body.len()), go_on)
    }

    fn receive(
        &mut self,
        epoch: u64,
        into: &mut [u8],
        _: u64,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        into.fill(9);
        self.run(format!("receive {epoch} {}", into.len()), go_on)
    }

    fn end(&mut self, epoch: u64, _: u64) {
        self.told().calls.push(format!("end {epoch}"));
    }
}

fn invitation(incarnation: u64, epoch: u64) -> GpuInvitation {
    GpuInvitation { incarnation, epoch, unique_id: [1; 128] }
}

async fn joined(script: &Script, epoch: u64) -> End {
    let end = End::start(Box::new(script.clone()), LONG, ()).unwrap();
    end.accept(invitation(1, epoch), LONG).unwrap();
    end.joined(epoch, LONG).await.unwrap();
    end
}

/// Waits for what another thread is to do.
async fn until(what: impl Fn() -> bool) {
    while !what() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn bodies_go_in_an_epoch_that_is_joined() {
    let script = Script::default();
    let end = joined(&script, 3).await;
    end.send(3, vec![Bytes::from_static(b"ab"); 2], LONG).unwrap().await.unwrap();
    let (room, crc) = end.receive(3, Box::new(vec![0; 4]), LONG).unwrap().await.unwrap();
    assert_eq!(((*room).as_ref(), crc), (&[9; 4][..], crc32c(&[9; 4])));
    assert_eq!(script.calls(), ["accept 3", "send 3 2", "receive 3 4"]);
    assert_eq!(end.state(), State::Joined(3));
}

#[tokio::test]
async fn what_is_ended_is_left_at_once_and_the_lane_is_told() {
    let script = Script::default();
    let end = joined(&script, 3).await;
    script.told().waits = true;
    let (first, second) =
        (end.send(3, Vec::new(), LONG).unwrap(), end.send(3, vec![Bytes::new()], LONG).unwrap());
    until(|| script.calls().len() == 2).await;
    end.end(2);
    assert_eq!(end.state(), State::Joined(3), "another epoch");
    end.end(3);
    assert_eq!(end.state(), State::Over(3));
    for waiting in [first, second] {
        let error = waiting.await.unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), (Code::Unavailable, Some("nccl")), "{error}");
    }
    until(|| script.calls().iter().any(|call| call == "end 3")).await;
    assert!(!script.calls().contains(&"send 3 1".to_owned()), "it never began");
    assert!(end.joined(3, LONG).await.is_err());
}

#[tokio::test]
async fn what_failed_by_itself_is_not_told_as_left() {
    let script = Script::default();
    let end = joined(&script, 3).await;
    script.told().fails = true;
    end.send(3, Vec::new(), LONG).unwrap().await.unwrap_err();
    until(|| end.state() == State::Over(3)).await;
    end.send(3, Vec::new(), LONG).unwrap().await.unwrap_err();
    assert_eq!(script.calls(), ["accept 3", "send 3 0"], "nothing more of that epoch");
    // Who was started anew counts anew, and its first epoch is none that is over.
    script.told().fails = false;
    end.accept(invitation(2, 1), LONG).unwrap();
    end.joined(1, LONG).await.unwrap();
    end.send(1, Vec::new(), LONG).unwrap().await.unwrap();
    assert_eq!(script.calls()[2..], ["accept 1", "send 1 0"]);
}

#[tokio::test]
async fn who_takes_too_long_is_left() {
    let script = Script::default();
    let end = joined(&script, 1).await;
    script.told().waits = true;
    end.send(1, Vec::new(), Duration::from_millis(20)).unwrap().await.unwrap_err();
    until(|| end.state() == State::Over(1)).await;
    end.accept(invitation(1, 2), Duration::from_millis(20)).unwrap();
    end.joined(2, LONG).await.unwrap_err();
    assert_eq!(end.state(), State::Over(2));
}

#[tokio::test]
async fn an_epoch_without_work_is_left() {
    let script = Script::default();
    let end = End::start(Box::new(script.clone()), Duration::from_millis(30), ()).unwrap();
    end.accept(invitation(1, 1), LONG).unwrap();
    until(|| end.state() == State::Over(1)).await;
    until(|| script.calls().iter().any(|call| call == "end 1")).await;
}

#[tokio::test]
async fn an_invitation_that_nobody_hears_of_is_not_joined() {
    let script = Script::default();
    let end = End::start(Box::new(script.clone()), LONG, ()).unwrap();
    let heard = end.convene(LONG).await.unwrap();
    assert_eq!((heard.epoch, heard.incarnation), (1, 5));
    end.joined(1, LONG).await.unwrap();
    // Its thread is busy when the next one is asked for; whoever asked is gone when it is not any more.
    let (busy, until_then) = mpsc::sync_channel(1);
    script.told().hangs = Some(until_then);
    let sent = end.send(1, Vec::new(), LONG).unwrap();
    until(|| script.calls().len() == 2).await;
    let unheard = tokio::time::timeout(Duration::from_millis(20), end.convene(LONG)).await;
    assert!(unheard.is_err());
    // The epoch was left for the next one; who asks after the thread is free may hear that the body went.
    sent.await.unwrap_err();
    busy.send(()).unwrap();
    until(|| matches!(end.state(), State::Over(epoch) if epoch > 1)).await;
    assert_eq!(script.calls().iter().filter(|call| call.starts_with("accept")).count(), 1);
}

/// Who waits for a body is told of the end of its epoch, though the thread hangs in a driver and cannot tell.
#[tokio::test]
async fn nobody_waits_for_a_driver_once_the_epoch_is_over() {
    let script = Script::default();
    let end = joined(&script, 1).await;
    let (driver, until_then) = mpsc::sync_channel(1);
    script.told().hangs = Some(until_then);
    let sent = end.send(1, Vec::new(), LONG).unwrap();
    let received = end.receive(1, Box::new(vec![0; 4]), LONG).unwrap();
    until(|| script.calls().len() == 2).await;
    end.end(1);
    assert!(sent.await.is_err() && received.await.is_err());
    assert_eq!(script.calls().len(), 2, "the driver has it still");
    drop(driver);
    until(|| script.calls().contains(&"end 1".to_owned())).await;
}

/// A thread that a driver does not give back keeps its place, and nobody else is kept.
#[tokio::test]
async fn a_thread_that_hangs_keeps_its_place() {
    let script = Script::default();
    let places = Arc::new(Semaphore::new(1));
    let place = Arc::clone(&places).try_acquire_owned().unwrap();
    let end = End::start(Box::new(script.clone()), LONG, place).unwrap();
    end.accept(invitation(1, 1), LONG).unwrap();
    end.joined(1, LONG).await.unwrap();
    let (driver, until_then) = mpsc::sync_channel(1);
    script.told().hangs = Some(until_then);
    let _sent = end.send(1, Vec::new(), LONG).unwrap();
    until(|| script.calls().len() == 2).await;
    drop(end);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(places.available_permits(), 0);
    drop(driver);
    until(|| places.available_permits() == 1).await;
}

#[tokio::test]
async fn work_is_bounded() {
    let script = Script::default();
    let end = joined(&script, 1).await;
    script.told().waits = true;
    let mut waiting: Vec<_> = Vec::new();
    let refused = loop {
        match end.send(1, Vec::new(), LONG) {
            Ok(sent) => waiting.push(sent),
            Err(error) => break error,
        }
        assert!(waiting.len() <= JOBS_MAX + 1);
    };
    assert_eq!(refused.code, Code::ResourceExhausted, "{refused}");
    end.end(1);
    for sent in waiting {
        sent.await.unwrap_err();
    }
}
