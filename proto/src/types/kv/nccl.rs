//! Epochs of the lane `nccl` as they are named and handed out. Secrets stay out of logs.

use std::fmt;

use bytes::Bytes;

use crate::{WireError, types::check, v1};

/// Bytes of the secret of a member.
pub const NCCL_MEMBER_BYTES: usize = 16;
/// Bytes of what the ranks of a communicator find each other by.
pub const NCCL_ID_BYTES: usize = 128;
/// Ranks of an epoch: the shard, then the client.
const RANKS: u32 = 2;
/// The client's.
const CLIENT_RANK: u32 = 1;

/// An epoch as one of its members names it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct NcclEpoch {
    /// Of the shard that convened it; never 0.
    pub incarnation: u64,
    /// Its number; never 0.
    pub number: u64,
    /// Secret of the client's end; never all zeros.
    pub member: [u8; NCCL_MEMBER_BYTES],
}

/// An epoch that a call has for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NcclLease {
    /// The epoch.
    pub epoch: NcclEpoch,
    /// Number of the call; never 0.
    pub lease: u64,
}

/// To join an epoch as its client.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct NcclInvitation {
    /// Of the shard; never 0.
    pub incarnation: u64,
    /// Number of the epoch; never 0.
    pub number: u64,
    /// What the ranks find each other by; never all zeros.
    pub unique_id: [u8; NCCL_ID_BYTES],
}

/// A body that is exchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NcclBytes {
    /// Its number in the call, from 0.
    pub number: u64,
    /// Its bytes; never 0.
    pub bytes: u32,
}

impl fmt::Debug for NcclEpoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { incarnation, number, .. } = self;
        f.debug_struct("NcclEpoch")
            .field("incarnation", incarnation)
            .field("number", number)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for NcclInvitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { incarnation, number, .. } = self;
        f.debug_struct("NcclInvitation")
            .field("incarnation", incarnation)
            .field("number", number)
            .finish_non_exhaustive()
    }
}

fn not_zero(value: u64, field: &str) -> Result<u64, WireError> {
    if value == 0 { Err(WireError::invalid(field, "is 0")) } else { Ok(value) }
}

/// A secret of so many bytes, which somebody made.
fn secret<const N: usize>(bytes: &[u8], field: &str) -> Result<[u8; N], WireError> {
    let secret = check::exact(bytes, field)?;
    if secret.iter().all(|&byte| byte == 0) {
        return Err(WireError::invalid(field, "is all zeros; hint: draw random bytes"));
    }
    Ok(secret)
}

impl TryFrom<v1::NcclEpoch> for NcclEpoch {
    type Error = WireError;

    fn try_from(wire: v1::NcclEpoch) -> Result<Self, WireError> {
        Ok(Self {
            incarnation: not_zero(wire.incarnation, "incarnation")?,
            number: not_zero(wire.number, "number")?,
            member: secret(&wire.member, "member")?,
        })
    }
}

impl From<NcclEpoch> for v1::NcclEpoch {
    fn from(epoch: NcclEpoch) -> Self {
        let NcclEpoch { incarnation, number, member } = epoch;
        Self { incarnation, number, member: Bytes::copy_from_slice(&member) }
    }
}

impl TryFrom<v1::NcclLease> for NcclLease {
    type Error = WireError;

    fn try_from(wire: v1::NcclLease) -> Result<Self, WireError> {
        let epoch = check::required(wire.epoch, "epoch")?;
        Ok(Self { epoch, lease: not_zero(wire.lease, "lease")? })
    }
}

impl From<NcclLease> for v1::NcclLease {
    fn from(lease: NcclLease) -> Self {
        Self { epoch: Some(lease.epoch.into()), lease: lease.lease }
    }
}

impl TryFrom<v1::NcclBytes> for NcclBytes {
    type Error = WireError;

    fn try_from(wire: v1::NcclBytes) -> Result<Self, WireError> {
        not_zero(u64::from(wire.bytes), "bytes")?;
        Ok(Self { number: wire.number, bytes: wire.bytes })
    }
}

impl From<NcclBytes> for v1::NcclBytes {
    fn from(body: NcclBytes) -> Self {
        Self { number: body.number, bytes: body.bytes }
    }
}

impl v1::JoinNcclEpochRequest {
    /// The secret of the member.
    pub fn checked_member(&self) -> Result<[u8; NCCL_MEMBER_BYTES], WireError> {
        secret(&self.member, "member")
    }
}

impl TryFrom<v1::JoinNcclEpochResponse> for NcclInvitation {
    type Error = WireError;

