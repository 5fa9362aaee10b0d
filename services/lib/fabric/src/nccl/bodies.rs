//! The bodies of one call: sent in the order in which its messages name them, received in the same.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use longshore_proto::{
    types::{NcclBytes, TileData, TileMemory, TileMessage, TileRoom},
    v1,
};

use super::{
    EPOCH, End, State,
    end::{Landed, SENDS_MAX, Waiting},
    over,
};
use crate::{Error, TcpPatience, tcp::Buffers};

/// Smaller bodies of tiles go in their message: an exchange costs more than they do.
const EXCHANGED_BYTES_MIN: usize = 16 << 10;
/// The same of the partials of a message. More than for tiles, of which many are under way at a time: a layer of a decode step waits for
/// these. One row of 32 heads of 128 elements has 16.25 KiB for each stripe. Chosen, not measured.
pub(crate) const PARTIALS_BYTES_MIN: usize = 64 << 10;

/// The bodies that a call sends.
#[derive(Debug)]
pub(crate) struct Bodies {
    end: Arc<End>,
    epoch: u64,
    named: u64,
    under_way: VecDeque<Waiting<()>>,
    patience: TcpPatience,
}

impl Bodies {
    /// Of a call that has `epoch` for itself.
    pub(crate) fn new(end: Arc<End>, epoch: u64, patience: TcpPatience) -> Self {
        Self { end, epoch, named: 0, under_way: VecDeque::new(), patience }
    }

    /// Begins to send a body and gives the message that names it, which must be the next of the call; `None` when the tile must travel in
    /// a message. Waits while many are under way.
    pub(crate) async fn name(&mut self, tile: &TileMessage) -> Result<Option<v1::Tile>, Error> {
        let length =
            u32::try_from(tile.data.len()).ok().filter(|&length| length as usize >= EXCHANGED_BYTES_MIN);
        let Some(bytes) = length.filter(|_| tile.data.heads().is_none()) else { return Ok(None) };
        let nccl = Some(self.begin(tile.data.pieces(), bytes).await?.into());
        let bare = TileMessage { data: Bytes::new().into(), ..tile.clone() };
        Ok(Some(v1::Tile { nccl, ..v1::Tile::from(bare) }))
    }

    /// The same for the partials of an answer, as one body; `false` when they must travel in the message. After an error the answer is as it
    /// was.
    pub(crate) async fn name_partials(&mut self, answer: &mut v1::AttendResponse) -> Result<bool, Error> {
        let length = answer.body_bytes();
        let Some(bytes) = u32::try_from(length).ok().filter(|_| length >= PARTIALS_BYTES_MIN) else {
            return Ok(false);
        };
        answer.nccl = Some(self.begin(answer.body(), bytes).await?.into());
        answer.leave_out_body();
        Ok(true)
    }

    /// Begins to send a body as soon as few enough are under way.
    async fn begin(&mut self, pieces: Vec<Bytes>, bytes: u32) -> Result<NcclBytes, Error> {
        self.room().await?;
        // What is named now would never come.
        if self.end.state() != State::Joined(self.epoch) {
            return Err(over(format!("of number {} is over", self.epoch)));
        }
        let patience = self.patience.of_message(bytes as usize);
        self.under_way.push_back(self.end.send(self.epoch, pieces, patience)?);
        let number = self.named;
        self.named += 1;
        Ok(NcclBytes { number, bytes })
    }

    /// Waits until few enough are under way for one more.
    async fn room(&mut self) -> Result<(), Error> {
        while self.under_way.len() >= SENDS_MAX {
            self.sent().await?;
        }
        Ok(())
    }

    /// Waits until all are sent.
    pub(crate) async fn all_sent(&mut self) -> Result<(), Error> {
        while !self.under_way.is_empty() {
            self.sent().await?;
        }
        Ok(())
    }

    /// Waits for the oldest one. Dropping the future loses nothing.
    async fn sent(&mut self) -> Result<(), Error> {
        let Some(oldest) = self.under_way.front_mut() else { return Ok(()) };
        let sent = oldest.await;
        self.under_way.pop_front();
        sent
    }
}

