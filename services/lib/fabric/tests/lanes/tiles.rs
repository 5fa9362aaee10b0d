//! Tiles over every lane of a shard: sizes, damage, fallback, slots.

use std::time::Duration;

use futures::StreamExt;
use longshore_blocks::BlockKey;
use longshore_fabric::{CallContext, Code, Connector, GrpcConnector, GrpcOptions, Shard};
use longshore_proto::types::*;
use tokio::sync::mpsc;

use super::{
    fake::{HEADS, LAYERS, identity, lookup, shape, tile},
    house::{House, Lane, SHARD_LANES},
};

fn context() -> CallContext {
    CallContext::new("tiles").with_timeout(Duration::from_secs(30))
}

pub(crate) async fn put(shard: &dyn Shard, tiles: Vec<TileMessage>) -> Vec<(u8, PutOutcome)> {
    let (sender, received) = mpsc::channel(1);
    let acks = shard.put_blocks(&context(), identity(), shape(), received).await.unwrap();
    let feed = async {
        for tile in tiles {
            if sender.send(tile).await.is_err() {
                break;
            }
        }
        drop(sender);
    };
    let (acks, ()) = tokio::join!(acks.map(Result::unwrap).collect::<Vec<_>>(), feed);
    acks.into_iter().map(|ack| (ack.key.0[0], ack.outcome)).collect()
}

pub(crate) async fn get(shard: &dyn Shard, names: &[u8]) -> Vec<Option<TileMessage>> {
    let keys = names.iter().map(|name| BlockKey([*name; 16])).collect();
    let get = GetBlocks::whole(identity(), keys);
    shard.get_blocks(&context(), get).await.unwrap().map(Result::unwrap).collect().await
}

