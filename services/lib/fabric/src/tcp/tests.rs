//! The door with real sockets and a clock of the test's; streams over loopback.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::FutureExt;
use longshore_blocks::{BlockKey, crc32c};
use longshore_proto::{types::TileMessage, v1};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::Instant,
};

use super::{
    Buffers, Door, Fault, Frame, TcpPatience, TileStream, TileTraffic, Token, frame::TileHead, hello,
};
use crate::Code;

const BODY_BYTES_MAX: usize = 1 << 20;

fn patience() -> TcpPatience {
    let short = Duration::from_millis(80);
    // Whatever the length of a frame: who moves nothing is late before its frame is slow.
    TcpPatience { read: short, write: short, bytes_per_second_min: 1, ..TcpPatience::default() }
}

fn door(connections_max: usize) -> Arc<Door> {
    let door = Arc::new(Door::new(connections_max, BODY_BYTES_MAX, patience(), TileTraffic::default()));
    door.open(1);
    door
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap());
    let (client, server) = tokio::join!(client, listener.accept());
    let (client, server) = (client.unwrap(), server.unwrap().0);
    server.writable().await.unwrap();
    (client, server)
}

/// An open connection: the client's socket, and what calls say of it.
async fn opened(door: &Arc<Door>, now: Instant) -> (TcpStream, v1::TileConnection) {
    let offer = door.offer(&Arc::default(), now).unwrap();
    let (mut client, mut server) = pair().await;
    let token = Token::from_slice(&offer.token).unwrap();
    let greeting = async {
        let (id, token) = hello::presented(&mut server).await.unwrap();
        assert!(door.admit(id, &token, server, now));
    };
    let (introduced, ()) = tokio::join!(hello::introduce(&mut client, offer.id, &token), greeting);
    introduced.unwrap();
    (client, v1::TileConnection { id: offer.id, token: offer.token, lease: 1 })
}

fn stream(socket: TcpStream) -> TileStream {
    TileStream::new(socket, 1, BODY_BYTES_MAX, TcpPatience::default())
}

/// One that waits for nobody for long.
fn hasty(socket: TcpStream) -> TileStream {
    TileStream::new(socket, 1, BODY_BYTES_MAX, patience())
}

fn tile(bytes: usize) -> TileMessage {
    let data: Vec<u8> = (0..bytes).map(|i| (i % 251) as u8).collect();
    TileMessage { key: BlockKey([3; 16]), layer: 2, crc32c: crc32c(&data), data: data.into(), place: None }
}

#[tokio::test]
async fn a_token_opens_one_connection_once_and_in_time() {
    let (door, now) = (door(10), Instant::now());
    let offer = door.offer(&Arc::default(), now).unwrap();
    let token = Token::from_slice(&offer.token).unwrap();
    let admit = async |id, token: &Token, at| {
        let (client, server) = pair().await;
        (door.admit(id, token, server, at), client)
    };
    let mut wrong = offer.token.to_vec();
    wrong[15] ^= 1;
    let wrong = Token::from_slice(&wrong).unwrap();
    assert!(!admit(offer.id, &wrong, now).await.0);
    assert!(!admit(offer.id + 1, &token, now).await.0, "a token belongs to its connection");
    assert!(!admit(offer.id, &token, now + Duration::from_secs(6)).await.0, "it came too late");
    let (taken, _client) = admit(offer.id, &token, now).await;
    assert!(taken, "what others tried does not spoil it");
    assert!(!admit(offer.id, &token, now).await.0, "a token is good once");
}

#[tokio::test]
async fn only_who_knows_the_token_leases_and_one_call_at_a_time() {
    let (door, now) = (door(10), Instant::now());
    let (_client, wanted) = opened(&door, now).await;
    let code = |wanted: &v1::TileConnection| door.lease(wanted).unwrap_err().code;
    let wrong = v1::TileConnection { token: vec![0; 16].into(), ..wanted };
    assert_eq!(code(&wrong), Code::Unavailable);
    let short = v1::TileConnection { token: vec![0; 15].into(), ..wanted };
    assert_eq!(door.lease(&short).unwrap_err().field.as_deref(), Some("connection.token"));
    let unborn = v1::TileConnection { lease: 0, ..wanted.clone() };
    assert_eq!(door.lease(&unborn).unwrap_err().field.as_deref(), Some("connection.lease"));
    let mut lease = door.lease(&wanted).unwrap();
    assert_eq!(code(&v1::TileConnection { lease: 2, ..wanted.clone() }), Code::Unavailable, "it has a call");
    let kept = lease.kept();
    lease.finish();
    drop(lease);
    assert!(kept.load(Ordering::SeqCst));
    assert_eq!(code(&wanted), Code::InvalidArgument, "that lease is over");
    let next = door.lease(&v1::TileConnection { lease: 2, ..wanted.clone() }).unwrap();
    let kept = next.kept();
    drop(next);
    assert!(!kept.load(Ordering::SeqCst));
    assert_eq!(code(&v1::TileConnection { lease: 3, ..wanted }), Code::Unavailable, "it was closed");
    assert_eq!(door.count(), 0);
}

