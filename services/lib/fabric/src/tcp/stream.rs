//! One tile connection while a call has it: frames in and out. Nothing here holds a thread: whoever has the stream waits as a task.

use std::{io, io::IoSlice, time::Duration};

use bytes::Bytes;
use longshore_blocks::crc32c_append;
use longshore_proto::types::{TileData, TileMemory, TileMessage};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::{
    Buffers, TcpPatience,
    frame::{Frame, HEAD_BYTES, TileHead},
};
use crate::{Code, Error};

/// Most bytes that are read before they are checked: they are in the second cache then.
const STEP_BYTES: usize = 64 << 10;
/// Bytes of a body after which the thread is given back, and within which a peer must make progress.
const TURN_BYTES: usize = 256 << 10;

/// Why a tile connection is of no use any more.
#[derive(Debug)]
pub(crate) enum Fault {
    /// It failed, or its peer closed it.
    Broken(io::Error),
    /// What came cannot be what may come.
    Nonsense { field: &'static str, problem: String },
    /// Nothing moved for that long.
    Late(Duration),
    /// An own tile is longer than the peer takes.
    TooLong { bytes: usize, limit: usize },
}

impl Fault {
    /// Of what a client sent.
    pub(crate) fn of_request(self) -> Error {
        match self {
            Self::Nonsense { field, problem } => Error::invalid(field, problem),
            other => other.of_connection(),
        }
    }

    /// Of what a server sent: what does not make sense is not used.
    pub(crate) fn of_answer(self) -> Error {
        match self {
            Self::Nonsense { field, problem } => {
                let text = format!("the answer of the peer makes no sense: `{field}` {problem}");
                Error::new(Code::DataLoss, text)
            }
            other => other.of_connection(),
        }
    }

    fn of_connection(self) -> Error {
        let text = match self {
            Self::TooLong { bytes, limit } => {
                let text = format!(
                    "`tile.data` has {bytes} bytes, the limit is {limit} bytes; hint: smaller blocks"
                );
                return Error::new(Code::OutOfRange, text).with_field("tile.data");
            }
            Self::Broken(error) => format!("the tile connection broke: {error}"),
            Self::Late(patience) => {
                format!("nothing moved on the tile connection for {} ms", patience.as_millis())
            }
            Self::Nonsense { field, problem } => format!("`{field}` {problem}"),
        };
        Error::new(Code::Unavailable, text)
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

/// A tile connection that a call has.
#[derive(Debug)]
pub(crate) struct TileStream {
    socket: TcpStream,
    lease: u64,
    sent: u32,
    received: u32,
    /// The head that is coming, of which there are so many bytes.
    head: ([u8; HEAD_BYTES], usize),
    body_bytes_max: usize,
    patience: TcpPatience,
}

impl TileStream {
    /// For the call `lease`.
    pub(crate) fn new(socket: TcpStream, lease: u64, body_bytes_max: usize, patience: TcpPatience) -> Self {
        let head = ([0; HEAD_BYTES], 0);
        Self { socket, lease, sent: 0, received: 0, head, body_bytes_max, patience }
    }

    /// The connection, when the call is over.
    pub(crate) fn into_socket(self) -> TcpStream {
        self.socket
    }

    /// The next frame, of which a tile's body must be read before the one after it. Waits as long as it takes to begin, at most `limit`
    /// where there is one. Dropping the future loses nothing.
    pub(crate) async fn next(&mut self, limit: Option<Duration>) -> Result<Frame, Fault> {
        loop {
            let (head, have) = &mut self.head;
            if *have == HEAD_BYTES {
                *have = 0;
                let frame = Frame::decode(head, (self.lease, self.received), self.body_bytes_max)?;
                self.received = self.received.wrapping_add(1);
                return Ok(frame);
            }
            let read = self.socket.read(&mut head[*have..]);
            let count = match limit.or((*have > 0).then_some(self.patience.read)) {
                Some(patience) => timeout(patience, read).await.map_err(|_| Fault::Late(patience))??,
                None => read.await?,
            };
            if count == 0 {
                return Err(Fault::Broken(io::ErrorKind::UnexpectedEof.into()));
            }
            *have += count;
        }
    }

    /// Reads the body that follows a tile's head to where `memory` wants it; to `buffers` without it.
    pub(crate) async fn tile(
        &mut self,
        head: TileHead,
        memory: Option<&dyn TileMemory>,
        buffers: &Buffers,
    ) -> Result<TileMessage, Fault> {
        let bytes = head.bytes as usize;
        let room = memory.and_then(|memory| memory.room(bytes));
        // Memory of another length than was asked for is of no use.
        let room = room.filter(|room| (**room).as_ref().len() == bytes);
        let mut room = room.unwrap_or_else(|| buffers.take(bytes));
        let crc32c = self.body((*room).as_mut()).await?;
        let data = TileData::from_landed(room, crc32c);
        Ok(TileMessage { key: head.key, layer: head.layer, data, crc32c: head.crc32c, place: head.place })
    }

    /// Fills `into` from the socket; the CRC-32C of what was written.
    async fn body(&mut self, into: &mut [u8]) -> Result<u32, Fault> {
        let patience = self.patience.read;
        let mut crc32c = 0;
        for (turn, part) in into.chunks_mut(TURN_BYTES).enumerate() {
            if turn > 0 {
                tokio::task::yield_now().await;
            }
            let filled = timeout(patience, fill(&mut self.socket, part, crc32c)).await;
            crc32c = filled.map_err(|_| Fault::Late(patience))??;
        }
        Ok(crc32c)
    }

    /// Sends a tile.
    pub(crate) async fn send_tile(&mut self, tile: &TileMessage) -> Result<(), Fault> {
        let head = TileHead::of(tile).filter(|head| head.bytes as usize <= self.body_bytes_max);
        let too_long = Fault::TooLong { bytes: tile.data.len(), limit: self.body_bytes_max };
        let head = head.ok_or(too_long)?;
        self.send(Frame::Tile(head), &tile.data.pieces()).await
    }

    /// Sends a frame, and `body` behind its head.
    pub(crate) async fn send(&mut self, frame: Frame, body: &[Bytes]) -> Result<(), Fault> {
        let head = frame.encode(self.lease, self.sent);
        self.sent = self.sent.wrapping_add(1);
        let mut slices: Vec<IoSlice<'_>> = Vec::with_capacity(1 + body.len());
        slices.push(IoSlice::new(&head));
        slices.extend(body.iter().map(|piece| IoSlice::new(piece)));
        let mut left = &mut slices[..];
        let patience = self.patience.write;
        while !left.is_empty() {
            let written = timeout(patience, self.socket.write_vectored(left)).await;
            let count = written.map_err(|_| Fault::Late(patience))??;
            if count == 0 {
                return Err(Fault::Broken(io::ErrorKind::WriteZero.into()));
            }
            // Passes over empty pieces too.
            IoSlice::advance_slices(&mut left, count);
            if count >= TURN_BYTES {
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }
}

async fn fill(socket: &mut TcpStream, into: &mut [u8], mut crc32c: u32) -> io::Result<u32> {
    let mut at = 0;
    while at < into.len() {
        let end = into.len().min(at + STEP_BYTES);
        let count = socket.read(&mut into[at..end]).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        crc32c = crc32c_append(crc32c, &into[at..at + count]);
        at += count;
    }
    Ok(crc32c)
}
