//! The `nccl` lane against clients that lie: epochs and bodies that cannot be are refused by their field, and harm nobody else.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::StreamExt;
use longshore_blocks::BlockKey;
use longshore_fabric::{
    CallContext, Code, Error, GrpcConnector, TcpPatience,
    nccl::{GpuEnd, GpuInvitation},
    server::ServerOptions,
    status::from_status,
};
use longshore_proto::{
    types::GetBlocks,
    v1::{self, put_blocks_request::Part},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{
    fake::{FakeRouter, identity, shape, tile},
    gpu::Net,
    house::{House, LONG, Lane, over_nccl, patient},
    liar::{Liar, Lie, Offer, Then},
    raw,
    tiles::{block, get, put},
};

const SHORT: Duration = Duration::from_millis(300);
const MEMBER: [u8; 16] = [0x5a; 16];

async fn house(net: &Arc<Net>, members_max: usize) -> House {
    // Bodies are not waited for for long; messages of honest clients are.
    let tcp_patience = TcpPatience { read: SHORT, ..patient() };
    let nccl = Some(net.gpu());
    let options =
        ServerOptions { nccl, nccl_members_max: members_max, tcp_patience, ..ServerOptions::default() };
    House::with(Lane::Grpc, FakeRouter::default(), options).await
}

fn refused(status: &Status, code: Code, field: Option<&str>) {
    let error = from_status(status);
    assert_eq!((error.code, error.field.as_deref()), (code, field), "{error}");
    assert!(!error.message.is_empty());
}

async fn join(client: &mut raw::Client, member: &[u8]) -> Result<v1::JoinNcclEpochResponse, Status> {
    let member = member.to_vec().into();
    client.join_nccl_epoch(v1::JoinNcclEpochRequest { member }).await.map(tonic::Response::into_inner)
}

/// An epoch that both sides joined, as its client names it; the client's end lives as long as the rank.
async fn joined(net: &Arc<Net>, client: &mut raw::Client) -> (v1::NcclEpoch, tokio::task::JoinHandle<()>) {
    let invited = join(client, &MEMBER).await.unwrap();
    let mut lane = net.gpu().lane(GpuEnd::Client);
    let invitation = GpuInvitation {
        incarnation: invited.incarnation,
        epoch: invited.number,
        unique_id: invited.unique_id[..].try_into().unwrap(),
    };
    let (number, incarnation) = (invited.number, invited.incarnation);
    let (told, is_joined) = tokio::sync::oneshot::channel();
    let end = tokio::task::spawn_blocking(move || {
        let mut looks = 0;
        lane.accept(&invitation, 0, &mut || {
            looks += 1;
            std::thread::sleep(Duration::from_millis(1));
            looks < 60_000
        })
        .unwrap();
        told.send(()).unwrap();
        std::thread::sleep(SHORT * 4);
    });
    is_joined.await.unwrap();
    (v1::NcclEpoch { incarnation, number, member: MEMBER.to_vec().into() }, end)
}

fn lease(epoch: &v1::NcclEpoch, lease: u64) -> Option<v1::NcclLease> {
    Some(v1::NcclLease { epoch: Some(epoch.clone()), lease })
}

fn start(nccl: Option<v1::NcclLease>) -> v1::PutBlocksRequest {
    let (identity, shape) = (Some(identity().into()), Some(shape().into()));
    let start = v1::PutBlocksStart { identity, shape, nccl, ..Default::default() };
    v1::PutBlocksRequest { part: Some(Part::Start(start)) }
}

fn named(number: u64, bytes: u32) -> v1::Tile {
    let bare = tile(BlockKey([1; 16]), 0, 0);
    v1::Tile { nccl: Some(v1::NcclBytes { number, bytes }), ..v1::Tile::from(bare) }
}

/// How a store stream of these messages ends that stays open.
async fn put_messages(client: &mut raw::Client, messages: Vec<v1::PutBlocksRequest>) -> Status {
    let (sender, received) = mpsc::channel(8);
    for message in messages {
        sender.send(message).await.unwrap();
    }
    match client.put_blocks(ReceiverStream::new(received)).await {
        Err(status) => status,
        Ok(answers) => {
            let ended = tokio::time::timeout(LONG, answers.into_inner().next()).await;
            ended.expect("it ends").unwrap().unwrap_err()
        }
    }
}

async fn unharmed(house: &House) {
    house.shard.blocks.lock().unwrap().clear();
    assert_eq!(put(&*house.client(), block(200, 100_000)).await.len(), 1);
    assert_eq!(get(&*house.client(), &[200]).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn members_that_cannot_be_are_refused_and_their_number_is_bounded() {
    let net = Arc::new(Net::default());
    let house = house(&net, 4).await;
    let mut client = raw::client(&house).await;
    for member in [&[][..], &[1; 15], &[1; 17], &[0; 16], &[1; 1 << 20]] {
        refused(&join(&mut client, member).await.unwrap_err(), Code::InvalidArgument, Some("member"));
    }
    // Half of what the listener has, for one connection; all of it for all.
    for member in 1..=2 {
        join(&mut client, &[member; 16]).await.unwrap();
    }
    refused(&join(&mut client, &[3; 16]).await.unwrap_err(), Code::ResourceExhausted, None);
    let mut other = raw::client(&house).await;
    for member in 4..=5 {
        join(&mut other, &[member; 16]).await.unwrap();
    }
    let mut last = raw::client(&house).await;
    let status = join(&mut last, &[6; 16]).await.unwrap_err();
    refused(&status, Code::ResourceExhausted, None);
    assert!(from_status(&status).retry_after.is_some());
    // Whoever is a member already may be invited again, to a later epoch each time.
    let again: Vec<_> =
        [join(&mut client, &[1; 16]).await.unwrap(), join(&mut client, &[1; 16]).await.unwrap()]
            .iter()
            .map(|invited| (invited.number, invited.rank, invited.ranks, invited.unique_id.len()))
            .collect();
    assert_eq!(again, [(2, 1, 2, 128), (3, 1, 2, 128)]);
    unharmed(&house).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn epochs_that_cannot_be_are_refused_by_their_field() {
    let net = Arc::new(Net::default());
    let house = house(&net, 4).await;
    let mut client = raw::client(&house).await;
    let (good, _end) = joined(&net, &mut client).await;
    for (epoch, number, code, field) in [
        (None, 1, Code::InvalidArgument, "start.nccl.epoch"),
        (
            Some(v1::NcclEpoch { incarnation: 0, ..good.clone() }),
            1,
            Code::InvalidArgument,
            "start.nccl.epoch.incarnation",
        ),
        (
            Some(v1::NcclEpoch { number: 0, ..good.clone() }),
            1,
            Code::InvalidArgument,
            "start.nccl.epoch.number",
        ),
        (
            Some(v1::NcclEpoch { member: vec![1; 15].into(), ..good.clone() }),
            1,
            Code::InvalidArgument,
            "start.nccl.epoch.member",
        ),
        (Some(good.clone()), 0, Code::InvalidArgument, "start.nccl.lease"),
        (
            Some(v1::NcclEpoch { incarnation: good.incarnation ^ 1, ..good.clone() }),
            1,
            Code::Unavailable,
            "start.nccl",
        ),
        (Some(v1::NcclEpoch { number: good.number + 1, ..good.clone() }), 1, Code::Unavailable, "start.nccl"),
        (
            Some(v1::NcclEpoch { member: vec![1; 16].into(), ..good.clone() }),
            1,
            Code::Unavailable,
            "start.nccl",
        ),
    ] {
        let message = start(Some(v1::NcclLease { epoch, lease: number }));
        refused(&put_messages(&mut client, vec![message]).await, code, Some(field));
    }
    // Both ways at once; parts of tiles; a call without an epoch; a shard without the lane.
    let connection = Some(v1::TileConnection { id: 1, token: vec![1; 16].into(), lease: 1 });
    let base = v1::GetBlocksRequest {
        identity: Some(identity().into()),
        keys: vec![1; 16].into(),
        nccl: lease(&good, 1),
        ..Default::default()
    };
    let both = v1::GetBlocksRequest { connection, ..base.clone() };
    refused(&client.get_blocks(both).await.unwrap_err(), Code::InvalidArgument, Some("nccl"));
    let parts = v1::GetBlocksRequest { heads: 1, ..base.clone() };
    refused(&client.get_blocks(parts).await.unwrap_err(), Code::InvalidArgument, Some("nccl"));
    let bare = vec![start(None), v1::PutBlocksRequest { part: Some(Part::Tile(named(0, 1 << 16))) }];
    refused(&put_messages(&mut client, bare).await, Code::InvalidArgument, Some("tile.nccl"));
    let plain = House::new(Lane::Grpc).await;
    let mut elsewhere = raw::client(&plain).await;
    refused(&join(&mut elsewhere, &MEMBER).await.unwrap_err(), Code::Unimplemented, None);
    refused(&elsewhere.get_blocks(base.clone()).await.unwrap_err(), Code::InvalidArgument, Some("nccl"));
    // None of it harmed the epoch.
    let mut answers = client.get_blocks(base).await.unwrap().into_inner();
    assert!(answers.next().await.unwrap().unwrap().missing && answers.next().await.is_none());
    let kept = answers.trailers().await.unwrap().unwrap();
    assert!(kept.get("longshore-tile-connection").is_some());
    unharmed(&house).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_call_at_a_time_has_an_epoch_and_numbers_ascend() {
    let net = Arc::new(Net::default());
    let house = house(&net, 4).await;
    let mut client = raw::client(&house).await;
    let (epoch, _end) = joined(&net, &mut client).await;
    let (sender, received) = mpsc::channel(8);
    sender.send(start(lease(&epoch, 7))).await.unwrap();
    let mut first = client.put_blocks(ReceiverStream::new(received)).await.unwrap().into_inner();
    refused(
        &put_messages(&mut client, vec![start(lease(&epoch, 8))]).await,
        Code::Unavailable,
        Some("start.nccl"),
    );
    drop(sender);
    assert!(first.next().await.is_none());
    let late = put_messages(&mut client, vec![start(lease(&epoch, 7))]).await;
    refused(&late, Code::InvalidArgument, Some("start.nccl.lease"));
    // Told that it is over, it is over; told again, it is not that.
    let end = |epoch: &v1::NcclEpoch| v1::EndNcclEpochRequest { epoch: Some(epoch.clone()) };
    let stranger = v1::NcclEpoch { member: vec![3; 16].into(), ..epoch.clone() };
    let before = v1::NcclEpoch { incarnation: epoch.incarnation ^ 1, ..epoch.clone() };
    for (epoch, ended) in [(&stranger, false), (&before, false), (&epoch, true), (&epoch, false)] {
        assert_eq!(client.end_nccl_epoch(end(epoch)).await.unwrap().into_inner().ended, ended);
    }
    let nobody = v1::EndNcclEpochRequest { epoch: None };
    refused(&client.end_nccl_epoch(nobody).await.unwrap_err(), Code::InvalidArgument, Some("epoch"));
    let none = v1::NcclEpoch { member: vec![].into(), ..epoch.clone() };
    refused(
        &client.end_nccl_epoch(end(&none)).await.unwrap_err(),
        Code::InvalidArgument,
        Some("epoch.member"),
    );
    refused(
        &put_messages(&mut client, vec![start(lease(&epoch, 9))]).await,
        Code::Unavailable,
        Some("start.nccl"),
    );
    unharmed(&house).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_cannot_be_or_never_come_end_their_call_alone() {
    let net = Arc::new(Net::default());
    let house = house(&net, 4).await;
    let mut client = raw::client(&house).await;
    let beside = v1::Tile { data: vec![1].into(), ..named(0, 1 << 16) };
    let part = v1::Tile { heads: Some(v1::HeadPart::default()), ..named(0, 1 << 16) };
    for (tile, code, field) in [
        (named(1, 1 << 16), Code::InvalidArgument, "tile.nccl.number"),
        (named(u64::MAX, 1 << 16), Code::InvalidArgument, "tile.nccl.number"),
        (named(0, 0), Code::InvalidArgument, "tile.nccl.bytes"),
        (named(0, u32::MAX), Code::InvalidArgument, "tile.nccl.bytes"),
        (beside, Code::InvalidArgument, "tile.nccl"),
        (part, Code::InvalidArgument, "tile.nccl"),
        (v1::Tile { key: vec![1; 3].into(), ..named(0, 1 << 16) }, Code::InvalidArgument, "tile.key"),
        // Named, and not sent: it is waited for as long as the lane is patient.
        (named(0, 1 << 16), Code::Unavailable, "nccl"),
    ] {
        let (epoch, _end) = joined(&net, &mut client).await;
        let messages = vec![start(lease(&epoch, 1)), v1::PutBlocksRequest { part: Some(Part::Tile(tile)) }];
        refused(&put_messages(&mut client, messages).await, code, Some(field));
        // What did not end well is over.
        let again = put_messages(&mut client, vec![start(lease(&epoch, 2))]).await;
        refused(&again, Code::Unavailable, Some("start.nccl"));
        unharmed(&house).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_epoch_that_was_told_twice_is_not_joined_twice() {
    let net = Arc::new(Net::default());
    let mut lane = net.gpu().lane(GpuEnd::Client);
    let invitation = GpuInvitation { incarnation: 3, epoch: 1, unique_id: [1; 128] };
    let lost: Error = lane.accept(&invitation, 0, &mut || false).unwrap_err();
    assert_eq!((lost.code, lost.field.as_deref()), (Code::Unavailable, Some("nccl")), "{lost}");
    let again = lane.accept(&invitation, 0, &mut || false).unwrap_err();
    assert!(again.message.contains("`epoch` is 1, 1 was before it"), "{again}");
    let zeros = GpuInvitation { epoch: 2, unique_id: [0; 128], ..invitation };
    let zeros = lane.accept(&zeros, 0, &mut || false).unwrap_err();
    assert!(zeros.message.contains("`unique_id` is all zeros"), "{zeros}");
}

#[tokio::test(flavor = "multi_thread")]
async fn invitations_that_make_no_sense_are_not_followed() {
    let net = Arc::new(Net::default());
    let good = || v1::JoinNcclEpochResponse {
        incarnation: 1,
        number: 1,
        unique_id: vec![1; 128].into(),
        rank: 1,
        ranks: 2,
    };
    for (invites, sign) in [
        (v1::JoinNcclEpochResponse { ranks: 3, ..good() }, "`ranks` is 3"),
        (v1::JoinNcclEpochResponse { rank: 0, ..good() }, "`rank` is 0"),
        (v1::JoinNcclEpochResponse { incarnation: 0, ..good() }, "`incarnation` is 0"),
        (v1::JoinNcclEpochResponse { number: 0, ..good() }, "`number` is 0"),
        (v1::JoinNcclEpochResponse { unique_id: vec![1; 127].into(), ..good() }, "`unique_id` has 127"),
        (v1::JoinNcclEpochResponse { unique_id: vec![0; 128].into(), ..good() }, "`unique_id` is all zeros"),
    ] {
        let offer = Offer { invites: Some(invites), ..Offer::default() };
        let liar = Liar::offering(Lie::new(Vec::new(), Then::Close), offer).await;
        let shard = GrpcConnector::new(over_nccl(&net)).nccl_shard(&liar.address).unwrap();
        let get_one = || {
            let keys = vec![BlockKey([1; 16])];
            let one = GetBlocks::whole(identity(), keys);
            async { shard.get_blocks(&CallContext::new("lied to"), one).await }
        };
        let error = get_one().await.err().unwrap();
        assert!(error.code == Code::DataLoss && error.message.contains(sign), "{error}");
        // Who says such things is not asked again at once.
        assert_eq!(get_one().await.err().unwrap().code, Code::Unavailable);
        assert_eq!(liar.offers.load(Ordering::SeqCst), 1);
        assert_eq!(net.alive(), 0, "nobody tried to join");
    }
}