#[tokio::test]
async fn offers_and_connections_are_bounded_and_grow_old() {
    let (door, now) = (door(3), Instant::now());
    let peer = Arc::new(AtomicUsize::new(0));
    let (client, _wanted) = opened(&door, now).await;
    for _ in 0..2 {
        door.offer(&peer, now).unwrap();
    }
    let refused = door.offer(&peer, now).unwrap_err();
    assert_eq!((refused.code, refused.retry_after.is_some()), (Code::ResourceExhausted, true));
    assert_eq!(peer.load(Ordering::SeqCst), 2);
    // Offers that nobody took make room.
    door.offer(&peer, now + Duration::from_secs(6)).unwrap();
    assert_eq!((door.count(), peer.load(Ordering::SeqCst)), (2, 1));
    door.forget_old(now + Duration::from_secs(61));
    assert_eq!((door.count(), peer.load(Ordering::SeqCst)), (0, 0));
    let mut client = client;
    assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0, "an idle connection is closed");
    let many = Arc::new(Door::new(1000, BODY_BYTES_MAX, patience(), TileTraffic::default()));
    assert_eq!(many.offer(&peer, now).unwrap_err().code, Code::Unimplemented, "it does not listen yet");
    many.open(1);
    let offered = (0..100).filter(|_| many.offer(&peer, now).is_ok()).count();
    assert_eq!(offered, 64, "one peer has so many at most");
    many.close();
    assert_eq!((many.count(), peer.load(Ordering::SeqCst)), (0, 0));
}

#[tokio::test]
async fn open_connections_are_counted_and_offers_are_not() {
    let (traffic, now) = (TileTraffic::default(), Instant::now());
    let door = Arc::new(Door::new(9, BODY_BYTES_MAX, patience(), traffic.clone()));
    door.open(1);
    door.offer(&Arc::default(), now).unwrap();
    assert_eq!(traffic.connections(), 0);
    let (_first, wanted) = opened(&door, now).await;
    let (_second, _) = opened(&door, now).await;
    let lease = door.lease(&wanted).unwrap();
    assert_eq!(traffic.connections(), 2);
    drop(lease);
    assert_eq!(traffic.connections(), 1, "a call that did not end well closed it");
    door.close();
    assert_eq!(traffic.connections(), 0);
}

#[tokio::test]
async fn connections_whose_client_is_gone_make_room() {
    let (door, now) = (door(2), Instant::now());
    let (gone, _) = opened(&door, now).await;
    let (mut ahead, wanted) = opened(&door, now).await;
    assert_eq!(door.offer(&Arc::default(), now).unwrap_err().code, Code::ResourceExhausted);
    ahead.write_all(b"first bytes of a call").await.unwrap();
    drop(gone);
    let patient = async {
        while door.offer(&Arc::default(), now).is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), patient).await.expect("its place is free");
    assert!(door.lease(&wanted).is_ok(), "the other one is not taken for gone, and no byte of it was taken");
}

#[tokio::test]
async fn frames_and_bodies_of_every_length_arrive() {
    let (a, b) = pair().await;
    let (mut sender, mut receiver) = (stream(a), stream(b));
    let lengths = [0, 1, 95, 96, 97, 65_535, 65_536, 262_143, 262_144, 262_145, 1 << 20];
    let sending = async {
        for bytes in lengths {
            sender.send_tile(&tile(bytes)).await.unwrap();
            sender.send(Frame::Missing, &[]).await.unwrap();
        }
        sender.send(Frame::End, &[]).await.unwrap();
    };
    let receiving = async {
        for bytes in lengths {
            let Frame::Tile(head) = receiver.next(None).await.unwrap() else { panic!("a tile of {bytes}") };
            let read = receiver.tile(head, None, &Buffers::default()).await.unwrap();
            assert_eq!(read, tile(bytes));
            assert_eq!(receiver.next(None).await.unwrap(), Frame::Missing);
        }
        assert_eq!(receiver.next(None).await.unwrap(), Frame::End);
    };
    tokio::join!(sending, receiving);
    let too_long = sender.send_tile(&tile(BODY_BYTES_MAX + 1)).await.unwrap_err();
    assert_eq!(too_long.of_request().code, Code::OutOfRange);
}

