//! The `nccl` lane of a process: which communicator it has, whether it works, and when it may be made again.
//!
//! An **epoch** is one communicator. Whoever convenes it makes an [`Invitation`]: the next epoch, an id, and the members, whose places
//! are their ranks. It goes to the members by another way, as does the news that an epoch broke. Whatever fails in an epoch ends it, here
//! at once and at the others by the abort or by the news: bytes then go another way (`grpc`), until an invitation to a later
//! epoch has been accepted. Whoever convenes waits after every fault, longer each time; whoever is invited comes at once.
//!
//! Epochs are counted by whoever convenes them, for as long as its process lives: after a restart (another **incarnation**) they begin
//! anew, and what is of the incarnation before is refused.
//!
//! Nothing here knows a network or a clock: times are milliseconds that the caller passes in, and deadlines are its `go_on`.
#![allow(unsafe_code, reason = "passes a promise about device memory on; see SAFETY")]

use std::fmt;
use std::sync::Arc;

use super::{Communicator, Nccl, Part, UniqueId};
use crate::{CudaDevice, Error};

/// Waits after a fault, and at most.
const PAUSE_MS: u64 = 5_000;
const PAUSE_MS_MAX: u64 = 300_000;
/// How far an epoch may lie after the newest that is known: one who lies cannot use all numbers up.
const EPOCH_STEP_MAX: u64 = 1 << 20;
/// Members of an epoch.
const MEMBERS_MAX: usize = 1 << 10;

