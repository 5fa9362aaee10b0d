//! The `tcp` lane with clients that lie, break off, stay silent or push in.

use std::time::Duration;

use futures::{StreamExt, future::join_all};
use longshore_blocks::BlockKey;
use longshore_fabric::{Code, TcpPatience, server::ServerOptions, status::from_status};
use longshore_proto::v1;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{
    fake::{ENDED, FakeRouter, LAYERS, ended, identity, tile},
    house::{House, LONG, Lane},
    raw::{self, MISSING, TILE, end, frame, head},
    tiles::{block, get, put},
};

const SHORT: Duration = Duration::from_millis(300);

async fn impatient() -> House {
    impatient_with(LONG).await
}

/// The same, with a limit for handshakes.
async fn impatient_with(hello: Duration) -> House {
    let tcp_patience = TcpPatience {
        read: SHORT,
        write: SHORT,
        hello,
        bytes_per_second_min: u64::MAX,
        ..TcpPatience::default()
    };
    let options = ServerOptions { tcp_patience, ..ServerOptions::default() };
    House::with(Lane::Tcp, FakeRouter::default(), options).await
}

/// Everybody else goes on. A tile is a segment of TCP: all of it is there, or nothing.
async fn unharmed(house: &House) {
    assert_eq!(put(&*house.client(), block(200, 20_000)).await.len(), 1);
    assert_eq!(get(&*house.client(), &[200]).await.len(), LAYERS as usize);
    house.shard.blocks.lock().unwrap().remove(&BlockKey([200; 16]));
}

