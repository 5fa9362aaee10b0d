//! Copies of blocks that lie on disk: a restart knows where they belong, and disk is room for them.

use std::path::Path;

use longshore_blocks::{BlockPlace, quorum::CopyRule};
use longshore_cluster::{ClusterView, Labels, Member, Role};
use longshore_fabric::LocalConnector;

use super::{
    disk::{folder, released, tiers},
    inventory::Watcher,
    *,
};
use crate::{Cluster, RepairConfig};

/// Two shards that know of each other, both served here.
struct Site {
    view: Arc<ClusterView>,
    connector: LocalConnector,
    views: watch::Sender<Arc<ClusterView>>,
}

impl Site {
    fn new() -> Self {
        let member = |id: &str| Member {
            id: id.to_owned(),
            role: Role::KvStore,
            address: format!("local:{id}"),
            incarnation: 1,
            weight: 1,
            labels: Labels::default(),
        };
        let view = ClusterView::new(["kv-0", "kv-1"].map(member).into()).expect("the members are valid");
        let view = Arc::new(view);
        let (views, _) = watch::channel(Arc::clone(&view));
        Self { view, connector: LocalConnector::new(), views }
    }

    fn identity(&self) -> Identity {
        Identity { shard_map_epoch: self.view.epoch(), ..identity("") }
    }

    /// Lets a shard take part, with so many copies of each block.
    fn join(&self, id: &str, shard: &Fixture, copies: usize) {
        shard.epoch.send_replace(self.view.epoch());
        self.connector.add_shard(id, Arc::clone(&shard.shard) as Arc<dyn Shard>);
        shard.shard.join(Cluster {
            views: self.views.subscribe(),
            connector: Arc::new(self.connector.clone()),
            rule: CopyRule::new(copies, 1).expect("the rule can be"),
        });
    }

    /// A place whose first owner is the shard with this id.
    fn place(&self, owner: &str, index: u64) -> BlockPlace {
        let map = self.view.shard_map();
        let mut seeds = (0..=u8::MAX).map(|seed| [seed; 32]);
        let seed = seeds.find(|seed| map.owner(seed).is_some_and(|shard| shard.id.0 == owner));
        BlockPlace { stripe_seed: seed.expect("one of many belongs there"), index }
    }

    async fn holds(&self, shard: &Fixture, names: &[u8]) -> Vec<bool> {
        let keys = names.iter().map(|name| key(*name)).collect();
        let peek = Lookup { identity: self.identity(), keys, peek: true };
        shard.shard.lookup(&shard.ctx, peek).await.expect("the lookup is valid")
    }

    /// Tiles of a block as the shard gives them.
    async fn read(&self, shard: &Fixture, name: u8) -> Vec<TileMessage> {
        let (keys, first_layer, layers) = (vec![key(name)], 0, None);
        let get = GetBlocks { first_layer, layers, ..GetBlocks::whole(self.identity(), keys) };
        let tiles = shard.shard.get_blocks(&shard.ctx, get).await.expect("the request is valid");
        let tiles = collect(tiles).await.into_iter();
        tiles.map(|tile| tile.expect("the stream goes on").expect("the block is held")).collect()
    }
}

/// Looks at its peers and for missing copies all the time.
fn eager(config: Config) -> Config {
    let repair = RepairConfig {
        ping_interval_ms: 10,
        down_after_ms: 60_000,
        scan_interval_ms: 200,
        retry_ms: 50,
        ..RepairConfig::default()
    };
    Config { repair, ..config }
}

/// Stores blocks that belong somewhere.
async fn store_placed(shard: &Fixture, names: &[u8], place: BlockPlace) {
    let tiles = names.iter().flat_map(|name| block(*name));
    let tiles = tiles.map(|tile| {
        let index = place.index + u64::from(tile.key.0[0]);
        TileMessage { place: Some(BlockPlace { index, ..place }), ..tile }
    });
    let acks = shard.put("", tiles.collect()).await;
    assert!(acks.iter().all(|ack| ack.outcome == PutOutcome::Stored), "{acks:?}");
}

/// `kv-0` after a restart that found blocks 1 to 3 on disk and lost block 4, which was in memory.
async fn restarted(folder: &Path, place: BlockPlace) -> Fixture {
    let config = || eager(tiers(folder, 1, 8));
    let before = named("kv-0", config(), |tier| tier);
    store_placed(&before, &[1, 2, 3, 4], place).await;
    before.tasks.drain(PATIENCE).await;
    drop(before);
    released(&config()).await;
    let after = named("kv-0", config(), |tier| tier);
    assert_eq!(after.disk().await.restored_total, 3);
    after
}