#[tokio::test]
async fn bodies_land_where_they_are_wanted() {
    let shape = longshore_attention::TileShape {
        block_tokens: 16,
        kv_heads: 2,
        head_dim: 32,
        dtype: longshore_attention::KvDtype::F16,
    };
    let rooms = super::TileRooms::new(shape);
    let (a, b) = pair().await;
    let (mut sender, mut receiver) = (stream(a), stream(b));
    let (fitting, other) = (tile(shape.bytes()), tile(shape.bytes() + 1));
    sender.send_tile(&fitting).await.unwrap();
    sender.send_tile(&other).await.unwrap();
    for sent in [&fitting, &other] {
        let Frame::Tile(head) = receiver.next(None).await.unwrap() else { panic!("a tile") };
        let read = receiver.tile(head, Some(&rooms), &Buffers::default()).await.unwrap();
        assert_eq!(&read, sent);
        match rooms.landed(&read) {
            Some((tile, crc)) => assert_eq!((tile.as_bytes(), crc), (&sent.data[..], sent.crc32c)),
            None => assert_eq!(sent.data.len(), shape.bytes() + 1),
        }
    }
}

#[tokio::test]
async fn silence_is_told_and_waiting_for_a_first_byte_is_not_silence() {
    let (mut a, b) = pair().await;
    let mut receiver = hasty(b);
    let long = patience().read * 4;
    assert!(tokio::time::timeout(long, receiver.next(None)).await.is_err(), "it may wait for a frame");
    let head = Frame::Tile(TileHead::of(&tile(1000)).unwrap()).encode(1, 0);
    a.write_all(&head[..50]).await.unwrap();
    let late = receiver.next(None).await.unwrap_err();
    assert!(matches!(late, Fault::Slow(_)), "half a head: {late:?}");
    let (mut a, b) = pair().await;
    let mut receiver = hasty(b);
    a.write_all(&head).await.unwrap();
    let Frame::Tile(head) = receiver.next(None).await.unwrap() else { panic!("a tile") };
    a.write_all(&[1; 999]).await.unwrap();
    let late = receiver.tile(head, None, &Buffers::default()).await.unwrap_err();
    assert_eq!(late.of_request().code, Code::Unavailable);
    assert!(receiver.next(Some(patience().read)).await.is_err());
}

#[tokio::test]
async fn a_peer_that_does_not_read_or_goes_away_is_told() {
    let (a, b) = pair().await;
    let mut sender = hasty(a);
    let body = tile(BODY_BYTES_MAX);
    let unread = async {
        loop {
            if let Err(fault) = sender.send_tile(&body).await {
                return fault;
            }
        }
    };
    let fault = unread.await;
    assert!(matches!(fault, Fault::Late(_)), "{fault:?}");
    drop(b);
    let (a, b) = pair().await;
    drop(a);
    let gone = stream(b).next(None).await.unwrap_err();
    assert!(matches!(gone, Fault::Broken(_)), "{gone:?}");
}

/// Nothing is given for the length of a frame.
fn strict() -> TcpPatience {
    let short = Duration::from_millis(200);
    TcpPatience { read: short, write: short, bytes_per_second_min: u64::MAX, ..TcpPatience::default() }
}