    fn try_from(wire: v1::JoinNcclEpochResponse) -> Result<Self, WireError> {
        if wire.ranks != RANKS {
            return Err(WireError::invalid("ranks", format!("is {}, must be {RANKS}", wire.ranks)));
        }
        if wire.rank != CLIENT_RANK {
            return Err(WireError::invalid("rank", format!("is {}, must be {CLIENT_RANK}", wire.rank)));
        }
        Ok(Self {
            incarnation: not_zero(wire.incarnation, "incarnation")?,
            number: not_zero(wire.number, "number")?,
            unique_id: secret(&wire.unique_id, "unique_id")?,
        })
    }
}

impl From<NcclInvitation> for v1::JoinNcclEpochResponse {
    fn from(invitation: NcclInvitation) -> Self {
        let NcclInvitation { incarnation, number, unique_id } = invitation;
        let unique_id = Bytes::copy_from_slice(&unique_id);
        Self { incarnation, number, unique_id, rank: CLIENT_RANK, ranks: RANKS }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invitation() -> NcclInvitation {
        NcclInvitation { incarnation: 7, number: 3, unique_id: std::array::from_fn(|at| at as u8) }
    }

    fn lease() -> NcclLease {
        NcclLease { epoch: NcclEpoch { incarnation: 7, number: 3, member: [0xa5; 16] }, lease: 9 }
    }

    fn fault<W, T: TryFrom<W, Error = WireError> + fmt::Debug>(wire: W) -> String {
        T::try_from(wire).unwrap_err().field().to_owned()
    }

    #[test]
    fn what_is_sent_comes_as_it_was() {
        assert_eq!(NcclInvitation::try_from(v1::JoinNcclEpochResponse::from(invitation())), Ok(invitation()));
        assert_eq!(NcclLease::try_from(v1::NcclLease::from(lease())), Ok(lease()));
        let body = NcclBytes { number: u64::MAX, bytes: 1 };
        assert_eq!(NcclBytes::try_from(v1::NcclBytes::from(body)), Ok(body));
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_field() {
        let invited = || v1::JoinNcclEpochResponse::from(invitation());
        let of = |wire| fault::<_, NcclInvitation>(wire);
        assert_eq!(of(v1::JoinNcclEpochResponse::default()), "ranks");
        for ranks in [0, 1, 3, u32::MAX] {
            assert_eq!(of(v1::JoinNcclEpochResponse { ranks, ..invited() }), "ranks");
        }
        for rank in [0, 2, u32::MAX] {
            assert_eq!(of(v1::JoinNcclEpochResponse { rank, ..invited() }), "rank");
        }
        assert_eq!(of(v1::JoinNcclEpochResponse { incarnation: 0, ..invited() }), "incarnation");
        assert_eq!(of(v1::JoinNcclEpochResponse { number: 0, ..invited() }), "number");
        for bytes in [0, 127, 129, 1 << 16] {
            let unique_id = vec![1; bytes].into();
            assert_eq!(of(v1::JoinNcclEpochResponse { unique_id, ..invited() }), "unique_id");
        }
        assert_eq!(
            of(v1::JoinNcclEpochResponse { unique_id: vec![0; 128].into(), ..invited() }),
            "unique_id"
        );
        let leased = |epoch| fault::<_, NcclLease>(v1::NcclLease { epoch, lease: 1 });
        let epoch = || v1::NcclEpoch::from(lease().epoch);
        assert_eq!(leased(None), "epoch");
        assert_eq!(leased(Some(v1::NcclEpoch { incarnation: 0, ..epoch() })), "epoch.incarnation");
        assert_eq!(leased(Some(v1::NcclEpoch { number: 0, ..epoch() })), "epoch.number");
        for member in [vec![], vec![1; 15], vec![1; 17], vec![0; 16]] {
            let request = v1::JoinNcclEpochRequest { member: member.clone().into() };
            assert_eq!(request.checked_member().unwrap_err().field(), "member");
            assert_eq!(leased(Some(v1::NcclEpoch { member: member.into(), ..epoch() })), "epoch.member");
        }
        assert_eq!(fault::<_, NcclLease>(v1::NcclLease { epoch: Some(epoch()), lease: 0 }), "lease");
        assert_eq!(fault::<_, NcclBytes>(v1::NcclBytes { number: 0, bytes: 0 }), "bytes");
    }

    #[test]
    fn secrets_are_not_printed() {
        let text = format!("{:?} {:?}", lease(), invitation());
        assert!(!text.contains("165") && !text.contains("127"), "{text}");
    }
}
