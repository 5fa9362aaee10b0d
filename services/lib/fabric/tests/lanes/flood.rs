//! Clients that send more than a shard takes, over every way that tiles come: what is under way has a bound, whoever meets it is told, and
//! others go on.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt, future::join_all, stream::FuturesUnordered};
use http_body::Frame;
use longshore_blocks::{BlockKey, Namespace};
use longshore_fabric::{
    BoxStream, CallContext, Code, Connector, Error, GrpcConnector, Shard, TcpPatience, server::ServerOptions,
    status::from_status,
};
use longshore_proto::{
    types::{Identity, PutAck, TileMessage},
    v1::{self, put_blocks_request::Part},
};
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, body::Body, transport::Channel};
use tower::ServiceExt;

use super::{
    fake::{FakeRouter, LAYERS, identity, shape, tile},
    forward::Forward,
    house::{House, LONG, Lane, over_tcp, patient, plain},
    raw,
    tiles::{block, get, put},
};

const SHORT: Duration = Duration::from_millis(300);
/// Larger than the window of a stream, so that one stream has more under way than that.
const TILE_BYTES: usize = 3 << 20;
const TENANT_BYTES: usize = 12 << 20;
const LISTENER_BYTES: usize = 24 << 20;

async fn house(lane: Lane) -> House {
    house_with(lane, ServerOptions { tcp_patience: patient(), ..ServerOptions::default() }).await
}

/// With `patience` for messages and readers.
async fn house_with(lane: Lane, patience: ServerOptions) -> House {
    let options = ServerOptions {
        stream_window_bytes: 1 << 20,
        connection_window_bytes: 1 << 20,
        frame_bytes_max: 64 << 10,
        tile_bytes_max: LISTENER_BYTES,
        tenant_tile_bytes_max: TENANT_BYTES,
        peer_tile_bytes_max: LISTENER_BYTES / 2,
        tile_room_patience: SHORT,
        ..patience
    };
    let house = House::with(lane, FakeRouter::default(), options).await;
    *house.shard.kept.lock().unwrap() = Some(Vec::new());
    house
}

/// A client with connections of its own.
fn peer(lane: Lane, house: &House) -> Arc<dyn Shard> {
    match lane {
        Lane::Tcp => GrpcConnector::new(over_tcp()).tcp_shard(&house.address).unwrap(),
        _ => GrpcConnector::new(plain()).shard(&house.address).unwrap(),
    }
}

type Stream = (mpsc::Sender<TileMessage>, Result<BoxStream<PutAck>, Error>);

/// A store stream of a tenant whose tiles are not taken.
async fn begin(client: &dyn Shard, tenant: u8) -> Stream {
    let (sender, received) = mpsc::channel(1);
    let identity = Identity { namespace: Namespace::from_bytes([tenant; 32]), ..identity() };
    let context = CallContext::new("flood").with_timeout(LONG * 5);
    (sender, client.put_blocks(&context, identity, shape(), received).await)
}

/// Sends tiles until the stream is refused, which is what this gives; goes on for ever while it is not.
async fn flood((sender, acks): &mut Stream) -> Error {
    let acks = match acks {
        Ok(acks) => acks,
        Err(error) => return error.clone(),
    };
    let sending = async {
        while sender.send(tile(BlockKey([7; 16]), 0, TILE_BYTES)).await.is_ok() {}
        std::future::pending::<()>().await
    };
    tokio::select! {
        ended = acks.next() => ended.expect("an end with a reason").expect_err("nobody takes its tiles"),
        () = sending => unreachable!("it never ends"),
    }
}

