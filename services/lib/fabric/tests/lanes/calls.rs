//! What callers see must not depend on the lane.

use std::time::Duration;

use futures::{StreamExt, future::join_all};
use longshore_blocks::BlockKey;
use longshore_fabric::{CallContext, Code, Connector};
use longshore_proto::types::*;
use tokio::sync::mpsc;

use super::{
    fake::{FAULTY, LAYERS, PANICS, STUCK, identity, lookup, shape, tile},
    house::{House, LANES, Lane, SHARD_LANES},
};

fn context() -> CallContext {
    CallContext::new("a test").with_timeout(Duration::from_secs(20))
}

const A: BlockKey = BlockKey([1; 16]);
const B: BlockKey = BlockKey([2; 16]);
const ABSENT: BlockKey = BlockKey([3; 16]);

/// Stores both blocks with tiles of 1 MiB.
async fn put(house: &House) -> Vec<PutAck> {
    let (sender, tiles) = mpsc::channel(1);
    let acks = house.client().put_blocks(&context(), identity(), shape(), tiles).await.unwrap();
    let feeding = async {
        for layer in 0..LAYERS {
            sender.send(tile(A, layer, 1 << 20)).await.unwrap();
            sender.send(tile(B, layer, 1 << 20)).await.unwrap();
        }
        drop(sender);
    };
    let (acks, ()) = tokio::join!(acks.map(Result::unwrap).collect::<Vec<_>>(), feeding);
    acks
}

#[tokio::test]
async fn blocks_go_round() {
    for lane in SHARD_LANES {
        let house = House::new(lane).await;
        let shard = house.client();
        let acks = put(&house).await;
        assert_eq!(
            acks.iter().map(|ack| (ack.key, ack.outcome)).collect::<Vec<_>>(),
            [(A, PutOutcome::Stored), (B, PutOutcome::Stored)]
        );
        assert_eq!(shard.lookup(&context(), lookup(&[A, ABSENT, B])).await.unwrap(), [true, false, true]);
        let get = GetBlocks::whole(identity(), vec![B, ABSENT]);
        let tiles: Vec<_> =
            shard.get_blocks(&context(), get).await.unwrap().map(Result::unwrap).collect().await;
        assert_eq!(tiles, [Some(tile(B, 0, 1 << 20)), Some(tile(B, 1, 1 << 20)), None], "{lane:?}");
        let open = |blocks| OpenView { identity: identity(), blocks, append_to: None, lease_ms: 1_000 };
        let opened = shard.open_view(&context(), open(vec![(0, A), (5, ABSENT)])).await.unwrap();
        assert_eq!(opened, OpenedView::Missing(vec![ABSENT]));
        let opened = shard.open_view(&context(), open(vec![(0, A), (5, B)])).await.unwrap();
        assert_eq!(opened, OpenedView::Open { view_id: 1 });
        let stats = shard.stats(&context()).await.unwrap();
        assert_eq!((stats.shard_id.as_str(), stats.blocks, stats.views), ("fake", 2, 1));
        shard.close_view(&context(), 1).await.unwrap();
        assert_eq!(shard.stats(&context()).await.unwrap().views, 0);
    }
}

#[tokio::test]
async fn front_doors_answer() {
    for lane in LANES {
        let house = House::new(lane).await;
        assert_eq!(house.front().tokenize(&context(), "", "ab", false).await.unwrap(), [1, 97, 98]);
        assert_eq!(house.front().list_models(&context()).await.unwrap()[0].name, "fake");
        let process = house.connector.describer(&house.address).unwrap();
        assert_eq!(process.describe(&context()).await.unwrap().this.role, Role::Router);
    }
}

#[tokio::test]
async fn the_context_travels() {
    for lane in SHARD_LANES {
        let house = House::new(lane).await;
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let sent = CallContext { traceparent: Some(parent.to_owned()), ..context() };
        house.client().lookup(&sent, lookup(&[A])).await.unwrap();
        let seen = house.shard.seen.lock().unwrap().clone().unwrap();
        assert_eq!((seen.request_id.as_str(), seen.traceparent.as_deref()), ("a test", Some(parent)));
        let left = seen.time_left().unwrap();
        assert!(left > Duration::from_secs(10) && left <= Duration::from_secs(20), "{lane:?}: {left:?}");
    }
}

#[tokio::test]
async fn a_service_knows_over_which_lane_tiles_came() {
    for lane in SHARD_LANES {
        let house = House::new(lane).await;
        put(&house).await;
        let expected = match lane {
            Lane::Local => longshore_fabric::Lane::Local,
            Lane::Shm => longshore_fabric::Lane::Shm,
            Lane::Tcp => longshore_fabric::Lane::Tcp,
            Lane::Nccl => longshore_fabric::Lane::Nccl,
            Lane::Grpc | Lane::StockClient | Lane::StockServer => longshore_fabric::Lane::Grpc,
        };
        let seen = house.shard.seen.lock().unwrap().clone().unwrap();
        assert_eq!(seen.lane, expected, "{lane:?}");
    }
}

