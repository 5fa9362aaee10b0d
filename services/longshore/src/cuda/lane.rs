//! The lane `nccl`: ends of it as the fabric asks for them, on the GPU of this process. Of the two crates each knows nothing of the other;
//! the fabric's conformance suite runs over this file too.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use longshore_cuda::{Convener, Device, Invitation, LaneState, TileLane};
use longshore_fabric::{
    Error,
    nccl::{GpuEnd, GpuInvitation, GpuLane, GpuLanes, over, resting},
};

/// Names of the two ends, by rank.
const MEMBERS: [&str; 2] = ["shard", "client"];

/// Makes ends of the lane.
#[derive(Debug)]
pub(crate) struct CudaLanes {
    convener: Arc<dyn Convener>,
    device: Arc<dyn Device>,
}

impl CudaLanes {
    /// Of communicators that `convener` makes on `device`.
    pub(crate) fn new(convener: Arc<dyn Convener>, device: Arc<dyn Device>) -> Self {
        Self { convener, device }
    }
}

impl GpuLanes for CudaLanes {
    fn lane(&self, end: GpuEnd) -> Box<dyn GpuLane> {
        let (own, incarnation) = match end {
            GpuEnd::Shard { incarnation } => (0, incarnation),
            GpuEnd::Client => (1, 0),
        };
        let (convener, device) = (Ok(Arc::clone(&self.convener)), Arc::clone(&self.device));
        Box::new(CudaLane(TileLane::new(MEMBERS, own, incarnation, convener, device)))
    }
}

#[derive(Debug)]
struct CudaLane(TileLane);

impl GpuLane for CudaLane {
    fn invite(&mut self, now_ms: u64) -> Result<GpuInvitation, Error> {
        let invited = self.0.invite(now_ms).map_err(|error| match *self.0.state() {
            LaneState::Broken { retry_at_ms, .. } if now_ms < retry_at_ms => {
                resting(error, Duration::from_millis(retry_at_ms - now_ms))
            }
            _ => over(error),
        });
        let Invitation { incarnation, epoch, id, .. } = invited?;
        Ok(GpuInvitation { incarnation, epoch, unique_id: *id.as_bytes() })
    }

    fn accept(
        &mut self,
        invitation: &GpuInvitation,
        now_ms: u64,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        let GpuInvitation { incarnation, epoch, unique_id } = invitation;
        let invitation = self.0.invitation(*incarnation, *epoch, unique_id);
        invitation.and_then(|invitation| self.0.accept(invitation, now_ms, go_on)).map_err(over)
    }

    fn send(
        &mut self,
        epoch: u64,
        body: &[Bytes],
        now_ms: u64,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        let parts: Vec<&[u8]> = body.iter().map(|part| &part[..]).collect();
        self.0.send(epoch, &parts, now_ms, go_on).map_err(over)
    }

    fn receive(
        &mut self,
        epoch: u64,
        into: &mut [u8],
        now_ms: u64,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        self.0.receive(epoch, into, now_ms, go_on).map_err(over)
    }

    fn end(&mut self, epoch: u64, now_ms: u64) {
        self.0.left(epoch, now_ms);
    }
}
