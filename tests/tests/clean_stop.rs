//! A real shard that is asked to end, and starts again over the same disk: what was in its memory is still there.

use std::time::{Duration, Instant};

use longshore_blocks::quorum::CopyRule;
use longshore_model::testing::TinyOptions;
use longshore_tests::{
    client::await_start,
    fleet::{Fleet, FleetPlan},
    store_client::StoreClient,
};

const PATIENCE: Duration = Duration::from_secs(100);
const BLOCKS: usize = 60;

/// Blocks of [`BLOCKS`] that a shard finds after it was asked to end with SIGTERM and started again. All of them fit into its memory.
async fn found_after_restart(save_ms: u64) -> usize {
    let disk = tempfile::tempdir().expect("a temporary folder");
    let path = disk.path().display().to_string();
    let sets = vec![
        "model.block_tokens=16".to_owned(),
        "model.stripe_blocks=1".to_owned(),
        format!("kvstore.disk.path={path:?}"),
        format!("kvstore.disk.save_ms={save_ms}"),
        "telemetry.filter=\"error\"".to_owned(),
    ];
    let plan = FleetPlan { shards: 1, sets, model: TinyOptions::default(), ..FleetPlan::default() };
    let mut fleet = Fleet::start(&plan);
    let describe = await_start(fleet.address("kv-0"), None, PATIENCE).await;
    let mut client = StoreClient::new(fleet.members(), &describe.models[0], CopyRule::default());
    assert_eq!(client.store(1, BLOCKS).await, 0, "nothing was refused");
    let stats = client.stats(0).await.expect("the shard answers");
    let on_disk = stats.tiers.iter().find(|tier| tier.name == "disk").expect("there is a disk tier");
    assert_eq!((stats.blocks, on_disk.blocks), (BLOCKS as u64, 0), "all of them are in memory alone");
    fleet.signal("kv-0", "-TERM");
    let began = Instant::now();
    while fleet.runs("kv-0") {
        assert!(began.elapsed() < PATIENCE, "it does not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    fleet.start_one("kv-0");
    let describe = await_start(fleet.address("kv-0"), None, PATIENCE).await;
    let client = client.reconnected(fleet.members(), &describe.models[0], CopyRule::default());
    // Reading checks every byte.
    BLOCKS - client.unread().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_keeps_what_was_in_memory() {
    assert_eq!(found_after_restart(10_000).await, BLOCKS);
    assert_eq!(found_after_restart(0).await, 0, "and it is that which keeps it");
}
