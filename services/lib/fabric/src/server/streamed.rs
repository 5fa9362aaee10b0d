//! The two methods that move tiles when those travel on a connection of their own (lane `tcp`).

use std::sync::Arc;

use futures::{FutureExt, StreamExt, stream};
use longshore_proto::types::{GetBlocks, Identity, TileMemory, TileMessage, WireTileShape};
use tonic::Status;

use super::{budget::Reservation, refusal::from_request, shard::ShardService, tiles::store};
use crate::{
    BoxStream, Error,
    lane::Hop,
    tcp::{Buffers, Fault, Frame, Lease},
    tiles::{Messages, OutgoingBody},
};

/// Answers that are looked at for why their call ended, when they can be sent no more: more than a shard has ready.
const UNSENT_MAX: usize = 64;

/// A store stream whose tiles come as frames of `lease`.
pub(super) async fn put_blocks(
    service: &ShardService,
    hop: Hop,
    (identity, shape): (Identity, WireTileShape),
    lease: Lease,
    messages: Messages,
    reserved: Arc<Reservation>,
) -> Result<OutgoingBody, Error> {
    let kept = lease.kept();
    let frames = Frames {
        lease,
        messages,
        calls_end: false,
        reserved: Arc::clone(&reserved),
        memory: service.shard.tile_memory(),
        buffers: service.buffers.clone(),
    };
    let acks = store(service, hop, (identity, shape), frames.tiles(), reserved).await?;
    Ok(acks.with_kept(kept))
}

/// What a store stream reads: frames, and the end of the call itself.
struct Frames {
    lease: Lease,
    messages: Messages,
    /// The client has no more messages: what frames are left are on their way.
    calls_end: bool,
    reserved: Arc<Reservation>,
    memory: Option<Arc<dyn TileMemory>>,
    buffers: Buffers,
}

impl Frames {
    /// Until the end or the first error. The connection goes back, or is closed, before the stream ends.
    fn tiles(self) -> impl stream::Stream<Item = Result<TileMessage, Status>> + Send + 'static {
        stream::unfold(Some(self), |frames| async move {
            let mut frames = frames?;
            match frames.next().await {
                Ok(Some(tile)) => Some((Ok(tile), Some(frames))),
                Ok(None) => None,
                Err(error) => Some((Err(error.into()), None)),
            }
        })
    }

    async fn next(&mut self) -> Result<Option<TileMessage>, Error> {
        match self.frame().await? {
            Frame::Tile(head) => {
                let held = self.reserved.room(head.bytes as usize).await?;
                let held = (held, self.lease.under_way(head.bytes as usize));
                let read = self.lease.stream().tile(head, self.memory.as_deref(), &self.buffers).await;
                let mut tile = read.map_err(|fault| fault.of_request())?;
                tile.data = tile.data.holding(held);
                Ok(Some(tile))
            }
            Frame::Missing => {
                Err(Error::invalid("frame.kind", "says that a block is missing, in a store stream"))
            }
            Frame::End => {
                self.lease.finish();
                Ok(None)
            }
        }
    }

    async fn frame(&mut self) -> Result<Frame, Error> {
        loop {
            let limit = self.calls_end.then(|| self.lease.patience().read);
            tokio::select! {
                frame = self.lease.stream().next(limit) => return frame.map_err(|fault| fault.of_request()),
                message = self.messages.next(), if !self.calls_end => {
                    if message.map_err(|status| from_request(&status))?.is_some() {
                        let problem = "is a second message, the tiles of this call travel on its tile connection";
                        return Err(Error::invalid("part", problem));
                    }
                    self.calls_end = true;
                }
            }
        }
    }
}

/// A read stream whose answers go out as frames of `lease`. The call itself has no messages but its status.
pub(super) async fn get_blocks(
    service: &ShardService,
    hop: Hop,
    get: GetBlocks,
    lease: Lease,
    reserved: Arc<Reservation>,
) -> Result<OutgoingBody, Error> {
    let kept = lease.kept();
    let answers = hop.answer(service.shard.get_blocks(&hop.context, get)).await?;
    let sending = async move {
        let _reserved = reserved;
        send(lease, answers).await
    };
    // A reader that takes nothing holds this task only, until its deadline, its end or the patience of the lane. The call lasts until
    // the last frame is out, which is later than the last answer.
    let sending = hop.bound(Box::pin(stream::once(sending)));
    let nothing = sending.filter_map(|sent| {
        let failure = sent.err().map(|error| Err(Status::from(error)));
        std::future::ready(failure)
    });
    Ok(OutgoingBody::response(nothing).with_kept(kept))
}

async fn send(mut lease: Lease, mut answers: BoxStream<Option<TileMessage>>) -> Result<(), Error> {
    while let Some(answer) = answers.next().await {
        let sent = match answer? {
            Some(tile) => {
                let _counted = lease.under_way(tile.data.len());
                lease.stream().send_tile(&tile).await
            }
            None => lease.stream().send(Frame::Missing, &[]).await,
        };
        sent.map_err(|fault| why(fault, &mut answers))?;
    }
    lease.stream().send(Frame::End, &[]).await.map_err(|fault| fault.of_request())?;
    lease.finish();
    Ok(())
}

/// Why a call goes no further whose reader takes nothing.
fn why(fault: Fault, answers: &mut BoxStream<Option<TileMessage>>) -> Error {
    reason_of_shard(answers).unwrap_or_else(|| fault.of_request())
}

/// The reason that the shard has to end a call, which waits behind what it has ready.
pub(super) fn reason_of_shard(answers: &mut BoxStream<Option<TileMessage>>) -> Option<Error> {
    for _ in 0..UNSENT_MAX {
        match answers.next().now_or_never() {
            Some(Some(Ok(_))) => {}
            Some(Some(Err(error))) => return Some(error),
            Some(None) | None => break,
        }
    }
    None
}