#[tokio::test]
async fn a_restart_knows_where_the_blocks_on_disk_belong_and_tells_of_them() {
    let (folder, site) = (folder(), Site::new());
    let place = site.place("kv-1", 5);
    let shard = restarted(folder.path(), place).await;
    for name in 1..=3 {
        let own = BlockPlace { index: 5 + u64::from(name), ..place };
        assert_eq!(shard.shard.place_for_test(tenant(""), key(name)), Some(own));
    }
    assert_eq!(shard.shard.place_for_test(tenant(""), key(4)), None, "it is gone");
    Watcher::default().reads(&shard, "", &[1, 2, 3]).await;
}

#[tokio::test]
async fn blocks_that_a_restart_found_get_their_second_copy() {
    let (folder, site) = (folder(), Site::new());
    let shard = restarted(folder.path(), site.place("kv-1", 0)).await;
    let empty = named("kv-1", eager(config(8)), |tier| tier);
    site.join("kv-1", &empty, 2);
    site.join("kv-0", &shard, 2);
    empty.settled("copied", |stats| stats.blocks == 3).await;
    assert_eq!(site.holds(&shard, &[1, 2, 3]).await, [true; 3]);
    for name in 1..=3 {
        assert_eq!(site.read(&empty, name).await, block(name));
        let placed = empty.shard.place_for_test(tenant(""), key(name));
        assert_eq!(placed.map(|place| place.index), Some(u64::from(name)), "it travels with the copy");
    }
}

#[tokio::test]
async fn blocks_that_a_restart_found_where_they_no_longer_belong_move() {
    let (folder, site) = (folder(), Site::new());
    let shard = restarted(folder.path(), site.place("kv-1", 0)).await;
    let owner = named("kv-1", eager(config(8)), |tier| tier);
    site.join("kv-1", &owner, 1);
    site.join("kv-0", &shard, 1);
    let moved = |stats: &ShardStats| (stats.blocks, stats.repair.dropped_total) == (0, 3);
    shard.settled("given up", moved).await;
    assert_eq!(site.holds(&owner, &[1, 2, 3]).await, [true; 3]);
    assert_eq!(site.read(&owner, 2).await, block(2));
}

#[tokio::test]
async fn copies_go_to_free_disk_when_memory_is_full() {
    let (folder, site) = (folder(), Site::new());
    let names = [1, 2, 3, 4, 5, 6];
    let full = named("kv-0", eager(config(6)), |tier| tier);
    store_placed(&full, &names, site.place("kv-0", 0)).await;
    let target = named("kv-1", eager(tiers(folder.path(), 1, 8)), |tier| tier);
    site.join("kv-1", &target, 2);
    site.join("kv-0", &full, 2);
    target.settled("copied", |stats| stats.blocks == 6).await;
    let stats = target.stats().await;
    assert_eq!((stats.tiers[1].blocks, stats.evicted_total, stats.room_bytes), (5, 0, 3 * block_bytes()));
    for name in names {
        assert_eq!(site.read(&target, name).await, block(name));
    }
}

#[tokio::test]
async fn copies_drive_no_block_out_of_a_full_disk() {
    let (folder, site) = (folder(), Site::new());
    let full = named("kv-0", eager(config(8)), |tier| tier);
    store_placed(&full, &[1, 2, 3, 4, 5, 6], site.place("kv-0", 0)).await;
    let target = named("kv-1", eager(tiers(folder.path(), 1, 2)), |tier| tier);
    // Its own, with room for two more.
    store_placed(&target, &[9], site.place("kv-1", 0)).await;
    site.join("kv-0", &full, 2);
    site.join("kv-1", &target, 2);
    target.settled("full", |stats| stats.room_bytes == 0).await;
    let passes = full.stats().await.repair.passes_total;
    full.settled("looked again", |stats| stats.repair.passes_total > passes + 1).await;
    let stats = target.stats().await;
    assert_eq!((stats.blocks, stats.evicted_total), (3, 0), "{stats:?}");
    assert_eq!(site.holds(&target, &[9]).await, [true]);
    assert!(full.stats().await.repair.failed_total > 0, "it says that copies found no room");
}