#[track_caller]
fn refused(status: &Status, code: Code, field: Option<&str>) {
    let error = from_status(status);
    assert_eq!((error.code, error.field.as_deref()), (code, field), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_at_the_port_are_closed() {
    let house = impatient_with(SHORT * 5).await;
    let mut client = raw::client(&house).await;
    let offer = raw::offer(&mut client).await.unwrap();
    let mut wrong = offer.token.to_vec();
    wrong[0] ^= 0x80;
    let presented = [
        b"GET / HTTP/1.1\r\nhost: a\r\nx: 0123456789\r\n\r\n".to_vec(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n01234567890".to_vec(),
        vec![0xff; 4096],
        raw::hello(offer.id, &wrong),
        raw::hello(offer.id + 1, &offer.token),
        raw::hello(u64::MAX, &[0; 16]),
        // Never the whole of it.
        raw::hello(offer.id, &offer.token)[..31].to_vec(),
        Vec::new(),
    ];
    // All at once: a token is not good for long.
    let port = offer.port;
    let strangers = presented.map(|bytes| async move {
        let mut socket = raw::dial(port).await;
        socket.write_all(&bytes).await.unwrap();
        assert!(!raw::is_confirmed(&mut socket).await, "{bytes:?}");
    });
    join_all(strangers).await;
    let mut socket = raw::dial(offer.port).await;
    socket.write_all(&raw::hello(offer.id, &offer.token)).await.unwrap();
    assert!(raw::is_confirmed(&mut socket).await, "what others tried does not spoil a token");
    let mut again = raw::dial(offer.port).await;
    again.write_all(&raw::hello(offer.id, &offer.token)).await.unwrap();
    assert!(!raw::is_confirmed(&mut again).await, "a token that was used is worth nothing");
    unharmed(&house).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_that_say_nothing_delay_and_do_not_stop_the_others() {
    let house = impatient_with(SHORT * 2).await;
    let mut client = raw::client(&house).await;
    let port = raw::offer(&mut client).await.unwrap().port;
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(raw::dial(port).await);
    }
    // Their places are free after the patience for a handshake, three times over.
    let (_socket, connection) = raw::open(&mut client).await;
    assert!(raw::put(&mut client, connection).await.is_ok());
    for mut socket in silent {
        assert!(raw::is_closed(&mut socket).await);
    }
    unharmed(&house).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_beyond_the_limits_are_refused_with_a_hint() {
    let options = ServerOptions { tcp_connections_max: 3, ..ServerOptions::default() };
    let house = House::with(Lane::Grpc, FakeRouter::default(), options).await;
    let mut client = raw::client(&house).await;
    for _ in 0..3 {
        raw::offer(&mut client).await.unwrap();
    }
    let error = from_status(&raw::offer(&mut client).await.unwrap_err());
    assert_eq!((error.code, error.retry_after.is_some()), (Code::ResourceExhausted, true), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_name_what_is_not_theirs_are_refused() {
    let house = impatient().await;
    let (mut client, mut thief) = (raw::client(&house).await, raw::client(&house).await);
    let (mut socket, mine) = raw::open(&mut client).await;
    let lies = [
        (
            v1::TileConnection { token: vec![7; 16].into(), ..mine.clone() },
            Code::Unavailable,
            "start.connection",
        ),
        (v1::TileConnection { id: mine.id + 1, ..mine.clone() }, Code::Unavailable, "start.connection"),
        (
            v1::TileConnection { token: vec![7; 3].into(), ..mine.clone() },
            Code::InvalidArgument,
            "start.connection.token",
        ),
        (v1::TileConnection { lease: 0, ..mine.clone() }, Code::InvalidArgument, "start.connection.lease"),
    ];
    for (lie, code, field) in lies {
        refused(&raw::put(&mut thief, lie).await.unwrap_err(), code, Some(field));
    }
    // An offer that nobody opened.
    let offer = raw::offer(&mut client).await.unwrap();
    let early = v1::TileConnection { id: offer.id, token: offer.token, lease: 1 };
    refused(&raw::put(&mut client, early).await.unwrap_err(), Code::Unavailable, Some("start.connection"));
    // It still serves its owner, one call at a time.
    let (_sender, _acks) = raw::put(&mut client, mine.clone()).await.unwrap();
    let second = raw::put(&mut client, v1::TileConnection { lease: 2, ..mine }).await;
    refused(&second.unwrap_err(), Code::Unavailable, Some("start.connection"));
    socket.write_all(&frame(0, &tile(BlockKey([1; 16]), 0, 100))).await.unwrap();
    unharmed(&house).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_that_make_no_sense_end_their_call_by_name() {
    let house = impatient().await;
    let mut client = raw::client(&house).await;
    let good = |number| frame(number, &tile(BlockKey([1; 16]), number, 300));
    let mut flipped = good(0);
    flipped[30] ^= 1;
    let bytes_of = |bytes: u32| head(1, 0, TILE, |head| head[16..20].copy_from_slice(&bytes.to_le_bytes()));
    let cases = [
        (head(2, 0, TILE, |_| ()), "frame.number"),
        (head(1, 1, TILE, |_| ()), "frame.number"),
        ([good(0), good(0)].concat(), "frame.number"),
        (head(1, 0, 0, |_| ()), "frame.kind"),
        (head(1, 0, 5, |_| ()), "frame.kind"),
        (head(1, 0, MISSING, |_| ()), "frame.kind"),
        (bytes_of(u32::MAX), "frame.bytes"),
        (bytes_of((16 << 20) + 1), "frame.bytes"),
        (head(1, 0, TILE, |head| head[91] = 1), "frame"),
        (head(1, 0, TILE, |head| head[50] = 1), "frame"),
        (flipped, "frame"),
        (vec![0; 96], "frame"),
        // A body that is longer than its head says: what follows is no head.
        ([good(0), vec![7; 200]].concat(), "frame"),
    ];
    for (bytes, field) in cases {
        let (acks, status) = raw::put_bytes(&mut client, &bytes).await;
        refused(&status.unwrap(), Code::InvalidArgument, Some(field));
        assert!(acks.is_empty());
    }
    // A body that is shorter: its connection ends inside it.
    let (acks, status) = raw::put_bytes(&mut client, &good(0)[..200]).await;
    refused(&status.unwrap(), Code::Unavailable, Some("connection"));
    assert!(acks.is_empty());
    unharmed(&house).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_damaged_frame_is_detected() {
    let house = impatient().await;
    let mut client = raw::client(&house).await;
    let key = BlockKey([1; 16]);
    let whole = [frame(0, &tile(key, 0, 40)), frame(1, &tile(key, 1, 40)), end(2)].concat();
    for case in 0..400usize {
        let mut bytes = whole.clone();
        let at = case * 7919 % whole.len();
        match case % 4 {
            0 => bytes[at] ^= 1 << (case / 4 % 8),
            1 => bytes.truncate(at),
            2 => drop(bytes.drain(at..whole.len().min(at + 1 + case % 50))),
            _ => bytes.insert(at, case as u8),
        }
        raw::put_bytes(&mut client, &bytes).await;
        let mut blocks = house.shard.blocks.lock().unwrap();
        let held = blocks.remove(&key).unwrap_or_default();
        for held in &held {
            assert_eq!(held, &tile(key, held.layer, 40), "case {case}");
        }
        // The end itself may be damaged behind a block that is whole.
        let is_whole = held.len() == LAYERS as usize;
        assert!(!is_whole || bytes[..2 * 136] == whole[..2 * 136], "case {case}: damage became a block");
    }
    unharmed(&house).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_stops_sending_loses_the_call_and_everything_is_freed() {
    let house = impatient().await;
    let mut client = raw::client(&house).await;
    let body = frame(0, &tile(BlockKey([1; 16]), 0, 1 << 20));
    for part in [40, 96, 5_000, body.len() - 1] {
        let (mut socket, connection) = raw::open(&mut client).await;
        let (_sender, mut acks) = raw::put(&mut client, connection).await.unwrap();
        socket.write_all(&body[..part]).await.unwrap();
        let status = acks.next().await.unwrap().unwrap_err();
        refused(&status, Code::Unavailable, Some("connection"));
        assert!(status.message().contains("300 ms"), "{status:?}");
        assert!(raw::is_closed(&mut socket).await, "after {part} bytes");
    }
    // The end of the call without the end of its frames.
    let (_socket, connection) = raw::open(&mut client).await;
    let (sender, mut acks) = raw::put(&mut client, connection).await.unwrap();
    drop(sender);
    refused(&acks.next().await.unwrap().unwrap_err(), Code::Unavailable, Some("connection"));
    // Waiting between frames is no fault.
    let (mut socket, connection) = raw::open(&mut client).await;
    let (_sender, mut acks) = raw::put(&mut client, connection).await.unwrap();
    for number in 0..LAYERS {
        tokio::time::sleep(SHORT * 2).await;
        socket.write_all(&frame(number, &tile(BlockKey([2; 16]), number, 300))).await.unwrap();
    }
    socket.write_all(&end(LAYERS)).await.unwrap();
    assert_eq!(acks.next().await.unwrap().unwrap().outcome(), v1::PutOutcome::Stored);
    assert!(acks.next().await.is_none());
    assert!(acks.trailers().await.unwrap().unwrap().get("longshore-tile-connection").is_some());
    unharmed(&house).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_nothing_loses_the_call() {
    let house = impatient().await;
    // Not over the lane, which is not patient enough for large tiles on a busy machine.
    for name in 1..=24 {
        house.shard.blocks.lock().unwrap().insert(BlockKey([name; 16]), block(name, 1 << 20));
    }
    let mut client = raw::client(&house).await;
    let (mut socket, connection) = raw::open(&mut client).await;
    let keys: Vec<u8> = (1..=24).flat_map(|name| [name; 16]).collect();
    let identity = Some(identity().into());
    let get_all = v1::GetBlocksRequest {
        identity,
        keys: keys.into(),
        connection: Some(connection),
        ..Default::default()
    };
    let mut answers = client.get_blocks(get_all).await.unwrap().into_inner();
    let status = answers.next().await.unwrap().unwrap_err();
    refused(&status, Code::Unavailable, Some("connection"));
    assert!(raw::is_closed(&mut socket).await);
    unharmed(&house).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_drips_loses_the_call() {
    let house = impatient().await;
    let mut client = raw::client(&house).await;
    let body = frame(0, &tile(BlockKey([1; 16]), 0, 2 << 20));
    // A head byte by byte; a body in parts that come in time, each of them.
    for (whole, step) in [(&body[..96], 1), (&body[..], 256 << 10)] {
        let (mut socket, connection) = raw::open(&mut client).await;
        let (_sender, mut acks) = raw::put(&mut client, connection).await.unwrap();
        let dripping = async {
            for part in whole.chunks(step) {
                if socket.write_all(part).await.is_err() {
                    break;
                }
                tokio::time::sleep(SHORT / 2).await;
            }
            std::future::pending::<()>().await
        };
        let status = tokio::select! {
            ended = acks.next() => ended.unwrap().unwrap_err(),
            () = dripping => unreachable!("it never ends"),
        };
        refused(&status, Code::Unavailable, Some("connection"));
        // Else it would have ended after the last part, for want of another one.
        assert!(status.message().contains("not whole") || step > 1, "{status:?}");
    }
    unharmed(&house).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_nothing_is_told_why_the_shard_ended_the_stream() {
    let house = impatient().await;
    let mut client = raw::client(&house).await;
    let (mut socket, connection) = raw::open(&mut client).await;
    let get = v1::GetBlocksRequest {
        identity: Some(identity().into()),
        keys: ENDED.0.to_vec().into(),
        connection: Some(connection),
        ..Default::default()
    };
    let mut answers = client.get_blocks(get).await.unwrap().into_inner();
    let status = answers.next().await.unwrap().unwrap_err();
    assert_eq!(from_status(&status), ended());
    assert!(raw::is_closed(&mut socket).await);
    unharmed(&house).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_of_tiles_do_not_go_to_a_tile_connection() {
    let house = impatient().await;
    put(&*house.client(), block(1, 400)).await;
    let mut client = raw::client(&house).await;
    let (mut socket, connection) = raw::open(&mut client).await;
    let get = v1::GetBlocksRequest {
        identity: Some(identity().into()),
        keys: vec![1; 16].into(),
        first_head: 1,
        heads: 2,
        connection: Some(connection.clone()),
        ..Default::default()
    };
    refused(&client.get_blocks(get).await.unwrap_err(), Code::InvalidArgument, Some("connection"));
    // The connection is as it was: another call has it.
    let (sender, mut acks) = raw::put(&mut client, connection).await.unwrap();
    socket.write_all(&end(0)).await.unwrap();
    assert!(acks.next().await.is_none());
    drop(sender);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_go_close_their_connection_and_messages_beside_frames_are_refused() {
    let house = impatient().await;
    let mut client = raw::client(&house).await;
    let (mut socket, connection) = raw::open(&mut client).await;
    let (sender, acks) = raw::put(&mut client, connection).await.unwrap();
    socket.write_all(&frame(0, &tile(BlockKey([1; 16]), 0, 300))).await.unwrap();
    drop((sender, acks));
    assert!(raw::is_closed(&mut socket).await);
    let (mut socket, connection) = raw::open(&mut client).await;
    let (sender, mut acks) = raw::put(&mut client, connection.clone()).await.unwrap();
    sender.send(raw::start(connection)).await.unwrap();
    refused(&acks.next().await.unwrap().unwrap_err(), Code::InvalidArgument, Some("part"));
    assert!(raw::is_closed(&mut socket).await);
    // A call to a server without the lane.
    let none = ServerOptions { tcp_connections_max: 0, ..ServerOptions::default() };
    let house = House::with(Lane::Grpc, FakeRouter::default(), none).await;
    let mut client = raw::client(&house).await;
    refused(&raw::offer(&mut client).await.unwrap_err(), Code::Unimplemented, None);
    let lie = raw::start(v1::TileConnection { id: 1, token: vec![0; 16].into(), lease: 1 });
    let (sender, messages) = tokio::sync::mpsc::channel(1);
    sender.send(lie).await.unwrap();
    let status = client.put_blocks(ReceiverStream::new(messages)).await.unwrap_err();
    refused(&status, Code::InvalidArgument, Some("start.connection"));
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_go_to_the_connection_that_the_call_names() {
    let house = impatient().await;
    put(&*house.client(), block(1, 300)).await;
    let mut client = raw::client(&house).await;
    let (mut socket, connection) = raw::open(&mut client).await;
    let keys: Vec<u8> = [1, 7].into_iter().flat_map(|name| [name; 16]).collect();
    let get = v1::GetBlocksRequest {
        identity: Some(identity().into()),
        keys: keys.into(),
        connection: Some(connection),
        ..Default::default()
    };
    let mut answers = client.get_blocks(get).await.unwrap().into_inner();
    assert!(answers.next().await.is_none(), "the call has no messages");
    let key = BlockKey([1; 16]);
    let expected =
        [frame(0, &tile(key, 0, 300)), frame(1, &tile(key, 1, 300)), head(1, 2, MISSING, |_| ()), end(3)]
            .concat();
    let mut came = vec![0; expected.len()];
    socket.read_exact(&mut came).await.unwrap();
    assert_eq!(came, expected);
}