/// One rank of a communicator, as a lane uses it.
pub trait Ranks: Send + fmt::Debug {
    /// Sends and receives as one operation; returns when all of it is done.
    ///
    /// # Safety
    /// Nobody else may use the memory of `receives` meanwhile, nor write to that of `sends`.
    unsafe fn exchange(
        &mut self,
        sends: &[Part<'_>],
        receives: &[Part<'_>],
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error>;

    /// Ends everything under way, here and at the peers. Harmless when repeated.
    fn abort(&mut self);
}

impl Ranks for Communicator {
    unsafe fn exchange(
        &mut self,
        sends: &[Part<'_>],
        receives: &[Part<'_>],
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { Self::exchange(self, sends, receives, go_on) }
    }

    fn abort(&mut self) {
        Self::abort(self);
    }
}

/// Makes ids and communicators.
pub trait Convener: Send + Sync + fmt::Debug {
    /// A new id. The process must live until all ranks have joined.
    fn unique_id(&self) -> Result<UniqueId, Error>;

    /// Joins the others as a rank of so many; returns when all have joined.
    fn join(
        &self,
        id: &UniqueId,
        place: (u32, u32),
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Box<dyn Ranks>, Error>;
}

/// The library with a device.
#[derive(Debug)]
pub struct NcclConvener {
    nccl: Nccl,
    device: Arc<CudaDevice>,
}

impl NcclConvener {
    /// Communicators of `device`.
    pub fn new(nccl: Nccl, device: Arc<CudaDevice>) -> Self {
        Self { nccl, device }
    }
}

impl Convener for NcclConvener {
    fn unique_id(&self) -> Result<UniqueId, Error> {
        self.nccl.unique_id()
    }

    fn join(
        &self,
        id: &UniqueId,
        place: (u32, u32),
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Box<dyn Ranks>, Error> {
        Ok(Box::new(Communicator::join(&self.nccl, &self.device, id, place, go_on)?))
    }
}

/// To join an epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invitation {
    /// Process that convened it: a number that no other start of it has.
    pub incarnation: u64,
    /// Its number; later ones of an incarnation are larger.
    pub epoch: u64,
    /// What the members find each other by.
    pub id: UniqueId,
    /// Names of the members; the place of each is its rank.
    pub members: Vec<String>,
}

/// Where a lane stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LaneState {
    /// There never is one: no library, no device.
    Off {
        /// Why, with the remedy.
        problem: String,
    },
    /// No epoch was joined yet.
    Idle,
    /// Bytes may go this way.
    Joined {
        /// The epoch.
        epoch: u64,
    },
    /// They go another way.
    Broken {
        /// The epoch that broke, or could not be joined.
        epoch: u64,
        /// When this member may convene a later one.
        retry_at_ms: u64,
    },
}

/// The lane of one process. It belongs to one thread at a time.
#[derive(Debug)]
pub struct NcclLane {
    own: String,
    convener: Option<Arc<dyn Convener>>,
    state: LaneState,
    /// While joined.
    epoch: Option<(Invitation, Box<dyn Ranks>)>,
    /// Incarnation of what it convenes itself.
    incarnation: u64,
    /// Incarnation of `newest`, and the one that was left for it.
    of: (u64, Option<u64>),
    /// Largest epoch that was joined, or tried.
    newest: u64,
    /// Largest epoch that an invitation was made for: no two have one number.
    promised: u64,
    faults: u32,
}

impl NcclLane {
    /// The lane of the member `own`. Without what makes communicators it is off for good, and says why.
    pub fn new(own: impl Into<String>, convener: Result<Arc<dyn Convener>, Error>) -> Self {
        let (convener, state) = match convener {
            Ok(convener) => (Some(convener), LaneState::Idle),
            Err(error) => (None, LaneState::Off { problem: error.to_string() }),
        };
        Self {
            own: own.into(),
            convener,
            state,
            epoch: None,
            incarnation: 0,
            of: (0, None),
            newest: 0,
            promised: 0,
            faults: 0,
        }
    }

    /// The same of a process that convenes epochs, with a number that no other start of it has.
    pub fn of_incarnation(self, incarnation: u64) -> Self {
        Self { incarnation, of: (incarnation, None), ..self }
    }

    /// Where it stands.
    pub fn state(&self) -> &LaneState {
        &self.state
    }

    /// Rank of a member in the joined epoch; `None`: bytes to it go another way.
    pub fn rank_of(&self, member: &str) -> Option<u32> {
        let (invitation, _) = self.epoch.as_ref()?;
        invitation.members.iter().position(|other| other == member).map(|rank| rank as u32)
    }

    /// The invitation to the next epoch of `members`, of which this is one; every one of them is to be handed it, this one too. Refused
    /// before the pause after a fault is over.
    pub fn invite(&mut self, members: Vec<String>, now_ms: u64) -> Result<Invitation, Error> {
        let convener = Arc::clone(self.convener()?);
        if let LaneState::Broken { epoch, retry_at_ms } = self.state
            && now_ms < retry_at_ms
        {
            let problem = format!("epoch {epoch} broke; there is none for {} ms more", retry_at_ms - now_ms);
            return Err(Error::Communicator { call: "inviting", problem });
        }
        // Epochs that others convened count for nothing here.
        let joined = if self.of.0 == self.incarnation { self.newest } else { 0 };
        let Some(epoch) = joined.max(self.promised).checked_add(1) else {
            return invalid("epoch", "is the last that there is".to_owned());
        };
        let incarnation = self.incarnation;
        let invitation = Invitation { incarnation, epoch, id: convener.unique_id()?, members };
        self.check(&invitation)?;
        self.promised = epoch;
        Ok(invitation)
    }

    /// Joins an epoch with all its members; the one before is over with it. Refuses an epoch that is not later than all before of its
    /// incarnation, one of the incarnation before, and members that cannot be. When it cannot be joined, that epoch is broken.
    pub fn accept(
        &mut self,
        invitation: Invitation,
        now_ms: u64,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        let convener = Arc::clone(self.convener()?);
        self.check(&invitation)?;
        self.check_later(&invitation)?;
        self.leave();
        if invitation.incarnation != self.of.0 {
            self.of = (invitation.incarnation, Some(self.of.0));
        }
        self.newest = invitation.epoch;
        let rank = invitation.members.iter().position(|member| *member == self.own);
        let place = (rank.expect("was checked") as u32, invitation.members.len() as u32);
        match convener.join(&invitation.id, place, go_on) {
            Ok(ranks) => {
                self.state = LaneState::Joined { epoch: invitation.epoch };
                self.epoch = Some((invitation, ranks));
                Ok(())
            }
            Err(error) => {
                self.fail(invitation.epoch, now_ms);
                Err(error)
            }
        }
    }

    /// Sends and receives in `epoch` as one operation. Any error means that nothing of it may be taken for done and that bytes go another
    /// way; unless the caller passed what can never work ([`crate::Kind::InvalidInput`]), the epoch is broken, which the other
    /// members should be told.
    ///
    /// # Safety
    /// Nobody else may use the memory of `receives` meanwhile, nor write to that of `sends`.
    pub unsafe fn exchange(
        &mut self,
        epoch: u64,
        (sends, receives): (&[Part<'_>], &[Part<'_>]),
        now_ms: u64,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        let Some((invitation, ranks)) = &mut self.epoch else {
            let problem = format!("there is no communicator: {:?}", self.state);
            return Err(Error::Communicator { call: "exchanging", problem });
        };
        if invitation.epoch != epoch {
            return invalid("epoch", format!("is {epoch}, {} is joined", invitation.epoch));
        }
        // SAFETY: the caller's promise.
        let outcome = unsafe { ranks.exchange(sends, receives, go_on) };
        match &outcome {
            Ok(()) => self.faults = 0,
            // Refused before anything was begun.
            Err(Error::Invalid { .. }) => {}
            Err(_) => self.fail(epoch, now_ms),
        }
        outcome
    }

    /// Takes the news that an epoch broke at another member: ends it here. News of other epochs than the joined one is old.
    pub fn broke(&mut self, epoch: u64, now_ms: u64) {
        if self.state == (LaneState::Joined { epoch }) {
            self.fail(epoch, now_ms);
        }
    }

    /// Leaves an epoch that is not wanted any more, by an abort. That is no fault, whatever its exchange that was under way said of it
    /// just now: another may be convened at once.
    pub fn left(&mut self, epoch: u64, now_ms: u64) {
        match self.state {
            LaneState::Joined { epoch: joined } if joined == epoch => self.leave(),
            LaneState::Broken { epoch: broken, .. } if broken == epoch => {
                self.faults = self.faults.saturating_sub(1);
            }
            _ => return,
        }
        self.state = LaneState::Broken { epoch, retry_at_ms: now_ms };
    }

    fn convener(&self) -> Result<&Arc<dyn Convener>, Error> {
        self.convener.as_ref().ok_or_else(|| {
            let problem = match &self.state {
                LaneState::Off { problem } => problem.clone(),
                state => format!("{state:?}"),
            };
            Error::Communicator { call: "the lane", problem }
        })
    }

    fn check(&self, invitation: &Invitation) -> Result<(), Error> {
        let members = &invitation.members;
        if !(2..=MEMBERS_MAX).contains(&members.len()) {
            return invalid("members", format!("are {}, must be from 2 to {MEMBERS_MAX}", members.len()));
        }
        if !members.contains(&self.own) {
            return invalid("members", format!("lack `{}`, whose lane this is", self.own));
        }
        let mut sorted: Vec<&String> = members.iter().collect();
        sorted.sort_unstable();
        match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => invalid("members", format!("name `{}` twice", pair[0])),
            None => Ok(()),
        }
    }

    fn check_later(&self, invitation: &Invitation) -> Result<(), Error> {
        let Invitation { incarnation, epoch, .. } = invitation;
        let (of, before) = self.of;
        if before == Some(*incarnation) {
            return invalid("incarnation", format!("is {incarnation}, which {of} came after"));
        }
        // A convener that was started anew counts from the beginning.
        let newest = if *incarnation == of { self.newest } else { 0 };
        if *epoch <= newest {
            return invalid("epoch", format!("is {epoch}, {newest} was before it"));
        }
        if epoch - newest > EPOCH_STEP_MAX {
            let problem =
                format!("is {epoch}, more than {EPOCH_STEP_MAX} after {newest}, which was the newest");
            return invalid("epoch", problem);
        }
        Ok(())
    }

    fn leave(&mut self) {
        if let Some((_, mut ranks)) = self.epoch.take() {
            ranks.abort();
        }
    }

    fn fail(&mut self, epoch: u64, now_ms: u64) {
        self.leave();
        let pause = PAUSE_MS.saturating_mul(1 << self.faults.min(16)).min(PAUSE_MS_MAX);
        self.faults = self.faults.saturating_add(1);
        self.state = LaneState::Broken { epoch, retry_at_ms: now_ms.saturating_add(pause) };
    }
}

fn invalid<T>(field: &'static str, problem: String) -> Result<T, Error> {
    Err(Error::Invalid { field, problem })
}

#[cfg(test)]
mod tests;
