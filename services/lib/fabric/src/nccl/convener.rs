//! The shard's ends of the lane: epochs handed out over gRPC, each leased to one call at a time. Time is an argument.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use longshore_proto::{
    types::{NcclEpoch, NcclInvitation, NcclLease},
    v1,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use super::{Arrivals, Bodies, End, GpuEnd, GpuLanes, JOIN_PATIENCE, Left, State, over};
use crate::{
    Code, Error, TcpPatience,
    tcp::{Buffers, Token},
};

/// How long an end without a call keeps its epoch, and a member its end.
const IDLE: Duration = Duration::from_secs(300);
/// When a refused invitation may be asked for again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// All ends of a listener.
#[derive(Debug)]
pub(crate) struct Convener {
    lanes: Arc<dyn GpuLanes>,
    /// No other start of this process has it.
    incarnation: u64,
    members_max: usize,
    patience: TcpPatience,
    /// Of the threads.
    places: Arc<Semaphore>,
    /// Of attend streams, which keep their epochs: half of all, so that calls with tiles find some.
    streams: Arc<Semaphore>,
    members: Mutex<Vec<Member>>,
}

/// A client's end, as this side knows it.
#[derive(Debug)]
struct Member {
    secret: Token,
    end: Arc<End>,
    /// The last epoch that it was invited to; 0: none yet.
    epoch: u64,
    /// Calls up to this one had the epoch.
    lease: u64,
    leased: bool,
    since: Instant,
    _counted: Counted,
}

impl Member {
    /// A call has its epoch, which is not over.
    fn is_in_use(&self) -> bool {
        self.leased && !matches!(self.end.state(), State::Over(_))
    }
}

/// One member of its peer's.
#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// No such lane here.
pub(crate) fn not_offered() -> Error {
    Error::new(Code::Unimplemented, "there is no lane `nccl` here; hint: send tiles another way")
}

impl Convener {
    /// Of a shard that was started now.
    pub(crate) fn new(
        lanes: Arc<dyn GpuLanes>,
        members_max: usize,
        patience: TcpPatience,
    ) -> Result<Self, Error> {
        let [a, b, c, d, e, f, g, h, ..] = *Token::fresh()?.as_bytes();
        let incarnation = u64::from_le_bytes([a, b, c, d, e, f, g, h]).max(1);
        let places = Arc::new(Semaphore::new(members_max));
        let streams = Arc::new(Semaphore::new((members_max / 2).max(1)));
        Ok(Self { lanes, incarnation, members_max, patience, places, streams, members: Mutex::default() })
    }

    fn members(&self) -> MutexGuard<'_, Vec<Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Members that one gRPC connection may be.
    fn of_peer_max(&self) -> usize {
        (self.members_max / 2).max(1)
    }

    /// Invites whoever asks over the gRPC connection that counts in `peer` to an epoch, which this side begins to join.
    pub(crate) async fn invite(
        &self,
        peer: &Arc<AtomicUsize>,
        request: &v1::JoinNcclEpochRequest,
        now: Instant,
    ) -> Result<v1::JoinNcclEpochResponse, Error> {
        let secret = Token::from_slice(&request.checked_member()?).expect("as long as one");
        let end = self.end_of(&secret, peer, now)?;
        let invitation = end.convene(JOIN_PATIENCE).await?;
        let number = invitation.epoch;
        let mut members = self.members();
        let known = members.iter_mut().find(|member| Arc::ptr_eq(&member.end, &end));
        // Another invitation may have overtaken this one.
        let Some(member) = known.filter(|member| member.epoch < number) else {
            end.end(number);
            return Err(over("was forgotten while it was joined"));
        };
        (member.epoch, member.lease, member.leased, member.since) = (number, 0, false, now);
        let unique_id = invitation.unique_id;
        Ok(NcclInvitation { incarnation: self.incarnation, number, unique_id }.into())
    }

