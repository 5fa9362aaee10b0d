//! The handshake of two processes: who they are, and the descriptors of their shared memory.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use rustix::{
    cmsg_space,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    },
    process::geteuid,
};
use tokio::{io::Interest, net::UnixStream};

use super::{
    arena::{Arena, Window},
    link::{Link, SLOT_BYTES},
};

/// First bytes of each side, with the version of the protocol.
const MAGIC: [u8; 8] = *b"LSSHM\0\0\x01";
/// Largest arena of a peer that is mapped.
const ARENA_BYTES_MAX: u64 = 256 << 20;
/// Magic, bytes of the arena, bytes of a slot.
const HELLO_BYTES: usize = 24;

/// The client's side: offers an arena and one end of the socket for releases, gets the other's arena.
pub(crate) async fn connect(stream: UnixStream, arena_bytes: usize) -> io::Result<(UnixStream, Arc<Link>)> {
    check_peer(&stream)?;
    let arena = Arena::new(arena_bytes)?;
    let (own, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    send(&stream, &arena, &[arena.file().as_fd(), theirs.as_fd()]).await?;
    let (bytes, [file]) = receive::<1>(&stream).await?;
    let link = Link::new(arena, Window::new(&file, bytes)?, bell(own)?);
    Ok((stream, Arc::new(link)))
}

/// The server's side.
pub(crate) async fn accept(stream: UnixStream, arena_bytes: usize) -> io::Result<(UnixStream, Arc<Link>)> {
    check_peer(&stream)?;
    let (bytes, [file, theirs]) = receive::<2>(&stream).await?;
    let window = Window::new(&file, bytes)?;
    let arena = Arena::new(arena_bytes)?;
    send(&stream, &arena, &[arena.file().as_fd()]).await?;
    Ok((stream, Arc::new(Link::new(arena, window, bell(theirs)?))))
}

/// Memory is shared with processes of the same user only.
fn check_peer(stream: &UnixStream) -> io::Result<()> {
    let (peer, own) = (stream.peer_cred()?.uid(), geteuid().as_raw());
    if peer != own {
        let problem = format!("the peer is user {peer}, this process is user {own}");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, problem));
    }
    Ok(())
}

fn bell(socket: OwnedFd) -> io::Result<UnixStream> {
    let socket = std::os::unix::net::UnixStream::from(socket);
    socket.set_nonblocking(true)?;
    UnixStream::from_std(socket)
}

async fn send(stream: &UnixStream, arena: &Arena, files: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut hello = [0; HELLO_BYTES];
    hello[..8].copy_from_slice(&MAGIC);
    hello[8..16].copy_from_slice(&(arena.bytes() as u64).to_le_bytes());
    hello[16..].copy_from_slice(&(SLOT_BYTES as u64).to_le_bytes());
    let sent = stream
        .async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(2))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fits = control.push(SendAncillaryMessage::ScmRights(files));
            debug_assert!(fits, "there is room for two descriptors");
            Ok(sendmsg(stream, &[IoSlice::new(&hello)], &mut control, SendFlags::NOSIGNAL)?)
        })
        .await?;
    // The socket is new: what is this short goes at once or not at all.
    if sent == HELLO_BYTES { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Bytes of the peer's arena, and exactly `COUNT` descriptors.
async fn receive<const COUNT: usize>(stream: &UnixStream) -> io::Result<(usize, [OwnedFd; COUNT])> {
    let mut hello = [0; HELLO_BYTES];
    let (bytes, files) = stream
        .async_io(Interest::READABLE, || {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(2))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let got =
                recvmsg(stream, &mut [IoSliceMut::new(&mut hello)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
            let mut files = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    files.extend(rights);
                }
            }
            Ok((got.bytes, files))
        })
        .await?;
    let refuse = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why);
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| hello[at + byte]));
    if bytes != HELLO_BYTES || hello[..8] != MAGIC {
        return Err(refuse("the peer does not speak this version of the lane"));
    }
    let (arena, slot) = (number(8), number(16));
    if slot != SLOT_BYTES as u64 || arena > ARENA_BYTES_MAX || !arena.is_multiple_of(slot) {
        return Err(refuse("the peer's arena has a size that is not taken"));
    }
    let files = files.try_into().map_err(|_| refuse("the peer sent another number of descriptors"))?;
    Ok((arena as usize, files))
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn both_sides_map_each_other() {
        let (a, b) = UnixStream::pair().unwrap();
        let (client, server) = tokio::join!(connect(a, 4 * SLOT_BYTES), accept(b, 2 * SLOT_BYTES));
        let ((_, client), (_, server)) = (client.unwrap(), server.unwrap());
        assert_eq!((client.slots_lent(), server.slots_lent()), (0, 0));
    }

    #[tokio::test]
    async fn who_says_something_else_is_refused() {
        let arena = Arena::new(SLOT_BYTES).unwrap();
        let good = {
            let mut hello = [0; HELLO_BYTES];
            hello[..8].copy_from_slice(&MAGIC);
            hello[8..16].copy_from_slice(&(SLOT_BYTES as u64).to_le_bytes());
            hello[16..].copy_from_slice(&(SLOT_BYTES as u64).to_le_bytes());
            hello
        };
        let check = async |bytes: &[u8]| {
            let (mut a, b) = UnixStream::pair().unwrap();
            a.write_all(bytes).await.unwrap();
            a.shutdown().await.unwrap();
            accept(b, SLOT_BYTES).await.unwrap_err().to_string()
        };
        assert!(check(b"").await.contains("version"));
        assert!(check(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.contains("version"));
        assert!(check(&good).await.contains("descriptors"), "nothing is mapped without them");
        let mut huge = good;
        huge[8..16].copy_from_slice(&(1u64 << 40).to_le_bytes());
        assert!(check(&huge).await.contains("size"));
        let (a, b) = UnixStream::pair().unwrap();
        // One descriptor instead of two.
        send(&a, &arena, &[arena.file().as_fd()]).await.unwrap();
        assert!(accept(b, SLOT_BYTES).await.unwrap_err().to_string().contains("descriptors"));
    }
}