fn resident_bytes() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// What 24 heads that say 8 MiB each take of memory when hardly anything of their bodies comes, and what is left when they are given up.
async fn grown_by_heads(memory: Option<super::TileRooms>) -> (usize, usize) {
    let head =
        TileHead { key: BlockKey([3; 16]), layer: 0, crc32c: 0, bytes: LONG_BYTES as u32, place: None };
    let buffers = Buffers::default();
    let mut waiting = Vec::new();
    for _ in 0..24 {
        let (client, server) = pair().await;
        let mut receiver = TileStream::new(server, 1, LONG_BYTES, TcpPatience::default());
        let buffers = buffers.clone();
        let reading = async move {
            let memory = memory.as_ref().map(|rooms| rooms as &dyn longshore_proto::types::TileMemory);
            receiver.tile(head, memory, &buffers).await
        };
        waiting.push((client, Box::pin(reading)));
    }
    let before = resident_bytes();
    for (client, reading) in &mut waiting {
        client.write_all(&[1; 5000]).await.unwrap();
        assert!(reading.now_or_never().is_none());
    }
    let grown = resident_bytes().saturating_sub(before);
    drop(waiting);
    (grown, resident_bytes().saturating_sub(before))
}

const LONG_BYTES: usize = 8 << 20;

#[tokio::test]
async fn a_head_without_its_body_takes_no_memory() {
    let (grown, _) = grown_by_heads(None).await;
    assert!(grown < 2 * LONG_BYTES, "{grown} bytes for 24 heads that say 8 MiB each");
}

#[tokio::test]
async fn a_head_without_its_body_takes_one_page_of_where_its_tile_would_stay() {
    let dtype = longshore_attention::KvDtype::F16;
    let shape = longshore_attention::TileShape { block_tokens: 256, kv_heads: 32, head_dim: 256, dtype };
    assert_eq!(shape.bytes(), LONG_BYTES);
    let (grown, left) = grown_by_heads(Some(super::TileRooms::new(shape))).await;
    // Pages may be of 2 MiB, and an empty slab is kept.
    assert!(grown <= 24 * (2 << 20) + LONG_BYTES, "{grown} bytes for 24 heads that say 8 MiB each");
    assert!(left <= 2 * (2 << 20) + (1 << 20), "{left} bytes are left of {grown}");
}

#[tokio::test]
async fn a_head_that_drips_in_is_not_waited_for() {
    let (mut a, b) = pair().await;
    let mut receiver = TileStream::new(b, 1, BODY_BYTES_MAX, strict());
    let head = Frame::Missing.encode(1, 0);
    let dripping = async {
        for byte in head.chunks(1) {
            a.write_all(byte).await.unwrap();
            tokio::time::sleep(strict().read / 2).await;
        }
    };
    let fault = tokio::select! {
        read = receiver.next(None) => read.unwrap_err(),
        () = dripping => panic!("all of it was waited for"),
    };
    assert!(matches!(fault, Fault::Slow(_)), "{fault:?}");
}

#[tokio::test]
async fn a_body_that_drips_in_is_not_waited_for() {
    let (mut a, b) = pair().await;
    let mut receiver = TileStream::new(b, 1, LONG_BYTES, strict());
    let bytes = LONG_BYTES as u32;
    let head = TileHead { key: BlockKey([3; 16]), layer: 0, crc32c: 0, bytes, place: None };
    // In many parts: each that is there is read, however late this is. As much at a time as what has to come within the pause.
    let dripping = async {
        for part in vec![7; LONG_BYTES].chunks(256 << 10) {
            a.write_all(part).await.unwrap();
            tokio::time::sleep(strict().read / 2).await;
        }
    };
    let buffers = Buffers::default();
    let fault = tokio::select! {
        read = receiver.tile(head, None, &buffers) => read.unwrap_err(),
        () = dripping => panic!("all of it was waited for"),
    };
    assert!(matches!(fault, Fault::Slow(_) | Fault::Late(_)), "{fault:?}");
    assert_eq!(fault.of_request().field.as_deref(), Some("connection"));
}

#[tokio::test]
async fn a_reader_that_sips_does_not_keep_a_body() {
    const BYTES: usize = 64 << 20;
    let (a, mut b) = pair().await;
    let mut sender = TileStream::new(a, 1, BYTES, strict());
    let body = TileMessage { data: vec![7; BYTES].into(), ..tile(0) };
    // More than all buffers of the kernel hold is left after some of these.
    let sipping = async {
        let mut sip = vec![0; 4 << 20];
        while b.read_exact(&mut sip).await.is_ok() {
            tokio::time::sleep(strict().write / 2).await;
        }
    };
    let fault = tokio::select! {
        sent = sender.send_tile(&body) => sent.unwrap_err(),
        () = sipping => panic!("it was sent"),
    };
    assert!(matches!(fault, Fault::Slow(_) | Fault::Late(_)), "{fault:?}");
}
