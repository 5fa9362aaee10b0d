//! The client's ends of the lane `nccl` to one peer: joined on the side when a call needs one, kept for the next call, few.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use longshore_proto::{
    types::{NcclEpoch, NcclInvitation, NcclLease},
    v1::{self, kv_store_service_client::KvStoreServiceClient},
};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout},
};
use tonic::transport::Channel;

use super::{
    GrpcOptions,
    call::{request, unary},
    dial::Pause,
    leased::{Leased, Way},
};
use crate::{
    CallContext, Code, Error, TcpPatience,
    nccl::{Arrivals, Bodies, End, GpuEnd, GpuInvitation, GpuLanes, JOIN_PATIENCE, Left, State, is_of_epoch},
    tcp::{Buffers, Token},
};

/// How long an end without a call keeps its epoch: less than a shard does, so that a call finds it there too.
const IDLE: Duration = Duration::from_secs(150);

/// How often a peer is told that an epoch is over which a call left, at most.
const TELLS_MAX: usize = 5;

/// How long an end is left alone, at least, which the peer does not invite.
const REST: Duration = Duration::from_millis(100);

/// Ends of the lane to one peer.
#[derive(Debug)]
pub(super) struct Epochs {
    address: String,
    calls: KvStoreServiceClient<Channel>,
    lanes: Arc<dyn GpuLanes>,
    body_bytes_max: usize,
    patience: TcpPatience,
    places: Arc<Semaphore>,
    pool: Mutex<EpochPool>,
    buffers: Buffers,
}

#[derive(Debug, Default)]
struct EpochPool {
    /// Those that no call has, in whatever state.
    ends: Vec<ClientEnd>,
    pause: Pause,
}

/// One end.
#[derive(Debug)]
struct ClientEnd {
    secret: Token,
    end: Arc<End>,
    /// Of the epoch that it joined last; 0: none.
    incarnation: u64,
    epoch: u64,
    /// Calls that had the epoch.
    leases: u64,
    /// The peer was told that it is over, or need not be.
    told: bool,
    /// The peer invites it to no epoch until then.
    rests: Option<Instant>,
}

impl ClientEnd {
    fn name(&self) -> NcclEpoch {
        let member = *self.secret.as_bytes();
        NcclEpoch { incarnation: self.incarnation, number: self.epoch, member }
    }

    fn is(&self, wanted: impl Fn(u64) -> State) -> bool {
        self.epoch != 0 && self.end.state() == wanted(self.epoch)
    }
}

/// An epoch that a call has. Dropped, it is over.
#[derive(Debug)]
pub(super) struct Lease {
    epochs: Arc<Epochs>,
    /// Until it is given back.
    end: Option<ClientEnd>,
}

impl Lease {
    fn end(&self) -> &ClientEnd {
        self.end.as_ref().expect("it is there until it is given back")
    }

    /// What the call says of it.
    pub(super) fn wire(&self) -> v1::NcclLease {
        let end = self.end();
        NcclLease { epoch: end.name(), lease: end.leases }.into()
    }

    /// For what the call sends.
    pub(super) fn bodies(&self) -> Bodies {
        let end = self.end();
        Bodies::new(Arc::clone(&end.end), end.epoch, self.epochs.patience)
    }

    /// For what the call receives.
    pub(super) fn arrivals(&self) -> Arrivals {
        let (end, epochs) = (self.end(), &self.epochs);
        let of = (Arc::clone(&end.end), end.epoch);
        Arrivals::new(of, epochs.body_bytes_max, epochs.patience, epochs.buffers.clone())
    }

    /// Of the shard that convened it.
    pub(super) fn incarnation(&self) -> u64 {
        self.end().incarnation
    }

    /// Leaves the epoch while the call goes on, and gives what tells the peer of it: no end of the call does. A peer that hears nothing
    /// waits for its next bodies to be taken, as long as its own deadlines say.
    pub(super) fn leave(self, ctx: &CallContext) -> impl Future<Output = ()> + Send + 'static {
        let (name, epochs, ctx) = (self.end().name(), Arc::clone(&self.epochs), ctx.clone());
        drop(self);
        async move {
            for _ in 0..TELLS_MAX {
                // Only what took too long is said again.
                if epochs.tell_end(&ctx, name).await {
                    return;
                }
            }
            tracing::debug!(address = epochs.address, "a shard was not told that an epoch is over");
        }
    }

    /// Tells whether it is joined still.
    pub(super) fn pulse(&self) -> Pulse {
        let end = self.end();
        Pulse { end: Arc::clone(&end.end), epoch: end.epoch }
    }
}

