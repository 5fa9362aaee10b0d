//! Ends of the lane that do at once what they are told, for tests of what hands them out.

use std::sync::Arc;

use bytes::Bytes;
use longshore_proto::{
    types::{NCCL_ID_BYTES, NcclEpoch, NcclInvitation, NcclLease},
    v1,
};
use tokio::time::Instant;

use super::{Convener, GpuEnd, GpuInvitation, GpuLane, GpuLanes};
use crate::Error;

#[derive(Debug)]
pub(crate) struct Willing;

/// With the number of its last epoch.
#[derive(Debug)]
struct WillingLane(u64);

impl GpuLanes for Willing {
    fn lane(&self, _: GpuEnd) -> Box<dyn GpuLane> {
        Box::new(WillingLane(0))
    }
}

impl GpuLane for WillingLane {
    fn invite(&mut self, _: u64) -> Result<GpuInvitation, Error> {
        self.0 += 1;
        Ok(GpuInvitation { incarnation: 5, epoch: self.0, unique_id: [1; NCCL_ID_BYTES] })
    }

    fn accept(&mut self, _: &GpuInvitation, _: u64, _: &mut dyn FnMut() -> bool) -> Result<(), Error> {
        Ok(())
    }

    fn send(&mut self, _: u64, _: &[Bytes], _: u64, _: &mut dyn FnMut() -> bool) -> Result<(), Error> {
        Ok(())
    }

    fn receive(&mut self, _: u64, _: &mut [u8], _: u64, _: &mut dyn FnMut() -> bool) -> Result<(), Error> {
        Ok(())
    }

    fn end(&mut self, _: u64, _: u64) {}
}

/// Invites a member of a connection of its own; what its first call says of the epoch.
pub(crate) async fn invited(convener: &Convener, member: u8, now: Instant) -> Result<NcclLease, Error> {
    let member = [member; 16];
    let request = v1::JoinNcclEpochRequest { member: member.to_vec().into() };
    let answer = convener.invite(&Arc::default(), &request, now).await?;
    let NcclInvitation { incarnation, number, .. } = answer.try_into().unwrap();
    Ok(NcclLease { epoch: NcclEpoch { incarnation, number, member }, lease: 1 })
}

/// The same, as soon as an end is free.
pub(crate) async fn invited_soon(convener: &Convener, member: u8, now: Instant) -> NcclLease {
    for _ in 0..12_000 {
        if let Ok(lease) = invited(convener, member, now).await {
            return lease;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    panic!("no end is free");
}
