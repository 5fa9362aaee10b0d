//! The two methods that move tiles when bodies go from GPU to GPU (lane `nccl`). Heads and small bodies are messages of the call.

use std::sync::Arc;

use futures::{Stream, StreamExt, stream};
use longshore_proto::{
    types::{GetBlocks, Identity, TileMemory, TileMessage, WireTileShape},
    v1,
};
use tonic::Status;

use super::{
    budget::Reservation,
    shard::ShardService,
    streamed::reason_of_shard,
    tiles::{next_message, store, tile_part},
};
use crate::{
    BoxStream, Error, TcpPatience,
    lane::Hop,
    nccl::{Arrivals, Bodies, Held},
    tiles::{self, Messages, Outgoing, OutgoingBody},
};

/// A store stream whose messages name bodies that are exchanged in the epoch of `held`.
pub(super) async fn put_blocks(
    service: &ShardService,
    hop: Hop,
    (identity, shape): (Identity, WireTileShape),
    held: Held,
    (messages, bytes_max, patience): (Messages, usize, TcpPatience),
    reserved: Arc<Reservation>,
) -> Result<OutgoingBody, Error> {
    let kept = held.kept();
    let incoming = Incoming {
        arrivals: held.arrivals(bytes_max, service.buffers.clone()),
        held,
        messages,
        reserved: Arc::clone(&reserved),
        memory: service.shard.tile_memory(),
        patience,
    };
    let acks = store(service, hop, (identity, shape), incoming.tiles(), reserved).await?;
    Ok(acks.with_kept(kept))
}

/// What a store stream reads.
struct Incoming {
    arrivals: Arrivals,
    held: Held,
    messages: Messages,
    reserved: Arc<Reservation>,
    memory: Option<Arc<dyn TileMemory>>,
    patience: TcpPatience,
}

impl Incoming {
    /// Until the end or the first error. The epoch is given back, or is over, before the stream ends.
    fn tiles(self) -> impl Stream<Item = Result<TileMessage, Status>> + Send + 'static {
        stream::unfold(Some(self), |incoming| async move {
            let mut incoming = incoming?;
            match incoming.next().await.transpose()? {
                Ok(tile) => Some((Ok(tile), Some(incoming))),
                Err(status) => Some((Err(status), None)),
            }
        })
    }

    async fn next(&mut self) -> Result<Option<TileMessage>, Status> {
        let next = next_message(&mut self.messages, &self.reserved, self.patience).await?;
        let Some((of_message, message)) = next else {
            self.held.finish();
            return Ok(None);
        };
        let mut wire = match tile_part(message)? {
            Ok(mut tile) => {
                tile.data = tile.data.holding(of_message);
                return Ok(Some(tile));
            }
            Err(wire) => wire,
        };
        let Some(named) = self.arrivals.named(&mut wire).map_err(|error| error.within("tile"))? else {
            let tile = TileMessage::try_from(wire).map_err(|fault| Error::from(fault.within("tile")))?;
            let mut tile = tiles::whole(tile)?;
            tile.data = tile.data.holding(of_message);
            return Ok(Some(tile));
        };
        // A stream never waits for what it has itself.
        drop(of_message);
        let of_body = self.reserved.room(named.bytes()).await?;
        let mut tile = self.arrivals.receive(named, self.memory.as_deref()).await?;
        tile.data = tile.data.holding(of_body);
        Ok(Some(tile))
    }
}

/// A read stream whose messages name bodies that are exchanged in the epoch of `held`.
pub(super) async fn get_blocks(
    service: &ShardService,
    hop: Hop,
    get: GetBlocks,
    held: Held,
    reserved: Arc<Reservation>,
) -> Result<OutgoingBody, Error> {
    let kept = held.kept();
    let answers = hop.answer(service.shard.get_blocks(&hop.context, get)).await?;
    let sending = Sending { answers, bodies: held.bodies(), held };
    // The call lasts until the last body is out, which is later than the last answer.
    let outgoing = hop.bound(Box::pin(sending.messages()));
    let outgoing = outgoing.map(|outgoing| outgoing.map_err(Status::from));
    Ok(OutgoingBody::response(outgoing).with_kept(kept).keeping(reserved))
}

/// What a read stream sends.
struct Sending {
    answers: BoxStream<Option<TileMessage>>,
    bodies: Bodies,
    held: Held,
}

impl Sending {
    fn messages(self) -> impl Stream<Item = Result<Outgoing, Error>> + Send + 'static {
        stream::unfold(Some(self), |sending| async move {
            let mut sending = sending?;
            match sending.next().await.transpose()? {
                Ok(message) => Some((Ok(message), Some(sending))),
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    async fn next(&mut self) -> Result<Option<Outgoing>, Error> {
        let Some(answer) = self.answers.next().await.transpose()? else {
            self.bodies.all_sent().await?;
            self.held.finish();
            return Ok(None);
        };
        let Some(tile) = answer else {
            return Ok(Some(Outgoing::Encoded(tiles::encoded(&v1::GetBlocksResponse::from(None)))));
        };
        let named = self.bodies.name(&tile).await;
        Ok(Some(match named.map_err(|error| self.why(error))? {
            Some(wire) => {
                let message = v1::GetBlocksResponse { tile: Some(wire), missing: false };
                Outgoing::Encoded(tiles::encoded(&message))
            }
            None => Outgoing::Got(tile),
        }))
    }

    /// Why a call goes no further whose reader takes nothing: for the reason that the shard has, if it has one.
    fn why(&mut self, error: Error) -> Error {
        reason_of_shard(&mut self.answers).unwrap_or(error)
    }
}