    /// The end of a member, which is started where there is none.
    fn end_of(&self, secret: &Token, peer: &Arc<AtomicUsize>, now: Instant) -> Result<Arc<End>, Error> {
        let full = |who: &str, limit: usize| {
            let text = format!(
                "{who} has {limit} members of epochs of the lane `nccl`, which is the limit; hint: send tiles another way"
            );
            Error::new(Code::ResourceExhausted, text).with_retry_after(RETRY_AFTER)
        };
        let mut members = self.members();
        if let Some(known) = members.iter_mut().find(|member| member.secret.matches(secret)) {
            known.since = now;
            return Ok(Arc::clone(&known.end));
        }
        members.retain(|member| member.is_in_use() || now.duration_since(member.since) <= IDLE);
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            return Err(full("the listener", self.members_max));
        };
        let counted = Counted(Arc::clone(peer));
        if peer.fetch_add(1, Ordering::AcqRel) >= self.of_peer_max() {
            return Err(full("the peer", self.of_peer_max()));
        }
        let lane = self.lanes.lane(GpuEnd::Shard { incarnation: self.incarnation });
        let end = End::start(lane, IDLE, place).map_err(|error| {
            Error::new(Code::ResourceExhausted, format!("no thread for an end of the lane `nccl`: {error}"))
        })?;
        let end = Arc::new(end);
        members.push(Member {
            secret: *secret,
            end: Arc::clone(&end),
            epoch: 0,
            lease: 0,
            leased: false,
            since: now,
            _counted: counted,
        });
        Ok(end)
    }

    /// Gives the epoch that a call names to the call, as soon as it is joined.
    pub(crate) async fn lease(
        self: &Arc<Self>,
        NcclLease { epoch, lease }: NcclLease,
    ) -> Result<Held, Error> {
        let held = self.taken(epoch, lease)?;
        held.end.joined(epoch.number, JOIN_PATIENCE).await?;
        Ok(held)
    }

    /// The same for an attend stream, which keeps it until it is over. Where too many have one, the end of this one makes room for others.
    pub(crate) async fn lease_for_stream(self: &Arc<Self>, lease: NcclLease) -> Result<Held, Error> {
        let Ok(place) = Arc::clone(&self.streams).try_acquire_owned() else {
            self.forget(lease.epoch);
            return Err(over("is of an attend stream, of which there are as many as may have one"));
        };
        let mut held = self.lease(lease).await?;
        held.of_stream = Some(place);
        Ok(held)
    }

    /// Drops the end of a member whose epoch no call has.
    fn forget(&self, epoch: NcclEpoch) {
        let secret = Token::from_slice(&epoch.member).expect("as long as one");
        let is_it = |member: &Member| {
            member.secret.matches(&secret) && member.epoch == epoch.number && !member.leased
        };
        if self.check_incarnation(epoch).is_ok() {
            self.members().retain(|member| !is_it(member));
        }
    }

    fn taken(self: &Arc<Self>, epoch: NcclEpoch, lease: u64) -> Result<Held, Error> {
        // Before anything else: numbers and members of another start mean nothing.
        self.check_incarnation(epoch)?;
        let secret = Token::from_slice(&epoch.member).expect("as long as one");
        let mut members = self.members();
        let known = members.iter_mut().find(|member| member.secret.matches(&secret));
        let Some(member) = known.filter(|member| member.epoch == epoch.number) else {
            return Err(over(format!("of number {} is not known: it is over, or never was", epoch.number)));
        };
        if let State::Over(_) | State::Apart = member.end.state() {
            return Err(over(format!("of number {} is over", epoch.number)));
        }
        if member.leased {
            return Err(over("has another call"));
        }
        if lease <= member.lease {
            let problem = format!("is {lease}, must be more than {}", member.lease);
            return Err(Error::invalid("nccl.lease", problem));
        }
        (member.leased, member.lease) = (true, lease);
        Ok(Held {
            convener: Arc::clone(self),
            end: Arc::clone(&member.end),
            secret,
            epoch: epoch.number,
            lease,
            finished: false,
            kept: Arc::default(),
            of_stream: None,
        })
    }

    fn check_incarnation(&self, epoch: NcclEpoch) -> Result<(), Error> {
        match epoch.incarnation == self.incarnation {
            true => Ok(()),
            false => Err(over("is of another incarnation: this shard was started anew since")),
        }
    }

    /// Ends an epoch for its client; whether it was that one's.
    pub(crate) fn end(&self, request: v1::EndNcclEpochRequest) -> Result<bool, Error> {
        let epoch = request.epoch.ok_or_else(|| Error::invalid("epoch", "is missing"))?;
        let epoch = NcclEpoch::try_from(epoch).map_err(|fault| fault.within("epoch"))?;
        if self.check_incarnation(epoch).is_err() {
            return Ok(false);
        }
        let secret = Token::from_slice(&epoch.member).expect("as long as one");
        let members = self.members();
        let known = members.iter().find(|member| member.secret.matches(&secret));
        let Some(member) = known.filter(|member| member.epoch == epoch.number) else { return Ok(false) };
        let was_in = matches!(member.end.state(), State::Joining(_) | State::Joined(_));
        member.end.end(epoch.number);
        Ok(was_in)
    }
}

/// An epoch that a call has. It stays when the call sent or received its last body, and is over otherwise.
#[derive(Debug)]
pub(crate) struct Held {
    convener: Arc<Convener>,
    end: Arc<End>,
    secret: Token,
    epoch: u64,
    lease: u64,
    finished: bool,
    kept: Arc<AtomicBool>,
    of_stream: Option<OwnedSemaphorePermit>,
}

impl Held {
    /// For what the call sends.
    pub(crate) fn bodies(&self) -> Bodies {
        Bodies::new(Arc::clone(&self.end), self.epoch, self.convener.patience)
    }

    /// For what the call receives.
    pub(crate) fn arrivals(&self, bytes_max: usize, buffers: Buffers) -> Arrivals {
        Arrivals::new((Arc::clone(&self.end), self.epoch), bytes_max, self.convener.patience, buffers)
    }

    /// Waits until it is over.
    pub(crate) fn left(&self) -> Left {
        self.end.left(self.epoch)
    }

    /// All bodies of the call went.
    pub(crate) fn finish(&mut self) {
        self.finished = true;
    }

    /// Tells, once this is dropped, whether the epoch was kept.
    pub(crate) fn kept(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.kept)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.finished {
            self.end.end(self.epoch);
        }
        let mut members = self.convener.members();
        let known = members.iter_mut().find(|member| member.secret.matches(&self.secret));
        if let Some(member) = known.filter(|member| (member.epoch, member.lease) == (self.epoch, self.lease))
        {
            (member.leased, member.since) = (false, Instant::now());
        }
        self.kept.store(self.end.state() == State::Joined(self.epoch), Ordering::Release);
    }
}

#[cfg(test)]
mod tests;