pub(crate) fn block(name: u8, bytes: usize) -> Vec<TileMessage> {
    (0..LAYERS).map(|layer| tile(BlockKey([name; 16]), layer, bytes)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn tiles_of_every_size_go_round() {
    for lane in SHARD_LANES {
        let house = House::new(lane).await;
        let client = house.client();
        // Around the limits of slots, frames and windows; empty ones too.
        let sizes =
            [0, 1, 255, 256, 16_383, 16_384, 65_535, 1 << 20, (1 << 20) + 1, 2 << 20, (2 << 20) + 1, 9 << 20];
        for (name, bytes) in (1u8..).zip(sizes) {
            let stored = put(&*client, block(name, bytes)).await;
            assert_eq!(stored, [(name, PutOutcome::Stored)], "{lane:?}, {bytes} bytes");
            let read = get(&*client, &[name]).await;
            let sent: Vec<_> = block(name, bytes).into_iter().map(Some).collect();
            assert_eq!(read, sent, "{lane:?}, {bytes} bytes");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_of_tiles_go_round_with_what_proves_them() {
    for lane in SHARD_LANES {
        let house = House::new(lane).await;
        let client = house.client();
        for (name, bytes) in (1u8..).zip([4, 1_024, 400_000, 8 << 20]) {
            put(&*client, block(name, bytes)).await;
            for heads in [0..1, 1..4, 0..4] {
                let get = GetBlocks::whole(identity(), vec![BlockKey([name; 16]), BlockKey([99; 16])]);
                let read = client.get_heads(&context(), get, heads.clone()).await.unwrap();
                let read: Vec<_> = read.map(Result::unwrap).collect().await;
                assert_eq!((read.len(), read.last()), (LAYERS as usize + 1, Some(&None)), "{lane:?}");
                for (read, whole) in read.iter().flatten().zip(block(name, bytes)) {
                    let (copy, told) = read.copy_heads(heads.clone(), HEADS, bytes / HEADS as usize).unwrap();
                    let (first, end) = (heads.start as usize * bytes / 4, heads.end as usize * bytes / 4);
                    assert_eq!(copy, &whole.data[first..end], "{lane:?}, {bytes} bytes, {heads:?}");
                    assert_eq!(told, whole.crc32c);
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_of_tiles_are_not_stored_over_any_lane_between_processes() {
    for lane in SHARD_LANES.into_iter().filter(|lane| *lane != Lane::Local) {
        let house = House::new(lane).await;
        // As long as a whole tile: nothing but what it says of itself tells that it is none.
        let part = |mut tile: TileMessage| {
            tile.data = tile.data.clone().of_heads(HeadPart::of(&tile.data, HEADS as usize, 0));
            tile
        };
        let (sender, received) = mpsc::channel(4);
        sender.send(block(1, 400).remove(0)).await.unwrap();
        sender.send(part(block(1, 400).remove(1))).await.unwrap();
        let error = match house.client().put_blocks(&context(), identity(), shape(), received).await {
            Err(error) => error,
            Ok(mut acks) => acks.next().await.unwrap().unwrap_err(),
        };
        assert_eq!(
            (error.code, error.field.as_deref()),
            (Code::InvalidArgument, Some("tile.heads")),
            "{lane:?}"
        );
        assert_eq!(get(&*house.client(), &[1]).await.len(), 1, "{lane:?}: the block is not whole");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_tile_harms_only_its_block() {
    for lane in SHARD_LANES {
        let house = House::new(lane).await;
        let mut bad = block(1, 300_000);
        bad[1].crc32c ^= 1;
        let outcomes = put(&*house.client(), bad.into_iter().chain(block(2, 300_000)).collect()).await;
        assert_eq!(outcomes, [(1, PutOutcome::Corrupt), (2, PutOutcome::Stored)], "{lane:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_streams_at_once_do_not_mix() {
    for lane in SHARD_LANES {
        let house = House::new(lane).await;
        let client = house.client();
        let puts = (1..=16u8).map(|name| put(&*client, block(name, 400_000)));
        for (name, stored) in (1u8..).zip(futures::future::join_all(puts).await) {
            assert_eq!(stored, [(name, PutOutcome::Stored)], "{lane:?}");
        }
        let names: Vec<u8> = (1..=16).collect();
        let gets = (0..4).map(|_| get(&*client, &names));
        let wanted: Vec<_> = names.iter().flat_map(|name| block(*name, 400_000)).map(Some).collect();
        for read in futures::future::join_all(gets).await {
            assert_eq!(read, wanted, "{lane:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tiles_come_in_the_order_that_was_asked_for() {
    for lane in SHARD_LANES {
        let house = House::new(lane).await;
        let client = house.client();
        for name in [1, 2] {
            put(&*client, block(name, 100_000)).await;
        }
        let keys = [2, 9, 1].map(|name| BlockKey([name; 16])).to_vec();
        for order in [TileOrder::Blocks, TileOrder::Layers] {
            let get = GetBlocks { order, ..GetBlocks::whole(identity(), keys.clone()) };
            let read = client.get_blocks(&context(), get).await.unwrap();
            let read: Vec<_> =
                read.map(|tile| tile.unwrap().map(|tile| (tile.key.0[0], tile.layer))).collect().await;
            let wanted = match order {
                TileOrder::Blocks => [Some((2, 0)), Some((2, 1)), None, Some((1, 0)), Some((1, 1))],
                TileOrder::Layers => [Some((2, 0)), None, Some((1, 0)), Some((2, 1)), Some((1, 1))],
            };
            assert_eq!(read, wanted, "{lane:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stops_harms_nobody() {
    for lane in SHARD_LANES {
        let house = House::new(lane).await;
        let client = house.client();
        for name in 1..=24 {
            put(&*client, block(name, 1 << 20)).await;
        }
        let keys = (1..=24).map(|name| BlockKey([name; 16])).collect();
        let all = GetBlocks::whole(identity(), keys);
        // Reads two tiles of 48 MiB, keeps them, and asks for no more.
        let mut stalled = client.get_blocks(&context(), all).await.unwrap();
        let kept = [stalled.next().await, stalled.next().await];
        let others = (1..=24).map(|name| BlockKey([name; 16])).collect::<Vec<_>>();
        let found = client.lookup(&context(), lookup(&others)).await.unwrap();
        assert!(found.into_iter().all(|held| held), "{lane:?}");
        let other = house.connector.shard(&house.address).unwrap();
        assert_eq!(get(&*other, &[3]).await.len(), LAYERS as usize, "{lane:?}");
        drop((stalled, kept));
        assert_eq!(get(&*client, &[5]).await, block(5, 1 << 20).into_iter().map(Some).collect::<Vec<_>>());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shm_is_chosen_and_grpc_takes_over() {
    let house = House::new(Lane::Shm).await;
    let connector = GrpcConnector::new(GrpcOptions::default());
    let chosen = connector.shard(&house.address).unwrap();
    assert_eq!(put(&*chosen, block(1, 300_000)).await, [(1, PutOutcome::Stored)]);
    // No such lane beside a server that offers none, beside another host's address, and beside nobody.
    let plain = House::new(Lane::StockServer).await;
    assert!(connector.shm_shard(&plain.address).await.is_err());
    for nowhere in ["http://192.0.2.1:9", "http://127.0.0.1:1"] {
        assert!(connector.shm_shard(nowhere).await.is_err(), "{nowhere}");
    }
    let fallen = connector.shard(&plain.address).unwrap();
    assert_eq!(put(&*fallen, block(1, 300_000)).await, [(1, PutOutcome::Stored)]);
    assert_eq!(get(&*fallen, &[1]).await.len(), LAYERS as usize);
}

#[tokio::test]
async fn shared_memory_is_refused_on_connections_without_it() {
    use longshore_proto::v1::{
        self, kv_store_service_client::KvStoreServiceClient, put_blocks_request::Part,
    };
    let house = House::new(Lane::Grpc).await;
    let (identity, shape) = (Some(identity().into()), Some(shape().into()));
    let start = v1::PutBlocksStart { identity, shape, ..Default::default() };
    let shared = v1::SharedBytes { slot: 0, generation: 1, bytes: 100_000 };
    let lie = v1::Tile { key: vec![1; 16].into(), shared: Some(shared), ..v1::Tile::default() };
    let messages =
        [Part::Start(start), Part::Tile(lie)].map(|part| v1::PutBlocksRequest { part: Some(part) });
    let channel = tonic::transport::Channel::from_shared(house.address.clone()).unwrap().connect_lazy();
    let mut client = KvStoreServiceClient::new(channel);
    let answers = client.put_blocks(futures::stream::iter(messages)).await;
    let status = match answers {
        Err(status) => status,
        Ok(answers) => answers.into_inner().next().await.unwrap().unwrap_err(),
    };
    let error = longshore_fabric::status::from_status(&status);
    assert_eq!(error.field.as_deref(), Some("tile.shared"), "{error}");
}