/// The bodies that a call receives.
#[derive(Debug)]
pub(crate) struct Arrivals {
    end: Arc<End>,
    epoch: u64,
    came: u64,
    bytes_max: usize,
    patience: TcpPatience,
    buffers: Buffers,
}

/// Memory that a body came to, as bytes.
struct Owned(Box<dyn TileRoom>);

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

/// A tile whose body is to come.
#[derive(Debug)]
pub(crate) struct Named {
    tile: TileMessage,
    body: NcclBytes,
}

impl Named {
    /// Bytes of the body.
    pub(crate) fn bytes(&self) -> usize {
        self.body.bytes as usize
    }
}

impl Arrivals {
    /// Of a call that has `epoch` for itself; bodies beyond `bytes_max` are refused.
    pub(crate) fn new(
        (end, epoch): (Arc<End>, u64),
        bytes_max: usize,
        patience: TcpPatience,
        buffers: Buffers,
    ) -> Self {
        Self { end, epoch, came: 0, bytes_max, patience, buffers }
    }

    /// What a message with `Tile.nccl` names, checked; `None`: the tile is in the message.
    pub(crate) fn named(&self, wire: &mut v1::Tile) -> Result<Option<Named>, Error> {
        let Some(nccl) = wire.nccl.take() else { return Ok(None) };
        let body = self.announced(nccl)?;
        if !wire.data.is_empty() {
            return Err(Error::invalid(EPOCH, "is set beside `data`"));
        }
        if wire.heads.is_some() {
            return Err(Error::invalid(EPOCH, "is set beside `heads`, parts of tiles come in messages"));
        }
        let tile = TileMessage::try_from(std::mem::take(wire))?;
        Ok(Some(Named { tile, body }))
    }

    /// A body that a message names, if it is the next one and not too long.
    pub(crate) fn announced(&self, wire: v1::NcclBytes) -> Result<NcclBytes, Error> {
        let body = NcclBytes::try_from(wire).map_err(|fault| fault.within(EPOCH))?;
        if body.number != self.came {
            let problem = format!("is {}, must be {}", body.number, self.came);
            return Err(Error::invalid("nccl.number", problem));
        }
        if body.bytes as usize > self.bytes_max {
            let problem = format!("is {}, the limit is {}; hint: smaller blocks", body.bytes, self.bytes_max);
            return Err(Error::invalid("nccl.bytes", problem));
        }
        Ok(body)
    }

    /// Receives a body to memory of the lane's own.
    pub(crate) async fn receive_bytes(&mut self, body: NcclBytes) -> Result<Bytes, Error> {
        let room = Box::new(self.buffers.filled(body.bytes as usize));
        let (room, _) = self.land(room).await?;
        Ok(Bytes::from_owner(Owned(room)))
    }

    /// Receives a body that fills `room`.
    async fn land(&mut self, room: Box<dyn TileRoom>) -> Result<Landed, Error> {
        let patience = self.patience.of_announced((*room).as_ref().len());
        let landed = self.end.receive(self.epoch, room, patience)?.await?;
        self.came += 1;
        Ok(landed)
    }

    /// Receives a body to where `memory` wants it, to memory of the lane's own without it. Verified by whoever uses it, as on every lane.
    pub(crate) async fn receive(
        &mut self,
        named: Named,
        memory: Option<&dyn TileMemory>,
    ) -> Result<TileMessage, Error> {
        let bytes = named.bytes();
        let room = memory.and_then(|memory| memory.room(bytes));
        // Memory of another length than was asked for is of no use.
        let room = room.filter(|room| (**room).as_ref().len() == bytes);
        let room = room.unwrap_or_else(|| -> Box<dyn TileRoom> { Box::new(self.buffers.filled(bytes)) });
        let (room, crc32c) = self.land(room).await?;
        Ok(TileMessage { data: TileData::from_landed(room, crc32c), ..named.tile })
    }
}
