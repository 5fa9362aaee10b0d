//! The `nccl` lane between well-meaning sides, over ranks that are none (`gpu.rs`): chosen where it is offered, used again, given up where
//! it does not work.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::StreamExt;
use longshore_blocks::BlockKey;
use longshore_fabric::{
    AttendLink, CallContext, Code, Connector, Error, GrpcConnector, GrpcOptions, Lane as Seen, Shard,
    TcpPatience, nccl::GpuEnd, server::ServerOptions,
};
use longshore_proto::types::*;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use super::{
    attention::{ask, query},
    fake::{FakeRouter, LAYERS, identity, shape},
    gpu::{Fault, Net, Step},
    house::{House, Lane, over_nccl, patient},
    nccl_attend::until_exchanged,
    stories,
    tiles::{block, get, put},
};

const BYTES: usize = 100_000;
/// Longer than a busy machine takes for an exchange.
const SHORT: Duration = Duration::from_secs(1);

pub(crate) async fn house(net: &Arc<Net>, patience: TcpPatience) -> House {
    let options = ServerOptions { nccl: Some(net.gpu()), tcp_patience: patience, ..ServerOptions::default() };
    House::with(Lane::Grpc, FakeRouter::default(), options).await
}

pub(crate) fn impatient() -> TcpPatience {
    TcpPatience { read: SHORT, write: SHORT, ..patient() }
}

pub(crate) fn seen(house: &House) -> Seen {
    house.shard.seen.lock().unwrap().as_ref().unwrap().lane
}

