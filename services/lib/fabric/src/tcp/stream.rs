//! One tile connection while a call has it: frames in and out. Nothing here holds a thread: whoever has the stream waits as a task.

use std::{io, io::IoSlice};

use bytes::{BufMut, Bytes};
use longshore_blocks::crc32c_append;
use longshore_proto::types::{TileData, TileMemory, TileMessage};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Duration, timeout},
};

use super::{
    Buffers, TcpPatience,
    frame::{Frame, HEAD_BYTES, TileHead},
    pace::Pace,
};
use crate::{Code, Error};

/// Most bytes that are read before they are checked: they are in the second cache then.
const STEP_BYTES: usize = 64 << 10;
/// Bytes of a body after which the thread is given back, and within which a peer must make progress.
const TURN_BYTES: usize = 256 << 10;

/// Field of errors that say of a tile connection that it failed. In those that refuse to begin a call it has its place in the request.
pub(super) const CONNECTION: &str = "connection";

/// Why a tile connection is of no use any more.
#[derive(Debug)]
pub(crate) enum Fault {
    /// It failed, or its peer closed it.
    Broken(io::Error),
    /// What came cannot be what may come.
    Nonsense { field: &'static str, problem: String },
    /// Nothing moved for that long.
    Late(Duration),
    /// A frame was not whole after so long, although it went on.
    Slow(Duration),
    /// An own tile is longer than the peer takes.
    TooLong { bytes: usize, limit: usize },
    /// What was to be sent is no whole tile.
    Part,
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
            Self::Slow(whole) => {
                format!("a frame on the tile connection was not whole after {} ms", whole.as_millis())
            }
            Self::Part => return crate::tiles::part_refused(),
            Self::Nonsense { field, problem } => format!("`{field}` {problem}"),
        };
        Error::new(Code::Unavailable, text).with_field(CONNECTION)
    }

    /// Whether the connection is at fault, and not what was to be sent over it.
    pub(crate) fn is_of_connection(&self) -> bool {
        !matches!(self, Self::TooLong { .. } | Self::Part)
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
    /// How long the rest of it may take.
    head_pace: Option<Pace>,
    body_bytes_max: usize,
    patience: TcpPatience,
}

impl TileStream {
    /// For the call `lease`.
    pub(crate) fn new(socket: TcpStream, lease: u64, body_bytes_max: usize, patience: TcpPatience) -> Self {
        let head = ([0; HEAD_BYTES], 0);
        Self { socket, lease, sent: 0, received: 0, head, head_pace: None, body_bytes_max, patience }
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
                self.head_pace = None;
                let frame = Frame::decode(head, (self.lease, self.received), self.body_bytes_max)?;
                self.received = self.received.wrapping_add(1);
                return Ok(frame);
            }
            let (pace, read) = (self.head_pace, self.socket.read(&mut head[*have..]));
            let read = async {
                match pace {
                    Some(pace) => pace.step(read).await,
                    None => Ok(read.await?),
                }
            };
            let count = match limit {
                Some(limit) => timeout(limit, read).await.map_err(|_| Fault::Late(limit))??,
                None => read.await?,
            };
            if count == 0 {
                return Err(Fault::Broken(io::ErrorKind::UnexpectedEof.into()));
            }
            *have += count;
            // All of a head comes within the patience: a byte now and then is no progress.
            self.head_pace.get_or_insert_with(|| Pace::new(self.patience.read, self.patience.read));
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
        let data = match room.filter(|room| (**room).as_ref().len() == bytes) {
            Some(mut room) => {
                let crc32c = self.body(bytes, Landing::Room((*room).as_mut())).await?;
                TileData::from_landed(room, crc32c)
            }
            None => {
                let mut buffer = buffers.take(bytes);
                let crc32c = self.body(bytes, Landing::Growing(buffer.bytes())).await?;
                TileData::from_landed(Box::new(buffer), crc32c)
            }
        };
        Ok(TileMessage { key: head.key, layer: head.layer, data, crc32c: head.crc32c, place: head.place })
    }

    /// Reads `bytes` from the socket; the CRC-32C of what was written where they landed.
    async fn body(&mut self, bytes: usize, mut landing: Landing<'_>) -> Result<u32, Fault> {
        let pace = Pace::of_body(self.patience.read, bytes, &self.patience);
        let (mut crc32c, mut left) = (0, bytes);
        while left > 0 {
            if left < bytes {
                tokio::task::yield_now().await;
            }
            let turn = left.min(TURN_BYTES);
            crc32c = pace.step(landing.fill(&mut self.socket, turn, crc32c)).await?;
            left -= turn;
        }
        Ok(crc32c)
    }

    /// Sends a tile.
    pub(crate) async fn send_tile(&mut self, tile: &TileMessage) -> Result<(), Fault> {
        // A frame has no place for what proves a part.
        if tile.data.heads().is_some() {
            return Err(Fault::Part);
        }
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
        let bytes = body.iter().map(Bytes::len).sum();
        let pace = Pace::of_body(self.patience.write, bytes, &self.patience);
        while !left.is_empty() {
            let count = pace.step(self.socket.write_vectored(left)).await?;
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

/// Where a body goes as it comes.
enum Landing<'a> {
    /// What is left of memory that somebody gave.
    Room(&'a mut [u8]),
    /// Memory of the lane's own, with room for all of it.
    Growing(&'a mut Vec<u8>),
}

impl Landing<'_> {
    /// The next `bytes` of the body; the CRC-32C of all until then.
    async fn fill(&mut self, socket: &mut TcpStream, bytes: usize, mut crc32c: u32) -> io::Result<u32> {
        let mut left = bytes;
        while left > 0 {
            let came = self.read(socket, left.min(STEP_BYTES)).await?;
            if came.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            crc32c = crc32c_append(crc32c, came);
            left -= came.len();
        }
        Ok(crc32c)
    }

    /// What comes next, of `bytes` at most.
    async fn read(&mut self, socket: &mut TcpStream, bytes: usize) -> io::Result<&[u8]> {
        match self {
            Self::Room(room) => {
                let count = socket.read(&mut room[..bytes]).await?;
                let (came, rest) = std::mem::take(room).split_at_mut(count);
                *room = rest;
                Ok(came)
            }
            Self::Growing(buffer) => {
                let before = buffer.len();
                socket.read_buf(&mut (&mut **buffer).limit(bytes)).await?;
                Ok(&buffer[before..])
            }
        }
    }
}
