//! The thread of one end of the lane. Tasks give it work and wait for that; it alone touches the [`GpuLane`].

use std::{
    fmt, io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    task::{Context, Poll},
    thread::Thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use longshore_blocks::crc32c;
use longshore_proto::types::TileRoom;
use tokio::{
    sync::{oneshot, watch},
    time::Sleep,
};

use super::{GpuInvitation, GpuLane, over};
use crate::{Code, Error};

/// Work that may wait: one call has an end at a time, with a few bodies under way. What was left of calls before takes no time.
const JOBS_MAX: usize = 16;
/// Bodies that a call may send at a time; it receives one at a time.
pub(super) const SENDS_MAX: usize = 4;
/// Looks at what is under way that give the processor to others only, and the pause between later ones.
const SPIN_LOOKS: u32 = 64;
const LOOK_EVERY: Duration = Duration::from_micros(50);
/// How long a task waits for a thread beyond what that may take: then the thread hangs in a driver, and is left there.
const HANG_PATIENCE: Duration = Duration::from_secs(10);

/// Where an end stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// In no epoch yet.
    Apart,
    /// Waiting for the peer.
    Joining(u64),
    /// Bodies may go.
    Joined(u64),
    /// The last epoch is over.
    Over(u64),
}

/// One end of the lane. When it is dropped its thread ends, and with it the epoch.
#[derive(Debug)]
pub(crate) struct End {
    jobs: SyncSender<Job>,
    shared: Arc<Shared>,
    thread: Thread,
}

#[derive(Debug)]
struct Shared {
    state: watch::Sender<State>,
    /// Epochs up to this one are over.
    ended: AtomicU64,
    /// Nobody wants the end any more.
    dropped: AtomicBool,
}

enum Job {
    Convene {
        patience: Duration,
        answer: oneshot::Sender<Result<GpuInvitation, Error>>,
    },
    Accept {
        invitation: GpuInvitation,
        patience: Duration,
    },
    Send {
        epoch: u64,
        body: Vec<Bytes>,
        patience: Duration,
        answer: oneshot::Sender<Result<(), Error>>,
    },
    Receive {
        epoch: u64,
        room: Box<dyn TileRoom>,
        patience: Duration,
        answer: oneshot::Sender<Result<Landed, Error>>,
    },
    Wake,
}

/// Memory with a body in it, and the CRC-32C of what was written there.
pub(super) type Landed = (Box<dyn TileRoom>, u32);

impl End {
    /// Starts the thread, which keeps `place` for as long as it lives and leaves an epoch that had no work for `idle`.
    pub(crate) fn start(
        lane: Box<dyn GpuLane>,
        idle: Duration,
        place: impl Send + 'static,
    ) -> io::Result<Self> {
        let (jobs, work) = sync_channel(JOBS_MAX);
        let state = watch::Sender::new(State::Apart);
        let shared = Arc::new(Shared { state, ended: AtomicU64::new(0), dropped: AtomicBool::new(false) });
        let worker = Worker { lane, shared: Arc::clone(&shared), began: Instant::now(), failed: 0 };
        let running = std::thread::Builder::new().name("nccl".to_owned()).spawn(move || {
            let _place = place;
            worker.run(&work, idle);
        })?;
        // Nobody waits for its end: it may hang in a driver. Its place tells that it is there.
        Ok(Self { jobs, shared, thread: running.thread().clone() })
    }

    pub(crate) fn state(&self) -> State {
        *self.shared.state.borrow()
    }

    /// An invitation to the next epoch, which this end joins at once, for as long as `patience`.
    pub(crate) async fn convene(&self, patience: Duration) -> Result<GpuInvitation, Error> {
        self.end_now();
        let (answer, told) = oneshot::channel();
        self.give(Job::Convene { patience, answer })?;
        // Which epoch it will be is not known before it is told.
        Waiting::new(told, Box::pin(std::future::pending()), patience).await
    }

    /// Begins to join an epoch.
    pub(crate) fn accept(&self, invitation: GpuInvitation, patience: Duration) -> Result<(), Error> {
        let epoch = invitation.epoch;
        self.end_now();
        self.shared.state.send_replace(State::Joining(epoch));
        self.give(Job::Accept { invitation, patience }).inspect_err(|_| {
            self.shared.state.send_replace(State::Over(epoch));
        })
    }