/// Floods all streams until so many of them are refused, and no more are for a while. Tiles that there was room for came then.
async fn refused(house: &House, streams: &mut [Stream], at_least: usize) -> Vec<Error> {
    let mut floods: FuturesUnordered<_> = streams.iter_mut().map(flood).collect();
    let mut refused = Vec::new();
    let until = Instant::now() + LONG;
    loop {
        match tokio::time::timeout(SHORT * 5, floods.next()).await {
            Ok(Some(error)) => refused.push(error),
            Ok(None) => return refused,
            Err(_) if refused.len() >= at_least && kept_bytes(house) > 0 => return refused,
            Err(_) => assert!(Instant::now() < until, "{} streams were refused: {refused:?}", refused.len()),
        }
    }
}

#[track_caller]
fn exhausted(error: &Error) {
    assert_eq!((error.code, error.retry_after.is_some()), (Code::ResourceExhausted, true), "{error}");
    assert!(error.message.contains("hint:"), "{error}");
}

fn kept_bytes(house: &House) -> usize {
    let kept = house.shard.kept.lock().unwrap();
    kept.iter().flatten().map(|stream| stream.tiles.len() * TILE_BYTES).sum()
}

/// Everybody else goes on.
async fn unharmed(house: &House) {
    assert_eq!(put(&*house.client(), block(200, 100_000)).await.len(), 1);
    assert_eq!(get(&*house.client(), &[200]).await.len(), LAYERS as usize);
    house.shard.blocks.lock().unwrap().remove(&BlockKey([200; 16]));
}