/// Whether an epoch is joined, as far as this side knows; keeps nothing of it.
#[derive(Debug, Clone)]
pub(super) struct Pulse {
    end: Arc<End>,
    epoch: u64,
}

impl Pulse {
    pub(super) fn is_joined(&self) -> bool {
        self.end.state() == State::Joined(self.epoch)
    }

    /// Waits until it is over.
    pub(super) fn left(&self) -> Left {
        self.end.left(self.epoch)
    }
}

impl Leased for Lease {
    type Way = Epochs;

    fn way(&self) -> Arc<Epochs> {
        Arc::clone(&self.epochs)
    }

    fn give_back(mut self) {
        if let Some(end) = self.end.take() {
            let mut pool = self.epochs.pool();
            pool.ends.push(end);
            pool.pause.succeeded();
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(end) = self.end.take() {
            end.end.end(end.epoch);
            // The peer finds out by the end of the call; of one that goes on `leave` tells it.
            self.epochs.pool().ends.push(ClientEnd { told: true, ..end });
        }
    }
}

impl Epochs {
    pub(super) fn new(
        address: &str,
        calls: KvStoreServiceClient<Channel>,
        lanes: Arc<dyn GpuLanes>,
        (ends_max, options): (usize, &GrpcOptions),
    ) -> Self {
        Self {
            address: address.to_owned(),
            calls,
            lanes,
            body_bytes_max: options.message_bytes_max,
            patience: options.tcp_patience,
            places: Arc::new(Semaphore::new(ends_max)),
            pool: Mutex::default(),
            buffers: Buffers::default(),
        }
    }

    fn pool(&self) -> MutexGuard<'_, EpochPool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An epoch for a call. Where there is none that is joined, one begins to be joined for later calls, which this one does not wait for
    /// unless `waits`.
    pub(super) async fn lease(self: &Arc<Self>, ctx: &CallContext, waits: bool) -> Result<Lease, Error> {
        self.note_ends(ctx).await;
        if let Some(end) = self.take(|end| end.is(State::Joined)) {
            return Ok(self.give(end));
        }
        let joining = match self.take(|end| end.is(State::Joining)) {
            // Another call began it.
            Some(end) => end,
            None => self.begin(ctx).await?,
        };
        let (end, epoch) = (Arc::clone(&joining.end), joining.epoch);
        if !waits {
            self.pool().ends.push(joining);
            return Err(unavailable(&self.address, "an epoch is being joined"));
        }
        let lease = self.give(joining);
        end.joined(epoch, JOIN_PATIENCE).await?;
        Ok(lease)
    }

    /// Takes an end that no call has.
    fn take(&self, wanted: impl Fn(&ClientEnd) -> bool) -> Option<ClientEnd> {
        let mut pool = self.pool();
        let at = pool.ends.iter().rposition(wanted)?;
        Some(pool.ends.swap_remove(at))
    }

    fn give(self: &Arc<Self>, mut end: ClientEnd) -> Lease {
        end.leases += 1;
        Lease { epochs: Arc::clone(self), end: Some(end) }
    }

    /// Notes which epochs could not be joined or were left idle since, and tells the peer.
    async fn note_ends(&self, ctx: &CallContext) {
        let over: Vec<_> = {
            let mut pool = self.pool();
            let over = |end: &&mut ClientEnd| !end.told && matches!(end.end.state(), State::Over(_));
            let names = pool.ends.iter_mut().filter(over).map(|end| {
                end.told = true;
                // A call never had it.
                (end.name(), end.leases == 0)
            });
            let names: Vec<_> = names.collect();
            if names.iter().any(|(_, was_never_joined)| *was_never_joined) {
                pool.pause.failed(Instant::now());
            }
            names
        };
        for (epoch, was_never_joined) in over {
            if was_never_joined {
                tracing::warn!(
                    address = self.address,
                    "no nccl lane: an epoch was not joined; tiles go another way"
                );
            }
            // A peer that cannot be told finds out by its own deadlines.
            let _told = self.tell_end(ctx, epoch).await;
        }
    }

    /// Tells the peer that an epoch is over; whether it answered, or cannot, in time.
    async fn tell_end(&self, ctx: &CallContext, epoch: NcclEpoch) -> bool {
        let mut calls = self.calls.clone();
        let Ok(told) = request(ctx, v1::EndNcclEpochRequest { epoch: Some(epoch.into()) }) else {
            return true;
        };
        timeout(self.patience.hello, unary(ctx, calls.end_nccl_epoch(told))).await.is_ok()
    }

