//! Callers that leave in the middle of what a shard does for them, over a real connection.

use longshore_fabric::{Connector, GrpcConnector, GrpcOptions};

use super::{
    greedy::{Served, limits},
    *,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_put_whose_caller_left_while_nothing_was_taken_keeps_nothing() {
    let served = Served::new(Config { stall_ms: 600_000, ..limits() }).await;
    let narrow = GrpcOptions {
        shm_arena_bytes: 0,
        tcp_connections_max: 0,
        stream_window_bytes: 1 << 16,
        ..GrpcOptions::default()
    };
    let client = GrpcConnector::new(narrow).shard(&served.address).expect("an address");
    let (tiles, received) = mpsc::channel(4);
    let ctx = CallContext::new("leaves");
    let acks = client.put_blocks(&ctx, identity(""), wire_shape(), received).await.expect("a put stream");
    // An incomplete block, and refusals that nobody reads until no tile is taken any more.
    tiles.send(message(1, 0)).await.expect("the shard reads");
    let bad = TileMessage { crc32c: !message(2, 0).crc32c, ..message(2, 0) };
    let soon = Duration::from_secs(2);
    while tokio::time::timeout(soon, tiles.send(bad.clone())).await.is_ok_and(|sent| sent.is_ok()) {}
    assert_eq!(served.fixture.stats().await.open_blocks, 1);
    drop(acks);
    served.fixture.settled("it ends at once", |stats| stats.open_blocks == 0).await;
    tokio::time::timeout(PATIENCE, tiles.closed()).await.expect("its tiles are let go of");
    served.modest_goes_on(3).await;
}
