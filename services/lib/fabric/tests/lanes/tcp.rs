//! The `tcp` lane between well-meaning sides: chosen where it is offered, used again, given up where it does not work.

use std::{net::SocketAddr, sync::atomic::Ordering, time::Duration};

use futures::StreamExt;
use longshore_blocks::BlockKey;
use longshore_fabric::{CallContext, Code, Connector, GrpcConnector, Lane as Seen, server::ServerOptions};
use longshore_proto::types::*;
use tokio::sync::mpsc;

use super::{
    fake::{FakeRouter, HEADS, LAYERS, identity, shape},
    forward::{Forward, kept_port},
    house::{House, Lane, over_tcp, patient, plain},
    stories,
    tiles::{block, get, put},
};

fn connector() -> GrpcConnector {
    GrpcConnector::new(over_tcp())
}

/// A server with its gRPC and its tile port behind forwards, as another host sees it.
async fn elsewhere() -> (House, Forward, Forward) {
    let (tcp_port, port) = kept_port();
    let options = ServerOptions { tcp_port, tcp_patience: patient(), ..ServerOptions::default() };
    let house = House::with(Lane::Grpc, FakeRouter::default(), options).await;
    let server: SocketAddr = house.address.trim_start_matches("http://").parse().unwrap();
    let grpc = Forward::new(0, server).await;
    let tiles = Forward::new(tcp_port, SocketAddr::new(server.ip(), tcp_port)).await.keeping(port);
    (house, grpc, tiles)
}

