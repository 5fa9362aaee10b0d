//! The `nccl` lane: bodies of the tiles of a gRPC call go from GPU to GPU, between a client and a shard that are two ranks of one
//! communicator.
//!
//! Calls, deadlines, cancellation, acknowledgements and errors stay gRPC's, and so do the heads of tiles: a message names a body
//! (`Tile.nccl`), then both sides exchange it. A communicator is an **epoch**. The shard convenes it and hands it out over gRPC
//! ([`Convener`]); a call leases it for itself. An epoch whose call did not end well is over, so that nothing of one call can be taken for
//! another's. Nothing here knows CUDA or NCCL: an end of the lane is a [`GpuLane`] with a thread of its own ([`End`]).

mod bodies;
mod convener;
mod end;
#[cfg(test)]
pub(crate) mod willing;

pub(crate) use bodies::{Arrivals, Bodies, PARTIALS_BYTES_MIN};
pub(crate) use convener::{Convener, Held, not_offered};
pub(crate) use end::{End, Left, State};

use std::{fmt, time::Duration};

use bytes::Bytes;
use longshore_proto::types::NCCL_ID_BYTES;

use crate::{Code, Error};

/// How long both ends may take to join an epoch.
pub(crate) const JOIN_PATIENCE: Duration = Duration::from_secs(10);
/// Field of errors that say of an epoch that it is over. In those that refuse to begin a call it has its place in the request.
pub(crate) const EPOCH: &str = "nccl";

/// Which end of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GpuEnd {
    /// Rank 0, which convenes; with its incarnation, which no other start of the process has.
    Shard {
        /// Never 0.
        incarnation: u64,
    },
    /// Rank 1.
    Client,
}

/// Makes the ends of the lane in this process: whoever knows its GPU and NCCL.
pub trait GpuLanes: Send + Sync + fmt::Debug {
    /// An end that is in no epoch. It takes nothing of the GPU until it joins one.
    fn lane(&self, end: GpuEnd) -> Box<dyn GpuLane>;
}

/// One end of the lane, to one peer. It belongs to one thread. Times are milliseconds since that thread began.
///
/// `go_on` is asked between two looks at what is under way; it waits a little, and answers `false` when there is no time left or the epoch
/// is over. Any error but that of [`Self::invite`] means that the epoch is over at this end; the peer finds out by its own end. After a
/// failure an end may refuse for a while to invite ([`resting`]).
pub trait GpuLane: Send + fmt::Debug {
    /// To the next epoch; of the shard's end only.
    fn invite(&mut self, now_ms: u64) -> Result<GpuInvitation, Error>;
    /// Joins an epoch together with the peer. Refuses one that is not later than all before of its incarnation.
    fn accept(
        &mut self,
        invitation: &GpuInvitation,
        now_ms: u64,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error>;
    /// Sends a body, which lies in parts; returns when the peer has it.
    fn send(
        &mut self,
        epoch: u64,
        body: &[Bytes],
        now_ms: u64,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error>;
    /// Receives a body that fills `into`.
    fn receive(
        &mut self,
        epoch: u64,
        into: &mut [u8],
        now_ms: u64,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error>;
    /// Leaves an epoch, if it is the one that is joined, or was when it failed: the call that had it ended early, which is no fault of the
    /// lane.
    fn end(&mut self, epoch: u64, now_ms: u64);
}

/// To join an epoch.
#[derive(Clone, PartialEq, Eq)]
pub struct GpuInvitation {
    /// Of the shard that convened it.
    pub incarnation: u64,
    /// Its number, never 0.
    pub epoch: u64,
    /// What the ranks find each other by.
    pub unique_id: [u8; NCCL_ID_BYTES],
}

impl fmt::Debug for GpuInvitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { incarnation, epoch, .. } = self;
        // Who knows the id can join.
        f.debug_struct("GpuInvitation")
            .field("incarnation", incarnation)
            .field("epoch", epoch)
            .finish_non_exhaustive()
    }
}

/// What [`GpuLane::invite`] refuses with after a failure, for so long.
pub fn resting(problem: impl fmt::Display, rest: Duration) -> Error {
    let text = format!("`{EPOCH}` rests: {problem}; hint: send tiles another way until then");
    Error::new(Code::Unavailable, text).with_field(EPOCH).with_retry_after(rest)
}

/// An epoch is over, or never was: what an end says of any other failure.
pub fn over(problem: impl fmt::Display) -> Error {
    let text = format!("`{EPOCH}` {problem}; hint: join another epoch, or send tiles another way");
    Error::new(Code::Unavailable, text).with_field(EPOCH)
}

/// Whether a peer says with it that the epoch of a call is over, or is not known to it.
pub(crate) fn is_of_epoch(error: &Error) -> bool {
    let field = error.field.as_deref().and_then(|field| field.rsplit('.').next());
    error.code == Code::Unavailable && field == Some(EPOCH)
}