async fn nothing_is_under_way(house: &House) {
    let empty = async {
        while house.traffic.budget_taken_bytes() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(LONG, empty).await;
    waited.unwrap_or_else(|_| panic!("{} bytes are left", house.traffic.budget_taken_bytes()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_takes_all_it_may_leaves_room_for_others() {
    for lane in [Lane::Tcp, Lane::Grpc] {
        let house = house(lane).await;
        let clients: Vec<_> = (0..4).map(|_| peer(lane, &house)).collect();
        let mut streams = join_all((0..16).map(|number| begin(&*clients[number % 4], 9))).await;
        let refused = refused(&house, &mut streams, 1).await;
        refused.iter().for_each(exhausted);
        assert!((1..16).contains(&refused.len()), "{lane:?}: {refused:?}");
        let kept = kept_bytes(&house);
        assert!(kept > 0 && kept <= TENANT_BYTES, "{lane:?}: {kept} bytes");
        unharmed(&house).await;
        drop((streams, clients));
        *house.shard.kept.lock().unwrap() = None;
        nothing_is_under_way(&house).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_tenants_and_peers_together_cannot_take_more_than_the_listener_has() {
    for lane in [Lane::Tcp, Lane::Grpc] {
        let house = house(lane).await;
        let clients: Vec<_> = (0..8).map(|_| peer(lane, &house)).collect();
        let streams = (0..48usize).map(|number| begin(&*clients[number % 8], 10 + number as u8 % 16));
        let mut streams = join_all(streams).await;
        let refused = refused(&house, &mut streams, 40).await;
        refused.iter().for_each(exhausted);
        let (kept, taken) = (kept_bytes(&house), house.traffic.budget_taken_bytes() as usize);
        assert!(kept > 0 && kept <= taken && taken <= LISTENER_BYTES, "{lane:?}: {kept} of {taken} bytes");
        let count = refused.len() as u64;
        assert!(count >= 40, "{lane:?}: eight tiles fill all, {count} of 48 streams were refused");
        assert!(house.traffic.refused_total() >= count, "{lane:?}");
        drop((streams, clients));
        *house.shard.kept.lock().unwrap() = None;
        nothing_is_under_way(&house).await;
        unharmed(&house).await;
    }
}

/// Sends tiles until nobody takes any more: not for a long time, since the machine may be busy.
async fn fill(sender: &mpsc::Sender<TileMessage>) {
    let mut in_vain = 0;
    while in_vain < 5 {
        let sending = sender.send(tile(BlockKey([7; 16]), 0, TILE_BYTES));
        match tokio::time::timeout(SHORT, sending).await {
            Ok(Ok(())) => in_vain = 0,
            Ok(Err(_)) => return,
            Err(_) => in_vain += 1,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_leaves_while_its_window_is_closed_ends_its_call_alone() {
    for lane in [Lane::Grpc, Lane::Tcp] {
        let house = house(lane).await;
        let client = peer(lane, &house);
        let mut streams = Vec::new();
        // More than there are connections for tiles.
        for tenant in 9..13 {
            let (sender, acks) = begin(&*client, tenant).await;
            let call = house.shard.seen.lock().unwrap().as_ref().unwrap().cancel.clone();
            streams.push((sender, acks.expect("a stream"), call));
        }
        let (sender, acks, call) = streams.remove(0);
        fill(&sender).await;
        drop(acks);
        // The shard has not taken a tile since, and is told all the same.
        let over = async { tokio::join!(call.cancelled(), sender.closed()) };
        tokio::time::timeout(Duration::from_secs(20), over).await.expect("both sides learn of it");
        assert!(streams.iter().all(|(_, _, call)| !call.is_cancelled()), "{lane:?}");
        *house.shard.kept.lock().unwrap() = None;
        drop(streams);
        nothing_is_under_way(&house).await;
        unharmed(&house).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_while_its_window_is_closed_ends_its_call() {
    let house = house(Lane::Grpc).await;
    let server = house.address.trim_start_matches("http://").parse().unwrap();
    let mut forward = Forward::new(0, server).await;
    let client = GrpcConnector::new(plain()).shard(&format!("http://{}", forward.address)).unwrap();
    let (sender, acks) = begin(&*client, 9).await;
    let mut acks = acks.expect("a stream");
    let call = house.shard.seen.lock().unwrap().as_ref().unwrap().cancel.clone();
    fill(&sender).await;
    forward.cut().await;
    tokio::time::timeout(Duration::from_secs(60), call.cancelled()).await.expect("the shard learns of it");
    let error = acks.next().await.expect("a reason").unwrap_err();
    assert_eq!(error.code, Code::Unavailable, "{error}");
    *house.shard.kept.lock().unwrap() = None;
    nothing_is_under_way(&house).await;
}

/// Some bytes, and then neither more nor an end.
struct Stalls(Option<Bytes>);

impl http_body::Body for Stalls {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match self.0.take() {
            Some(bytes) => Poll::Ready(Some(Ok(Frame::data(bytes)))),
            None => Poll::Pending,
        }
    }
}

/// Begins a store stream whose tiles come as its messages.
fn start_of_messages() -> v1::PutBlocksRequest {
    let (identity, shape) = (Some(identity().into()), Some(shape().into()));
    let start = v1::PutBlocksStart { identity, shape, ..Default::default() };
    v1::PutBlocksRequest { part: Some(Part::Start(start)) }
}

fn prefixed(bytes: usize, message: &[u8]) -> Vec<u8> {
    [&[0], &(bytes as u32).to_be_bytes()[..], message].concat()
}

/// How a store stream ends that brings `bytes` and nothing after them.
async fn end_of(house: &House, bytes: Vec<u8>) -> Error {
    let channel = Channel::from_shared(house.address.clone()).unwrap().connect().await.unwrap();
    let request = http::Request::post(format!("{}/longshore.v1.KvStoreService/PutBlocks", house.address))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(Stalls(Some(bytes.into()))))
        .unwrap();
    let response = channel.oneshot(request).await.unwrap();
    if let Some(status) = Status::from_header_map(response.headers()) {
        return from_status(&status);
    }
    let mut body = std::pin::pin!(response.into_body());
    loop {
        let next = std::future::poll_fn(|cx| http_body::Body::poll_frame(body.as_mut(), cx)).await;
        let frame = next.expect("trailers come last").unwrap();
        if let Ok(trailers) = frame.into_trailers() {
            return from_status(&Status::from_header_map(&trailers).expect("a status"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_never_comes_to_its_end_keeps_no_room() {
    // Long enough for honest clients on a loaded machine.
    let write = SHORT * 10;
    let tcp_patience = TcpPatience { write, bytes_per_second_min: u64::MAX, ..TcpPatience::default() };
    let house = house_with(Lane::Grpc, ServerOptions { tcp_patience, ..ServerOptions::default() }).await;
    let start = start_of_messages().encode_to_vec();
    let begun = [prefixed(start.len(), &start), prefixed(TILE_BYTES, &[0x12; 1000])].concat();
    let error = end_of(&house, begun).await;
    assert_eq!((error.code, error.field.as_deref()), (Code::Unavailable, Some("message")), "{error}");
    nothing_is_under_way(&house).await;
    // There is no room at all for what comes before the namespace.
    let error = end_of(&house, prefixed(TILE_BYTES, &[0x12; 1000])).await;
    assert_eq!((error.code, error.field.as_deref()), (Code::InvalidArgument, Some("start")), "{error}");
    unharmed(&house).await;
}

/// A client whose streams may be sent so many bytes that it has not read.
async fn narrow(house: &House, window_bytes: u32) -> raw::Client {
    let endpoint = Channel::from_shared(house.address.clone()).unwrap();
    let channel = endpoint.initial_stream_window_size(window_bytes).connect().await.unwrap();
    raw::Client::new(channel)
}

/// Long enough for honest clients on a loaded machine.
fn unread() -> ServerOptions {
    ServerOptions { unread_patience: Some(SHORT * 20), ..ServerOptions::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_no_answers_keeps_no_room_for_long() {
    let house = house_with(Lane::Grpc, unread()).await;
    put(&*house.client(), block(100, TILE_BYTES)).await;
    put(&*house.client(), block(101, 500_000)).await;
    let house_of = &house;
    // With and without something that is left to be asked for.
    let cases = [0, 1, 1 << 16].into_iter().flat_map(|w| [(w, 100u8, 0), (w, 101, 1)]);
    let asking = cases.map(|(window_bytes, name, layers)| async move {
        let mut client = narrow(house_of, window_bytes).await;
        let get = v1::GetBlocksRequest {
            identity: Some(identity().into()),
            keys: vec![name; 16].into(),
            layers,
            ..v1::GetBlocksRequest::default()
        };
        client.get_blocks(get).await.unwrap().into_inner()
    });
    // All at once, so that the last one has begun when the first one is ended.
    let unread = join_all(asking).await;
    let a_window_each = async {
        // What was put before is answered, and gives its room back soon.
        while house.traffic.budget_taken_bytes() != 6 << 20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LONG, a_window_each).await.expect("a window each");
    nothing_is_under_way(&house).await;
    assert!(house.traffic.ended_unread_total() >= 6);
    for mut answer in unread {
        // What was on its way may still come, and then that it goes no further.
        let end = loop {
            match answer.message().await {
                Ok(message) => assert!(message.is_some(), "it did not come to its end"),
                Err(status) => break status,
            }
        };
        assert_eq!(from_status(&end).code, Code::Unavailable, "{end}");
    }
    unharmed(&house).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_no_acknowledgements_keeps_no_room_for_long() {
    let house = house_with(Lane::Grpc, unread()).await;
    let mut client = narrow(&house, 0).await;
    let (sender, messages) = mpsc::channel(4);
    sender.send(start_of_messages()).await.unwrap();
    let unread = client.put_blocks(ReceiverStream::new(messages)).await.unwrap();
    for tile in block(101, 100_000) {
        let part = Some(Part::Tile(tile.into()));
        sender.send(v1::PutBlocksRequest { part }).await.unwrap();
    }
    tokio::time::timeout(LONG, sender.closed()).await.expect("the stream ended");
    nothing_is_under_way(&house).await;
    assert!(house.traffic.ended_unread_total() >= 1);
    drop(unread);
    unharmed(&house).await;
}