    /// Waits until `epoch` is joined.
    pub(crate) async fn joined(&self, epoch: u64, patience: Duration) -> Result<(), Error> {
        let mut state = self.shared.state.subscribe();
        let settled = state.wait_for(|state| *state != State::Joining(epoch));
        let settled = tokio::time::timeout(patience + HANG_PATIENCE, settled).await;
        match settled {
            Ok(Ok(state)) if *state == State::Joined(epoch) => Ok(()),
            _ => Err(over(format!("of number {epoch} is not joined"))),
        }
    }

    /// Sends a body.
    pub(super) fn send(
        &self,
        epoch: u64,
        body: Vec<Bytes>,
        patience: Duration,
    ) -> Result<Waiting<()>, Error> {
        let (answer, told) = oneshot::channel();
        self.give(Job::Send { epoch, body, patience, answer })?;
        Ok(Waiting::new(told, self.left(epoch), patience * SENDS_MAX as u32))
    }

    /// Receives a body into all of `room`.
    pub(super) fn receive(
        &self,
        epoch: u64,
        room: Box<dyn TileRoom>,
        patience: Duration,
    ) -> Result<Waiting<Landed>, Error> {
        let (answer, told) = oneshot::channel();
        self.give(Job::Receive { epoch, room, patience, answer })?;
        Ok(Waiting::new(told, self.left(epoch), patience))
    }

    /// Waits until `epoch` is not joined, or not any more.
    pub(crate) fn left(&self, epoch: u64) -> Left {
        let mut state = self.shared.state.subscribe();
        Box::pin(async move {
            // Where nobody can tell any more, it is over too.
            let _over = state.wait_for(|state| *state != State::Joined(epoch)).await;
        })
    }

    /// Ends an epoch, whatever is under way in it.
    pub(crate) fn end(&self, epoch: u64) {
        self.shared.ended.fetch_max(epoch, Ordering::AcqRel);
        self.shared.state.send_if_modified(|state| {
            let is_it = matches!(*state, State::Joining(of) | State::Joined(of) if of == epoch);
            if is_it {
                *state = State::Over(epoch);
            }
            is_it
        });
        // Where there is no room, there is work that wakes it.
        let _woken = self.jobs.try_send(Job::Wake);
        self.thread.unpark();
    }

    /// Ends the epoch that it is in.
    pub(crate) fn end_now(&self) {
        if let State::Joining(epoch) | State::Joined(epoch) = self.state() {
            self.end(epoch);
        }
    }

    fn give(&self, job: Job) -> Result<(), Error> {
        match self.jobs.try_send(job) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => {
                let text =
                    format!("an end of the lane `nccl` has {JOBS_MAX} pieces of work, which is the limit");
                Err(Error::new(Code::ResourceExhausted, text))
            }
            Err(TrySendError::Disconnected(_)) => Err(over("has no thread any more")),
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.shared.dropped.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

/// The end of an epoch.
pub(crate) type Left = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Work of the thread that somebody waits for, as long as its epoch is joined: a thread that hangs in a driver learns of the end of an
/// epoch too late. What is dropped goes on: its epoch is to be ended.
pub(super) struct Waiting<T> {
    told: oneshot::Receiver<Result<T, Error>>,
    left: Left,
    hangs: Pin<Box<Sleep>>,
}

impl<T> Waiting<T> {
    /// `longest` is what it may take, with all that may be before it.
    fn new(told: oneshot::Receiver<Result<T, Error>>, left: Left, longest: Duration) -> Self {
        Self { told, left, hangs: Box::pin(tokio::time::sleep(longest + HANG_PATIENCE)) }
    }
}

impl<T> fmt::Debug for Waiting<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waiting")
    }
}

impl<T> Future for Waiting<T> {
    type Output = Result<T, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(told) = Pin::new(&mut self.told).poll(cx) {
            return Poll::Ready(told.unwrap_or_else(|_| Err(over("has no thread any more"))));
        }
        if self.left.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(over("was left")));
        }
        match self.hangs.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(over("hangs in a driver"))),
            Poll::Pending => Poll::Pending,
        }
    }
}

/// What the thread has.
struct Worker {
    lane: Box<dyn GpuLane>,
    shared: Arc<Shared>,
    began: Instant,
    /// The last epoch that failed by itself, which its lane knows.
    failed: u64,
}

