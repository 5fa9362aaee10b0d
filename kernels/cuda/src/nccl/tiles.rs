//! One end of the `nccl` lane between two processes: bodies of tiles that lie in memory of the host go through staging memory of the
//! device, piece by piece. It has two halves: while a piece is exchanged in one, the next is copied to the other, or the one before from it.
#![allow(unsafe_code, reason = "names device memory of its own in exchanges; see SAFETY")]

use std::fmt;
use std::sync::Arc;

use super::{Convener, Invitation, LaneState, NcclLane, Part};
use crate::{Buffer, Device, Error};

/// A lane with one peer, and the staging memory of this end. It belongs to one thread at a time.
///
/// Both ends exchange a body in the same pieces: [`Self::PIECE_BYTES`] each, the last one shorter. Whatever fails ends the epoch.
pub struct TileLane {
    lane: NcclLane,
    device: Arc<dyn Device>,
    members: [String; 2],
    /// Rank of the peer.
    peer: u32,
    /// While an epoch is joined.
    stage: Option<Buffer>,
}

impl TileLane {
    /// Bytes of one exchange, and of each half of the staging memory.
    pub const PIECE_BYTES: usize = 4 << 20;

    /// The end of `members[own]`, in no epoch. Epochs that it convenes are of `incarnation`. Without what makes communicators the lane is
    /// off for good, and says why.
    ///
    /// # Panics
    /// When `own` is neither 0 nor 1.
    pub fn new(
        members: [&str; 2],
        own: u32,
        incarnation: u64,
        convener: Result<Arc<dyn Convener>, Error>,
        device: Arc<dyn Device>,
    ) -> Self {
        let lane = NcclLane::new(members[own as usize], convener).of_incarnation(incarnation);
        Self { lane, device, members: members.map(str::to_owned), peer: 1 - own, stage: None }
    }

    /// Where it stands.
    pub fn state(&self) -> &LaneState {
        self.lane.state()
    }

    /// The invitation to the next epoch, for both ends ([`NcclLane::invite`]).
    pub fn invite(&mut self, now_ms: u64) -> Result<Invitation, Error> {
        self.lane.invite(self.members.to_vec(), now_ms)
    }

    /// An invitation as it came from the peer, by what it consists of.
    pub fn invitation(&self, incarnation: u64, epoch: u64, id: &[u8]) -> Result<Invitation, Error> {
        let id = super::UniqueId::from_bytes(id)?;
        Ok(Invitation { incarnation, epoch, id, members: self.members.to_vec() })
    }

    /// Joins an epoch ([`NcclLane::accept`]). The staging memory is taken before: where there is none the epoch is not begun.
    pub fn accept(
        &mut self,
        invitation: Invitation,
        now_ms: u64,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        if self.stage.is_none() {
            self.stage = Some(Buffer::new(&self.device, 2 * Self::PIECE_BYTES)?);
        }
        let joined = self.lane.accept(invitation, now_ms, go_on);
        self.give_back();
        joined
    }

    /// Sends a body, which lies in parts, in `epoch`; returns when the peer has all of it.
    pub fn send(
        &mut self,
        epoch: u64,
        body: &[&[u8]],
        now_ms: u64,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        let bytes = body.iter().map(|part| part.len()).sum();
        self.ending_what_fails(epoch, now_ms, |this| {
            let mut rest = pieces(bytes);
            let mut piece = rest.next();
            if let Some(first) = piece {
                fill(this.stage()?, body, first)?;
            }
            while let Some(now) = piece {
                piece = rest.next();
                let next = piece;
                let copy = |stage: &Buffer| next.map_or(Ok(()), |next| fill(stage, body, next));
                this.exchange(epoch, (now, Way::Out), (now_ms, go_on), copy)?;
            }
            Ok(())
        })
    }

    /// Receives a body that is as long as `into`, in `epoch`.
    pub fn receive(
        &mut self,
        epoch: u64,
        into: &mut [u8],
        now_ms: u64,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        self.ending_what_fails(epoch, now_ms, |this| {
            let mut before = None;
            for piece in pieces(into.len()) {
                let came = before.replace(piece);
                let copy = |stage: &Buffer| came.map_or(Ok(()), |came| empty(stage, into, came));
                this.exchange(epoch, (piece, Way::In), (now_ms, go_on), copy)?;
            }
            before.map_or(Ok(()), |last| empty(this.stage()?, into, last))
        })
    }

    /// Leaves an epoch that is not wanted any more ([`NcclLane::left`]).
    pub fn left(&mut self, epoch: u64, now_ms: u64) {
        self.lane.left(epoch, now_ms);
        self.give_back();
    }