/// Calls until one goes over the lane: an epoch is joined on the side.
pub(crate) async fn until_joined(house: &House, shard: &dyn Shard) {
    for _ in 0..6_000 {
        get(shard, &[250]).await;
        if seen(house) == Seen::Nccl {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no epoch was joined");
}

/// Puts whose caller begins again when a lane breaks, as callers do.
async fn put_again(shard: &dyn Shard, name: u8) {
    for _ in 0..3 {
        let (sender, received) = mpsc::channel(LAYERS as usize);
        for tile in block(name, BYTES) {
            sender.send(tile).await.unwrap();
        }
        drop(sender);
        let acks = match shard.put_blocks(&CallContext::new("again"), identity(), shape(), received).await {
            Ok(acks) => acks.collect::<Vec<_>>().await,
            Err(error) => vec![Err(error)],
        };
        match acks.into_iter().collect::<Result<Vec<_>, Error>>() {
            Ok(acks) => {
                assert_eq!(acks[0].outcome, PutOutcome::Stored);
                return;
            }
            Err(error) => assert_eq!(error.code, Code::Unavailable, "{error}"),
        }
    }
    panic!("another lane works");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_joined_on_the_side_and_its_epoch_is_used_again() {
    let net = Arc::new(Net::default());
    let house = house(&net, TcpPatience::default()).await;
    let shard = GrpcConnector::new(over_nccl(&net)).shard(&house.address).unwrap();
    // The first call waits for nothing.
    assert_eq!(put(&*shard, block(1, BYTES)).await, [(1, PutOutcome::Stored)]);
    assert_eq!((seen(&house), net.exchanges.load(Ordering::SeqCst)), (Seen::Grpc, 0));
    until_joined(&house, &*shard).await;
    let joins = net.joins.load(Ordering::SeqCst);
    for name in 2..=20 {
        assert_eq!(put(&*shard, block(name, BYTES)).await, [(name, PutOutcome::Stored)]);
        assert_eq!(seen(&house), Seen::Nccl);
        let read = get(&*shard, &[name, 99]).await;
        assert_eq!(read[..2], block(name, BYTES).into_iter().map(Some).collect::<Vec<_>>()[..]);
        assert_eq!((read.len(), &read[2]), (LAYERS as usize + 1, &None));
    }
    assert_eq!(net.joins.load(Ordering::SeqCst), joins, "one call after the other needs no other epoch");
    assert_eq!(net.exchanges.load(Ordering::SeqCst), 19 * 2 * LAYERS as usize);
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_longer_than_a_piece_and_small_ones_go_round() {
    let house = House::new(Lane::Nccl).await;
    let client = house.client();
    for (name, bytes) in (1u8..).zip([0, 1, 16_383, 16_384, 4 << 20, (4 << 20) + 1, 9 << 20]) {
        assert_eq!(put(&*client, block(name, bytes)).await, [(name, PutOutcome::Stored)], "{bytes}");
        assert_eq!(seen(&house), Seen::Nccl);
        let sent: Vec<_> = block(name, bytes).into_iter().map(Some).collect();
        assert_eq!(get(&*client, &[name]).await, sent, "{bytes}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn places_travel_with_tiles() {
    let house = House::new(Lane::Nccl).await;
    let place = Some(longshore_blocks::BlockPlace { stripe_seed: [9; 32], index: 1 << 40 });
    let placed: Vec<_> = block(1, BYTES).into_iter().map(|tile| TileMessage { place, ..tile }).collect();
    put(&*house.client(), placed.clone()).await;
    assert_eq!(get(&*house.client(), &[1]).await, placed.into_iter().map(Some).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_lane_takes_over_where_it_is_not_offered_or_nobody_can_join() {
    let net = Arc::new(Net::default());
    let plain = House::new(Lane::Grpc).await;
    let shard = GrpcConnector::new(over_nccl(&net)).shard(&plain.address).unwrap();
    let alone = GrpcConnector::new(over_nccl(&net)).nccl_shard(&plain.address).unwrap();
    put_again(&*shard, 1).await;
    let get_one = GetBlocks::whole(identity(), vec![BlockKey([1; 16])]);
    let error = alone.get_blocks(&CallContext::new("alone"), get_one).await.err().unwrap();
    assert_eq!(error.code, Code::Unimplemented, "{error}");
    let without = GrpcConnector::new(GrpcOptions::default()).nccl_shard(&plain.address);
    assert_eq!(without.unwrap_err().code, Code::Unavailable);
    for fault in [Fault::Refuses, Fault::NobodyComes, Fault::Dies] {
        net.set(fault);
        let house = house(&net, TcpPatience::default()).await;
        let shard = GrpcConnector::new(over_nccl(&net)).shard(&house.address).unwrap();
        for name in 1..=5 {
            assert_eq!(put(&*shard, block(name, BYTES)).await, [(name, PutOutcome::Stored)], "{fault:?}");
            assert_eq!((seen(&house), get(&*shard, &[name]).await.len()), (Seen::Grpc, LAYERS as usize));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn corrupted_bodies_are_noticed_by_who_receives_them() {
    let net = Arc::new(Net::default());
    let house = house(&net, TcpPatience::default()).await;
    let shard = GrpcConnector::new(over_nccl(&net)).shard(&house.address).unwrap();
    put(&*shard, block(1, BYTES)).await;
    until_joined(&house, &*shard).await;
    net.set(Fault::Corrupts);
    let read = get(&*shard, &[1]).await;
    assert_eq!((seen(&house), read.len()), (Seen::Nccl, LAYERS as usize));
    assert!(read.iter().flatten().all(|tile| !tile.data.matches(tile.crc32c)), "no checksum is the body's");
    let stored = put(&*shard, block(2, BYTES)).await;
    assert!(stored.iter().all(|(name, outcome)| (*name, *outcome) == (2, PutOutcome::Corrupt)), "{stored:?}");
    net.set(Fault::None);
    assert_eq!(put(&*shard, block(3, BYTES)).await, [(3, PutOutcome::Stored)]);
    assert_eq!(seen(&house), Seen::Nccl);
}

/// A peer that hangs is left at the deadline, one that dies at once; the call fails, the next ones go another way, and nothing is left.
#[tokio::test(flavor = "multi_thread")]
async fn who_hangs_or_dies_loses_the_epoch_and_grpc_takes_over() {
    for fault in [Fault::Hangs, Fault::Dies] {
        let net = Arc::new(Net::default());
        let house = house(&net, impatient()).await;
        let options = GrpcOptions { tcp_patience: impatient(), nccl_ends_max: 1, ..over_nccl(&net) };
        let shard = GrpcConnector::new(options).shard(&house.address).unwrap();
        put(&*shard, block(1, BYTES)).await;
        until_joined(&house, &*shard).await;
        net.set(fault);
        let context = CallContext::new("faulty");
        let get_one = GetBlocks::whole(identity(), vec![BlockKey([1; 16])]);
        let mut tiles = shard.get_blocks(&context, get_one).await.unwrap();
        assert_eq!(seen(&house), Seen::Nccl);
        let error = tiles.next().await.unwrap().unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), (Code::Unavailable, Some("nccl")), "{error}");
        assert!(tiles.next().await.is_none());
        // Healed: but the lane is left alone for a while.
        net.set(Fault::None);
        for name in 2..=4 {
            assert_eq!(put(&*shard, block(name, BYTES)).await, [(name, PutOutcome::Stored)], "{fault:?}");
            assert_eq!((seen(&house), get(&*shard, &[name]).await.len()), (Seen::Grpc, LAYERS as usize));
        }
        assert_eq!(net.alive(), 0, "{fault:?}: both sides aborted");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_that_loses_its_epoch_is_begun_again_elsewhere() {
    let net = Arc::new(Net::default());
    let house = house(&net, impatient()).await;
    let options = GrpcOptions { tcp_patience: impatient(), nccl_ends_max: 1, ..over_nccl(&net) };
    let shard = GrpcConnector::new(options).shard(&house.address).unwrap();
    until_joined(&house, &*shard).await;
    for (name, fault) in (1u8..).zip([Fault::Hangs, Fault::None]) {
        net.set(fault);
        put_again(&*shard, name).await;
        assert_eq!(seen(&house), Seen::Grpc, "{fault:?}");
        assert_eq!(get(&*shard, &[name]).await.len(), LAYERS as usize);
    }
}

/// A shard that was killed and started anew at the same address has another incarnation: the epoch that its client is in is not one of it,
/// whatever its number, and is not taken for one.
#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_was_started_anew_knows_no_epoch_of_before() {
    let net = Arc::new(Net::default());
    let first = house(&net, TcpPatience::default()).await;
    let address: std::net::SocketAddr = first.address.trim_start_matches("http://").parse().unwrap();
    let mut forward = super::forward::Forward::new(0, address).await;
    let shard = GrpcConnector::new(over_nccl(&net)).shard(&format!("http://{}", forward.address)).unwrap();
    until_joined(&first, &*shard).await;
    first.shard.views.lock().unwrap().insert(7, Vec::new());
    let link = AttendLink::new(Arc::clone(&shard), &TaskTracker::new(), 8);
    until_exchanged(&net, &link).await;
    let second = house(&net, TcpPatience::default()).await;
    second.shard.views.lock().unwrap().insert(7, Vec::new());
    let (address, seen_at) = (second.address.trim_start_matches("http://").parse().unwrap(), forward.address);
    forward.cut().await;
    let _forward = super::forward::Forward::new(seen_at.port(), address).await;
    put_again(&*shard, 1).await;
    until_joined(&second, &*shard).await;
    put_again(&*shard, 2).await;
    assert_eq!(seen(&second), Seen::Nccl);
    assert_eq!(get(&*shard, &[1, 2]).await.len(), 2 * LAYERS as usize);
    // An attend stream breaks with its shard, as ever; the next one gets an epoch of the new shard.
    while let Err(error) = ask(&link, query(7, 4_000)).await {
        assert_eq!(error.code, Code::Unavailable, "{error}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    until_exchanged(&net, &link).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_calls_leave_no_epoch_that_another_could_take() {
    let house = House::new(Lane::Nccl).await;
    stories::cancelled_calls(&house, Seen::Nccl, 20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_shard_says_is_told_as_it_is_and_does_not_end_the_lane() {
    let house = House::new(Lane::Nccl).await;
    stories::what_a_shard_says(&house, &*house.client(), Seen::Nccl).await;
}

fn on() -> bool {
    std::thread::yield_now();
    true
}

/// While a piece is exchanged in one half of the staging memory, the next is copied to the other; and the one before from it.
#[tokio::test(flavor = "multi_thread")]
async fn copies_and_exchanges_overlap() {
    use Step::{Begun, Done, Down, Up};
    const PIECE: usize = 4 << 20;
    let net = Arc::new(Net::default());
    let (shard, shards_memory) = net.gpu_with_memory();
    let (client, clients_memory) = net.gpu_with_memory();
    let mut shard = shard.lane(GpuEnd::Shard { incarnation: 1 });
    let mut client = client.lane(GpuEnd::Client);
    let invitation = shard.invite(0).unwrap();
    let body: bytes::Bytes = (0..3 * PIECE + 5).map(|at| (at / 7) as u8).collect::<Vec<u8>>().into();
    let mut came = vec![0; body.len()];
    std::thread::scope(|scope| {
        let invited = invitation.clone();
        let sender = scope.spawn(|| {
            shard.accept(&invitation, 0, &mut on).unwrap();
            // In two parts, the first of which is no whole number of pieces.
            shard.send(1, &[body.slice(..9), body.slice(9..)], 0, &mut on).unwrap();
        });
        client.accept(&invited, 0, &mut on).unwrap();
        client.receive(1, &mut came, 0, &mut on).unwrap();
        sender.join().unwrap();
    });
    assert!(came == body, "the same bytes");
    let (a, b) = (0, PIECE as u64);
    let sent = [
        vec![Up(a), Up(a + 9), Begun(a)],
        vec![Up(b), Done(a), Begun(b)],
        vec![Up(a), Done(b), Begun(a)],
        vec![Up(b), Done(a), Begun(b), Done(b)],
    ];
    assert_eq!(shards_memory.take_steps(), sent.concat());
    let received = [
        vec![Begun(a), Done(a)],
        vec![Begun(b), Down(a), Done(b)],
        vec![Begun(a), Down(b), Done(a)],
        vec![Begun(b), Down(a), Done(b), Down(b)],
    ];
    assert_eq!(clients_memory.take_steps(), received.concat());
    // A copy that fails beside an exchange ends it at both sides, and says why.
    shards_memory.fails_after.store(1, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| shard.send(1, std::slice::from_ref(&body), 0, &mut on).unwrap_err());
        client.receive(1, &mut came, 0, &mut on).unwrap_err();
        let error = sender.join().unwrap();
        assert!(error.message.contains("fails, as the test wants"), "{error}");
    });
    assert_eq!(net.alive(), 0);
}
