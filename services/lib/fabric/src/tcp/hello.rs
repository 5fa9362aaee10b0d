//! The first bytes of a tile connection: who it is, said by the client and confirmed by the server.

use std::io;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::Token;

/// First bytes of each side, with the version of the frames.
const MAGIC: [u8; 8] = *b"LSTCP\0\0\x01";
/// Magic, name of the connection, token.
const HELLO_BYTES: usize = 32;

/// The client's side: presents the token and waits for the confirmation.
pub(crate) async fn introduce(socket: &mut TcpStream, id: u64, token: &Token) -> io::Result<()> {
    let mut hello = [0; HELLO_BYTES];
    hello[..8].copy_from_slice(&MAGIC);
    hello[8..16].copy_from_slice(&id.to_le_bytes());
    hello[16..].copy_from_slice(token.as_bytes());
    socket.write_all(&hello).await?;
    let mut answer = [0; MAGIC.len()];
    socket.read_exact(&mut answer).await?;
    if answer == MAGIC { Ok(()) } else { Err(foreign()) }
}

/// The server's side: what the client presents.
pub(super) async fn presented(socket: &mut TcpStream) -> io::Result<(u64, Token)> {
    let mut hello = [0; HELLO_BYTES];
    socket.read_exact(&mut hello).await?;
    let token = Token::from_slice(&hello[16..]).filter(|_| hello[..8] == MAGIC).ok_or_else(foreign)?;
    Ok((u64::from_le_bytes(std::array::from_fn(|byte| hello[8 + byte])), token))
}

/// Confirms, without waiting: a new socket has room for so few bytes.
pub(super) fn confirm(socket: &TcpStream) -> bool {
    matches!(socket.try_write(&MAGIC), Ok(count) if count == MAGIC.len())
}

fn foreign() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the peer does not speak this version of the lane")
}