    /// An end that begins to join the next epoch.
    async fn begin(&self, ctx: &CallContext) -> Result<ClientEnd, Error> {
        if self.pool().pause.holds(Instant::now()) {
            return Err(unavailable(&self.address, "it failed lately"));
        }
        loop {
            let now = Instant::now();
            let is_free = |end: &ClientEnd| {
                let rests = end.rests.is_some_and(|until| now < until);
                matches!(end.end.state(), State::Apart | State::Over(_)) && !rests
            };
            let end = match self.take(is_free) {
                Some(end) => end,
                None => self.fresh()?,
            };
            let asked = timeout(self.patience.hello, self.ask(ctx, &end)).await;
            let error = match asked {
                Ok(Ok(invitation)) => return self.joining(end, &invitation),
                Ok(Err(error)) => error,
                Err(_) => unavailable(&self.address, "the handshake took too long"),
            };
            let rests = is_of_epoch(&error).then(|| now + error.retry_after.unwrap_or(REST).max(REST));
            self.pool().ends.push(ClientEnd { told: true, rests, ..end });
            // An end that rests after a failure says nothing of the others.
            if rests.is_none() {
                self.not_invited(ctx, &error);
                return Err(error);
            }
        }
    }

    /// A call that keeps its epoch had use of it.
    pub(super) fn succeeded(&self) {
        self.pool().pause.succeeded();
    }

    /// How long the lane is left alone after the last failure, from then on; zero where it worked since.
    pub(super) fn rest(&self) -> Duration {
        self.pool().pause.last()
    }

    /// An end that is in no epoch.
    fn fresh(&self) -> Result<ClientEnd, Error> {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            return Err(unavailable(&self.address, "all its ends are in use"));
        };
        let started = End::start(self.lanes.lane(GpuEnd::Client), IDLE, place);
        let end = started.map_err(|error| unavailable(&self.address, &format!("no thread: {error}")))?;
        let secret = Token::fresh()?;
        Ok(ClientEnd {
            secret,
            end: Arc::new(end),
            incarnation: 0,
            epoch: 0,
            leases: 0,
            told: true,
            rests: None,
        })
    }

    async fn ask(&self, ctx: &CallContext, end: &ClientEnd) -> Result<NcclInvitation, Error> {
        let member = bytes::Bytes::copy_from_slice(end.secret.as_bytes());
        let asked = request(ctx, v1::JoinNcclEpochRequest { member })?;
        let mut calls = self.calls.clone();
        let answer = unary(ctx, calls.join_nccl_epoch(asked)).await?;
        NcclInvitation::try_from(answer).map_err(|fault| Error::bad_answer(&fault))
    }

    fn joining(&self, end: ClientEnd, invitation: &NcclInvitation) -> Result<ClientEnd, Error> {
        let NcclInvitation { incarnation, number: epoch, unique_id } = *invitation;
        // What a thread that is gone had is gone with it.
        end.end.accept(GpuInvitation { incarnation, epoch, unique_id }, JOIN_PATIENCE)?;
        Ok(ClientEnd { incarnation, epoch, leases: 0, told: false, ..end })
    }

    fn not_invited(&self, ctx: &CallContext, error: &Error) {
        // Where it is not offered there is nothing to tell.
        if error.code != Code::Unimplemented && !ctx.cancel.is_cancelled() {
            tracing::warn!(address = self.address, %error, "no nccl lane: tiles go another way");
        }
        match error.code {
            // The caller has no time for it; nothing is known of the lane.
            Code::Cancelled | Code::DeadlineExceeded => {}
            Code::ResourceExhausted => self.pool().pause.busy(Instant::now(), error.retry_after),
            _ => self.failed(),
        }
    }
}

impl Way for Epochs {
    fn failed(&self) {
        let mut pool = self.pool();
        pool.pause.failed(Instant::now());
        end_all(&mut pool);
    }

    /// Others have to be joined.
    fn forget(&self) {
        end_all(&mut self.pool());
    }

    fn is_at_fault(error: &Error) -> bool {
        is_of_epoch(error)
    }
}

fn end_all(pool: &mut EpochPool) {
    for end in &mut pool.ends {
        end.end.end_now();
        end.told = true;
    }
}

fn unavailable(address: &str, why: &str) -> Error {
    Error::new(Code::Unavailable, format!("no nccl lane to `{address}`: {why}"))
}