    /// The peer may be in the middle of it, so nothing that failed leaves the epoch as it was.
    fn ending_what_fails(
        &mut self,
        epoch: u64,
        now_ms: u64,
        run: impl FnOnce(&mut Self) -> Result<(), Error>,
    ) -> Result<(), Error> {
        run(self).inspect_err(|_| {
            self.lane.broke(epoch, now_ms);
            self.give_back();
        })
    }

    /// Staging memory goes back where there is no epoch: by then nothing uses it any more.
    fn give_back(&mut self) {
        if !matches!(self.lane.state(), LaneState::Joined { .. }) {
            self.stage = None;
        }
    }

    fn stage(&self) -> Result<&Buffer, Error> {
        self.stage.as_ref().ok_or_else(|| {
            let problem = format!("there is no communicator: {:?}", self.lane.state());
            Error::Communicator { call: "exchanging", problem }
        })
    }

    /// Exchanges a piece in its half of the staging memory, and does `copy`, which uses the other half only, meanwhile: as soon as the
    /// exchange has begun and its owner is asked whether to go on.
    fn exchange(
        &mut self,
        epoch: u64,
        (piece, way): (Piece, Way),
        (now_ms, go_on): (u64, &mut dyn FnMut() -> bool),
        copy: impl FnOnce(&Buffer) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.stage()?;
        let Self { lane, stage, peer, .. } = self;
        let buffer = stage.as_ref().expect("was looked at");
        let part = [Part { peer: *peer, buffer, offset: piece.half(), bytes: piece.bytes }];
        let (sends, receives): (&[Part<'_>], &[Part<'_>]) = match way {
            Way::Out => (&part, &[]),
            Way::In => (&[], &part),
        };
        let (mut copy, mut copied) = (Some(copy), Ok(()));
        let mut meanwhile = || {
            if let Some(copy) = copy.take() {
                copied = copy(buffer);
            }
            copied.is_ok() && go_on()
        };
        // SAFETY: the staging memory is this lane's own, which is borrowed for the whole call; its other half is none of the exchange.
        let exchanged = unsafe { lane.exchange(epoch, (sends, receives), now_ms, &mut meanwhile) };
        // A copy that failed ended the exchange, and says why.
        copied?;
        exchanged?;
        // It was done before anybody was asked.
        copy.map_or(Ok(()), |copy| copy(buffer))
    }
}

/// Brings a piece of the body to its half of the staging memory.
fn fill(stage: &Buffer, body: &[&[u8]], piece: Piece) -> Result<(), Error> {
    let (mut skip, mut at) = (piece.from, 0);
    for part in body {
        let begin = skip.min(part.len());
        skip -= begin;
        let count = (part.len() - begin).min(piece.bytes - at);
        if count > 0 {
            stage.span(piece.half() + at, count)?.write(&part[begin..begin + count])?;
            at += count;
        }
    }
    Ok(())
}

/// Brings a piece that came to where it belongs.
fn empty(stage: &Buffer, into: &mut [u8], piece: Piece) -> Result<(), Error> {
    stage.span(piece.half(), piece.bytes)?.read(&mut into[piece.from..piece.from + piece.bytes])
}

#[derive(Clone, Copy)]
enum Way {
    Out,
    In,
}

/// What is exchanged at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    /// Where it begins in the body.
    from: usize,
    bytes: usize,
}

impl Piece {
    /// Where it lies in the staging memory: in the halves by turns.
    fn half(&self) -> usize {
        self.from / TileLane::PIECE_BYTES % 2 * TileLane::PIECE_BYTES
    }
}

/// The pieces of a body, in order.
fn pieces(bytes: usize) -> impl Iterator<Item = Piece> {
    let starts = (0..bytes).step_by(TileLane::PIECE_BYTES);
    starts.map(move |from| Piece { from, bytes: (bytes - from).min(TileLane::PIECE_BYTES) })
}

impl fmt::Debug for TileLane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TileLane").field("state", self.lane.state()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_body_without_gaps() {
        const PIECE: usize = TileLane::PIECE_BYTES;
        for (bytes, count) in
            [(0, 0), (1, 1), (PIECE - 1, 1), (PIECE, 1), (PIECE + 1, 2), (2 * PIECE, 2), (5 * PIECE - 7, 5)]
        {
            let all: Vec<_> = pieces(bytes).collect();
            assert_eq!(all.len(), count, "{bytes}");
            let end = all.iter().fold(0, |end, piece| {
                assert!(piece.from == end && piece.bytes > 0 && piece.bytes <= PIECE);
                end + piece.bytes
            });
            assert_eq!(end, bytes);
            let halves = all.iter().zip(0..).all(|(piece, number)| piece.half() == number % 2 * PIECE);
            assert!(halves, "{all:?}");
        }
    }
}