impl Worker {
    fn run(mut self, work: &Receiver<Job>, idle: Duration) {
        loop {
            match work.recv_timeout(idle) {
                Ok(job) => self.carry_out(job),
                Err(RecvTimeoutError::Timeout) => {
                    if let State::Joined(epoch) = *self.shared.state.borrow() {
                        self.shared.ended.fetch_max(epoch, Ordering::AcqRel);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.leave_what_ended();
        }
    }

    fn now_ms(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    fn carry_out(&mut self, job: Job) {
        // Whoever asked may be gone: then nobody is told.
        match job {
            Job::Convene { patience, answer } => self.convene(patience, answer),
            Job::Accept { invitation, patience } => {
                // It may have been ended before it began.
                if *self.shared.state.borrow() == State::Joining(invitation.epoch) {
                    // Epochs are counted anew where the shard was started anew.
                    self.shared.ended.store(0, Ordering::Release);
                    self.failed = 0;
                    self.accept(&invitation, patience);
                }
            }
            Job::Send { epoch, body, patience, answer } => {
                let _gone =
                    answer.send(self.within(epoch, patience, |lane, now_ms, go_on| {
                        lane.send(epoch, &body, now_ms, go_on)
                    }));
            }
            Job::Receive { epoch, mut room, patience, answer } => {
                let received = self.within(epoch, patience, |lane, now_ms, go_on| {
                    lane.receive(epoch, (*room).as_mut(), now_ms, go_on)
                });
                let _gone = answer.send(received.map(|()| {
                    let crc32c = crc32c((*room).as_ref());
                    (room, crc32c)
                }));
            }
            Job::Wake => {}
        }
    }

    fn convene(&mut self, patience: Duration, answer: oneshot::Sender<Result<GpuInvitation, Error>>) {
        self.leave_what_ended();
        let invited = self.lane.invite(self.now_ms());
        if let Ok(invitation) = &invited {
            self.shared.state.send_replace(State::Joining(invitation.epoch));
        }
        let accepted = invited.as_ref().ok().cloned();
        let is_told = answer.send(invited).is_ok();
        let Some(invitation) = accepted else { return };
        if !is_told {
            // Nobody else would join it.
            self.shared.ended.fetch_max(invitation.epoch, Ordering::AcqRel);
            return;
        }
        self.accept(&invitation, patience);
    }

    fn accept(&mut self, invitation: &GpuInvitation, patience: Duration) {
        let epoch = invitation.epoch;
        let joined =
            self.within(epoch, patience, |lane, now_ms, go_on| lane.accept(invitation, now_ms, go_on));
        if let Err(error) = &joined {
            tracing::debug!(%error, epoch, "an epoch of the nccl lane was not joined");
            return;
        }
        let is_wanted = self.shared.state.send_if_modified(|state| {
            let is_wanted = *state == State::Joining(epoch);
            if is_wanted {
                *state = State::Joined(epoch);
            }
            is_wanted
        });
        // It was ended meanwhile.
        if !is_wanted {
            self.shared.ended.fetch_max(epoch, Ordering::AcqRel);
        }
    }

    /// Does something in an epoch, for so long at most; the epoch is over when it fails.
    fn within(
        &mut self,
        epoch: u64,
        patience: Duration,
        run: impl FnOnce(&mut dyn GpuLane, u64, &mut dyn FnMut() -> bool) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if self.shared.is_ended(epoch) {
            return Err(over(format!("of number {epoch} is over")));
        }
        let (now_ms, shared) = (self.now_ms(), Arc::clone(&self.shared));
        let (until, mut looks) = (Instant::now() + patience, 0);
        let mut go_on = move || {
            if shared.is_ended(epoch) || Instant::now() >= until {
                return false;
            }
            looks += 1;
            if looks > SPIN_LOOKS {
                std::thread::park_timeout(LOOK_EVERY)
            } else {
                std::thread::yield_now()
            }
            true
        };
        let done = run(&mut *self.lane, now_ms, &mut go_on);
        if done.is_err() && !self.shared.is_ended(epoch) {
            self.failed = epoch;
            self.shared.ended.fetch_max(epoch, Ordering::AcqRel);
        }
        done
    }

    /// Tells the lane what ended since.
    fn leave_what_ended(&mut self) {
        let ended = self.shared.ended.load(Ordering::Acquire);
        if ended == 0 {
            return;
        }
        if ended != self.failed {
            self.lane.end(ended, self.now_ms());
        }
        self.shared.state.send_if_modified(|state| {
            // A lower one is of a later incarnation, which is to be joined next.
            let is_it = matches!(*state, State::Joining(of) | State::Joined(of) if of == ended);
            if is_it {
                *state = State::Over(ended);
            }
            is_it
        });
    }
}

impl Shared {
    fn is_ended(&self, epoch: u64) -> bool {
        self.dropped.load(Ordering::Acquire) || self.ended.load(Ordering::Acquire) >= epoch
    }
}

#[cfg(test)]
mod tests;