#[tokio::test]
async fn what_operators_ask_goes_round() {
    for lane in SHARD_LANES {
        let house = House::new(lane).await;
        let (shard, after) = (house.client(), Some((identity().namespace, A)));
        let list = ListBlocks { after, ..ListBlocks::default() };
        assert_eq!(shard.list_blocks(&context(), list).await.unwrap().next, after, "{lane:?}");
        let wrong = ListBlocks { limit: LIST_BLOCKS_MAX + 1, ..ListBlocks::default() };
        let refused = shard.list_blocks(&context(), wrong).await;
        let refused = refused.err().and_then(|error| error.field);
        assert_eq!(
            refused.as_deref(),
            (lane != Lane::Local).then_some("limit"),
            "{lane:?}: the wire checks it"
        );
        let usual = shard.start_scrub(&context(), None).await.unwrap();
        assert_eq!((usual.round, usual.bytes_per_second), (3, 7), "{lane:?}");
        assert_eq!(shard.start_scrub(&context(), Some(9)).await.unwrap().bytes_per_second, 9, "{lane:?}");
        let (begun, ended) =
            (shard.drain(&context(), false).await.unwrap(), shard.drain(&context(), true).await.unwrap());
        assert_eq!((begun.draining, ended.draining, begun.moved_blocks), (true, false, 5), "{lane:?}");
    }
}

#[tokio::test]
async fn error_details_survive() {
    for lane in SHARD_LANES {
        let house = House::new(lane).await;
        let error = house.client().lookup(&context(), lookup(&[FAULTY])).await.unwrap_err();
        assert_eq!(error.code, Code::ResourceExhausted, "{lane:?}");
        assert_eq!(error.message, "the `queue` is full, hint: wait");
        assert_eq!(error.field.as_deref(), Some("keys"));
        assert_eq!(error.retry_after, Some(Duration::from_millis(250)));
    }
}

#[tokio::test]
async fn a_panic_is_internal_and_harms_nobody_else() {
    for lane in SHARD_LANES {
        let house = House::new(lane).await;
        let error = house.client().lookup(&context(), lookup(&[PANICS])).await.unwrap_err();
        assert_eq!(error.code, Code::Internal, "{lane:?}");
        house.client().lookup(&context(), lookup(&[A])).await.unwrap();
    }
}

/// All lanes at once: each of them waits for its deadlines, which leave enough time for calls to come to the service.
#[tokio::test]
async fn deadlines_end_calls_and_streams() {
    let over = |lane: Lane| async move {
        let house = House::new(lane).await;
        // What a lane opens for its first call is open then.
        let absent = GetBlocks::whole(identity(), vec![ABSENT]);
        let answers = house.client().get_blocks(&context(), absent).await.unwrap();
        assert_eq!(answers.map(Result::unwrap).collect::<Vec<_>>().await.len(), 1, "{lane:?}");
        let hurried = || CallContext::new("hurried").with_timeout(Duration::from_secs(3));
        let error = house.client().lookup(&hurried(), lookup(&[STUCK])).await.unwrap_err();
        assert_eq!(error.code, Code::DeadlineExceeded, "{lane:?}");
        house.expect_gone().await;
        let get = GetBlocks::whole(identity(), vec![STUCK]);
        let mut tiles = house.client().get_blocks(&hurried(), get).await.unwrap();
        assert_eq!(tiles.next().await.unwrap().unwrap(), None);
        assert_eq!(tiles.next().await.unwrap().unwrap_err().code, Code::DeadlineExceeded, "{lane:?}");
        assert!(tiles.next().await.is_none());
        house.expect_gone().await;
    };
    join_all(SHARD_LANES.map(over)).await;
}

#[tokio::test]
async fn cancellation_reaches_the_service() {
    for lane in SHARD_LANES {
        let house = House::new(lane).await;
        let context = CallContext::new("cancelled");
        let client = house.client();
        let call = client.lookup(&context, lookup(&[STUCK]));
        let cancel = async {
            house.called().await;
            context.cancel.cancel();
        };
        let (answer, ()) = tokio::join!(call, cancel);
        assert_eq!(answer.unwrap_err().code, Code::Cancelled, "{lane:?}");
        house.expect_gone().await;
    }
}

#[tokio::test]
async fn dropping_a_call_or_its_stream_reaches_the_service() {
    for lane in SHARD_LANES {
        let house = House::new(lane).await;
        let client = house.client();
        let context = CallContext::new("dropped");
        let call = client.lookup(&context, lookup(&[STUCK]));
        tokio::select! {
            answer = call => panic!("it is stuck: {answer:?}"),
            () = house.called() => {}
        }
        house.expect_gone().await;
        let get = GetBlocks::whole(identity(), vec![STUCK]);
        let mut tiles = client.get_blocks(&context, get).await.unwrap();
        assert_eq!(tiles.next().await.unwrap().unwrap(), None);
        drop(tiles);
        house.expect_gone().await;
    }
}

#[tokio::test]
async fn nobody_there_is_unavailable() {
    let house = House::new(Lane::Grpc).await;
    for address in ["local:nobody", "http://127.0.0.1:1"] {
        let error = house.connector.shard(address).unwrap().stats(&context()).await.unwrap_err();
        assert_eq!(error.code, Code::Unavailable, "{address}: {error}");
    }
    for address in ["local:", "127.0.0.1:1", "https://a:1", ""] {
        let error = house.connector.shard(address).unwrap_err();
        assert_eq!(
            (error.code, error.field.as_deref()),
            (Code::InvalidArgument, Some("address")),
            "{address}"
        );
    }
}

#[tokio::test]
async fn services_may_come_and_go() {
    let house = House::new(Lane::Local).await;
    let local = longshore_fabric::LocalConnector::new();
    let early = local.shard("local:late").unwrap();
    assert_eq!(early.stats(&context()).await.unwrap_err().code, Code::Unavailable);
    local.add_shard("late", house.client());
    assert_eq!(early.stats(&context()).await.unwrap().shard_id, "fake");
    local.remove("late");
    assert_eq!(early.stats(&context()).await.unwrap_err().code, Code::Unavailable);
}