fn seen(house: &House) -> Seen {
    house.shard.seen.lock().unwrap().as_ref().unwrap().lane
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_chosen_and_its_connections_are_used_again() {
    let (house, grpc, tiles) = elsewhere().await;
    let shard = connector().shard(&format!("http://{}", grpc.address)).unwrap();
    for name in 1..=20 {
        assert_eq!(put(&*shard, block(name, 100_000)).await, [(name, PutOutcome::Stored)]);
        assert_eq!(seen(&house), Seen::Tcp);
        assert_eq!(get(&*shard, &[name, 99]).await.len(), LAYERS as usize + 1);
    }
    assert_eq!(tiles.connections.load(Ordering::SeqCst), 1, "one call after the other needs one connection");
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_takes_over_where_the_port_cannot_be_reached() {
    let (house, grpc, mut tiles) = elsewhere().await;
    tiles.cut().await;
    let address = format!("http://{}", grpc.address);
    let refused = connector().tcp_shard(&address).unwrap();
    let get_one = GetBlocks::whole(identity(), vec![BlockKey([1; 16])]);
    let error = refused.get_blocks(&CallContext::new("alone"), get_one).await.err().unwrap();
    assert_eq!(error.code, Code::Unavailable, "{error}");
    let shard = connector().shard(&address).unwrap();
    for name in 1..=3 {
        assert_eq!(put(&*shard, block(name, 100_000)).await, [(name, PutOutcome::Stored)]);
        assert_eq!(seen(&house), Seen::Grpc);
        assert_eq!(
            get(&*shard, &[name]).await,
            block(name, 100_000).into_iter().map(Some).collect::<Vec<_>>()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_takes_over_where_it_is_not_offered() {
    let options = ServerOptions { tcp_connections_max: 0, ..ServerOptions::default() };
    let house = House::with(Lane::Grpc, FakeRouter::default(), options).await;
    let shard = connector().shard(&house.address).unwrap();
    assert_eq!(put(&*shard, block(1, 100_000)).await, [(1, PutOutcome::Stored)]);
    assert_eq!(seen(&house), Seen::Grpc);
    let stock = House::new(Lane::StockServer).await;
    let shard = connector().shard(&stock.address).unwrap();
    assert_eq!(put(&*shard, block(1, 100_000)).await, [(1, PutOutcome::Stored)]);
    // And where all connections are in use.
    let busy = ServerOptions { tcp_connections_max: 1, tcp_patience: patient(), ..ServerOptions::default() };
    let house = House::with(Lane::Grpc, FakeRouter::default(), busy).await;
    let shard = connector().shard(&house.address).unwrap();
    let (_open, tiles) = mpsc::channel(1);
    let _acks = shard.put_blocks(&CallContext::new("holds"), identity(), shape(), tiles).await.unwrap();
    assert_eq!(seen(&house), Seen::Tcp);
    assert_eq!(put(&*shard, block(1, 100_000)).await, [(1, PutOutcome::Stored)]);
    assert_eq!(seen(&house), Seen::Grpc);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_whose_connection_breaks_fails_and_the_next_one_goes_over_grpc() {
    let (house, grpc, mut tiles) = elsewhere().await;
    let shard = connector().shard(&format!("http://{}", grpc.address)).unwrap();
    let (sender, received) = mpsc::channel(1);
    let mut acks = shard.put_blocks(&CallContext::new("cut"), identity(), shape(), received).await.unwrap();
    sender.send(block(1, 100_000).remove(0)).await.unwrap();
    assert_eq!(seen(&house), Seen::Tcp);
    while house.shard.blocks.lock().unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tiles.cut().await;
    let error = acks.next().await.unwrap().unwrap_err();
    assert_eq!(error.code, Code::Unavailable, "{error}");
    drop((sender, acks));
    assert_eq!(put(&*shard, block(2, 100_000)).await, [(2, PutOutcome::Stored)]);
    assert_eq!(get(&*shard, &[2]).await.len(), LAYERS as usize);
    assert_eq!(seen(&house), Seen::Grpc);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_that_was_cut_is_noticed() {
    let (house, grpc, mut tiles) = elsewhere().await;
    let shard = connector().shard(&format!("http://{}", grpc.address)).unwrap();
    put(&*shard, block(1, 100_000)).await;
    tiles.cut().await;
    // The runtime wakes whoever sleeps after it looked at its sockets.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(put(&*shard, block(2, 100_000)).await, [(2, PutOutcome::Stored)]);
    assert_eq!(seen(&house), Seen::Grpc);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_shard_says_is_told_as_it_is_and_does_not_end_the_lane() {
    let (house, grpc, _tiles) = elsewhere().await;
    let shard = connector().shard(&format!("http://{}", grpc.address)).unwrap();
    stories::what_a_shard_says(&house, &*shard, Seen::Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_of_tiles_are_read_over_grpc_beside_it() {
    let (house, grpc, tiles) = elsewhere().await;
    let shard = connector().shard(&format!("http://{}", grpc.address)).unwrap();
    put(&*shard, block(1, 400)).await;
    assert_eq!(seen(&house), Seen::Tcp);
    let get_one = GetBlocks::whole(identity(), vec![BlockKey([1; 16])]);
    let parts = shard.get_heads(&CallContext::new("parts"), get_one, 1..3).await.unwrap();
    let parts: Vec<_> = parts.map(|part| part.unwrap().unwrap()).collect().await;
    assert!(parts.iter().all(|part| part.copy_heads(1..3, HEADS, 100).is_ok()) && parts.len() == 2);
    assert_eq!(seen(&house), Seen::Grpc);
    get(&*shard, &[1]).await;
    assert_eq!((seen(&house), tiles.connections.load(Ordering::SeqCst)), (Seen::Tcp, 1));
}

/// More rounds than one peer may have connections.
#[tokio::test(flavor = "multi_thread")]
async fn cancelled_calls_free_their_connections_and_streams() {
    let house = House::new(Lane::Tcp).await;
    stories::cancelled_calls(&house, Seen::Tcp, 80).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_on_the_way_never_becomes_a_block() {
    let (house, grpc, tiles) = elsewhere().await;
    let read = GrpcConnector::new(plain()).shard(&house.address).unwrap();
    for case in 1..=60u64 {
        let (name, shard) = (case as u8, connector().tcp_shard(&format!("http://{}", grpc.address)).unwrap());
        // Within the hello, the heads and the bodies of two tiles of 500 bytes.
        tiles.damage_up.store(case * 21, Ordering::SeqCst);
        let (sender, received) = mpsc::channel(2);
        let context = CallContext::new("damage");
        if let Ok(mut acks) = shard.put_blocks(&context, identity(), shape(), received).await {
            for tile in block(name, 500) {
                sender.send(tile).await.ok();
            }
            drop(sender);
            while let Some(Ok(_)) = acks.next().await {}
        }
        tiles.damage_up.store(0, Ordering::SeqCst);
        let held = get(&*read, &[name]).await;
        let whole: Vec<_> = block(name, 500).into_iter().map(Some).collect();
        assert!(held.iter().all(|tile| tile.is_none() || whole.contains(tile)), "case {case}: {held:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_on_the_way_back_is_an_error_or_fails_its_check() {
    let (house, grpc, tiles) = elsewhere().await;
    let direct = GrpcConnector::new(plain()).shard(&house.address).unwrap();
    put(&*direct, block(1, 500)).await;
    let whole = block(1, 500);
    let mut noticed = 0;
    for case in 1..=60u64 {
        let shard = connector().tcp_shard(&format!("http://{}", grpc.address)).unwrap();
        // Within the confirmation, two tiles, a block that is missing, and the end.
        tiles.damage_down.store(case * 23, Ordering::SeqCst);
        let keys = vec![BlockKey([1; 16]), BlockKey([7; 16])];
        let get_both = GetBlocks::whole(identity(), keys);
        let mut came = Vec::new();
        let mut failed = true;
        if let Ok(mut answers) = shard.get_blocks(&CallContext::new("damage"), get_both).await {
            failed = false;
            while let Some(answer) = answers.next().await {
                match answer {
                    Ok(answer) => came.push(answer),
                    Err(_) => failed = true,
                }
            }
        }
        tiles.damage_down.store(0, Ordering::SeqCst);
        let is_right = |tile: &TileMessage| whole.contains(tile) || !tile.data.matches(tile.crc32c);
        assert!(came.iter().flatten().all(is_right), "case {case}: {came:?}");
        let all = came.len() == 3 && came.iter().flatten().all(|tile| tile.data.matches(tile.crc32c));
        assert!(failed || came.len() == 3, "case {case}: {came:?}");
        noticed += u32::from(failed || !all);
    }
    assert!(noticed >= 55, "{noticed} of 60: what comes back has 1,392 bytes");
}
