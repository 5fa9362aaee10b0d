//! Listeners that meet what goes wrong: no room, nonsense, shards that tell nothing, and others in their place.

use std::time::Duration;

use longshore_blocks::ShardId;
use longshore_cluster::Labels;
use longshore_fabric::{Code, Error as CallError, LocalConnector};
use longshore_proto::types::{InventoryChange, InventoryNews};

use super::*;
use crate::fixture::{FakeShard, Store, deployment};

/// Longer than any pause.
const LONG: Duration = Duration::from_secs(400);

/// A shard with scripts, and inventories that listen to it.
struct World {
    shard: Arc<FakeShard>,
    views: watch::Sender<Arc<ClusterView>>,
    inventories: Arc<Inventories>,
}

fn shard_of(incarnation: u64) -> Arc<ClusterView> {
    let member = Member {
        id: "kv-0".to_owned(),
        role: Role::KvStore,
        address: "local:kv-0".to_owned(),
        incarnation,
        weight: 1,
        labels: Labels::default(),
    };
    Arc::new(ClusterView::new(vec![member]).unwrap())
}

impl World {
    fn new(blocks_max: u64) -> Self {
        let (connector, store) = (LocalConnector::new(), Arc::new(Store::default()));
        let shard = Arc::new(FakeShard::new(store, "kv-0"));
        connector.add_shard("kv-0", Arc::clone(&shard) as Arc<_>);
        let (views, cluster) = watch::channel(shard_of(1));
        let metrics = IndexMetrics::default();
        let inventories = Inventories::new(
            deployment(),
            cluster,
            Arc::new(connector),
            Tasks::new(),
            metrics,
            (1, blocks_max),
        );
        Self { shard, views, inventories }
    }

    fn tells(&self, told: Result<Vec<InventoryNews>, CallError>) {
        self.shard.inventory.lock().unwrap().push_back(told);
    }

    fn calls(&self) -> usize {
        self.shard.watched.lock().unwrap().len()
    }

    fn knows(&self, salt: &str) -> bool {
        self.inventories.book().index.knows(namespace(salt))
    }

    /// Time passes in steps, so that every pause ends when it does.
    async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        for _ in 0..1000 {
            if is_so(self) {
                return;
            }
            tokio::time::sleep(LONG / 1000).await;
        }
        panic!("{what}: it did not come to that in {LONG:?}");
    }
}

fn namespace(salt: &str) -> Namespace {
    deployment().namespace(longshore_blocks::EXACT_PREFILL, salt.as_bytes())
}

/// All that a shard holds: blocks with these names.
fn all(incarnation: u64, names: &[u8]) -> InventoryNews {
    let events = names.iter().map(|name| (0, BlockKey([*name; 16]), InventoryChange::Stored)).collect();
    let words = names.iter().map(|name| u64::from_le_bytes([*name; 8]));
    let (blocks, digest) = (names.len() as u64, words.fold(0, |all, word| all ^ word));
    InventoryNews { incarnation, reset: true, events, told: 7, blocks, digest }
}

#[tokio::test(start_paused = true)]
async fn a_shard_that_had_no_room_in_the_index_is_heard_again() {
    let world = World::new(2);
    world.tells(Ok(vec![all(1, &[1, 2, 3])]));
    world.tells(Ok(vec![all(1, &[1, 2, 3])]));
    world.tells(Ok(vec![all(1, &[1, 2])]));
    world.inventories.follow(namespace("a"));
    world.until("it has fewer blocks now", |world| world.knows("a")).await;
    let metrics = &world.inventories.metrics;
    assert_eq!((metrics.full.get(), metrics.blocks.get(), world.calls()), (2, 2, 3));
}

#[tokio::test(start_paused = true)]
async fn what_had_room_meanwhile_makes_the_next_pause_short() {
    let world = World::new(2);
    let too_much = || Ok(vec![all(1, &[1, 2, 3])]);
    (0..4).for_each(|_| world.tells(too_much()));
    // It has room, and then more comes than there is room for.
    world.tells(Ok(vec![all(1, &[1]), all(1, &[1, 2, 3])]));
    world.inventories.follow(namespace("a"));
    world.until("pauses of 1, 2, 4 and 8 s are over", |world| world.calls() == 5).await;
    world.tells(Ok(vec![all(1, &[1])]));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(world.calls() == 6 && world.knows("a"), "{} calls", world.calls());
}

#[tokio::test(start_paused = true)]
async fn a_shard_that_was_full_is_asked_again_no_sooner_than_it_says() {
    let world = World::new(10);
    let full = CallError::new(Code::ResourceExhausted, "full").with_retry_after(Duration::from_secs(30));
    world.tells(Err(full));
    world.tells(Ok(vec![all(1, &[1])]));
    world.inventories.follow(namespace("a"));
    tokio::time::sleep(Duration::from_secs(29)).await;
    assert_eq!(world.calls(), 1);
    world.until("it has room", |world| world.knows("a")).await;
}

#[tokio::test(start_paused = true)]
async fn what_does_not_follow_is_forgotten_and_begun_anew() {
    let world = World::new(10);
    let next = |number, digest| InventoryNews {
        reset: false,
        events: vec![(number, BlockKey([9; 16]), InventoryChange::Stored)],
        told: 8,
        blocks: 2,
        digest,
        ..all(1, &[])
    };
    let digest = u64::from_le_bytes([1; 8]) ^ u64::from_le_bytes([9; 8]);
    // An event beyond what was told, then a digest of other blocks, then the truth.
    world.tells(Ok(vec![all(1, &[1]), next(9, digest)]));
    let other = InventoryNews { events: Vec::new(), digest: 5, told: 7, blocks: 1, ..next(0, 0) };
    world.tells(Ok(vec![all(1, &[1]), other]));
    world.tells(Ok(vec![all(1, &[1]), next(8, digest)]));
    world.inventories.follow(namespace("a"));
    world.until("it agrees", |world| world.inventories.metrics.blocks.get() == 2).await;
    assert_eq!((world.inventories.metrics.out_of_step.get(), world.calls()), (2, 3));
    assert_eq!(*world.shard.watched.lock().unwrap(), [None, None, None], "each began anew");
}

#[tokio::test(start_paused = true)]
async fn another_start_of_a_shard_that_told_nothing_is_asked() {
    let world = World::new(10);
    world.inventories.follow(namespace("a"));
    world.until("it was asked", |world| world.calls() == 1).await;
    tokio::time::sleep(Duration::from_secs(200)).await;
    assert_eq!(world.calls(), 1, "this start was asked often enough");
    world.tells(Ok(vec![all(2, &[1])]));
    world.views.send_replace(shard_of(2));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(world.knows("a"), "the next start is asked at once");
}

#[tokio::test(start_paused = true)]
async fn a_shard_of_which_no_start_is_known_is_asked_now_and_then() {
    let world = World::new(10);
    world.inventories.follow(namespace("a"));
    world.until("it was asked", |world| world.calls() == 1).await;
    world.tells(Ok(vec![all(2, &[1])]));
    world.until("it is asked again", |world| world.knows("a")).await;
}

#[tokio::test(start_paused = true)]
async fn a_listener_that_ends_late_leaves_what_its_successor_knows() {
    let world = World::new(10);
    let (shard, stop) = (ShardId("kv-0".to_owned()), CancellationToken::new());
    let listen = || {
        let own = Arc::clone(&world.inventories);
        Listener::new(own, namespace("a"), &shard, "local:kv-0", &stop)
    };
    world.tells(Ok(vec![all(1, &[1])]));
    let (first, end) = (listen().unwrap(), CancellationToken::new());
    let old = world.inventories.tasks.token();
    let ended = end.clone();
    world.inventories.tasks.spawn("old", async move { first.run(&ended).await });
    world.until("the first one knows it", |world| world.knows("a")).await;
    world.tells(Ok(vec![all(2, &[1, 2])]));
    let second = listen().unwrap();
    let going = CancellationToken::new();
    let stays = going.clone();
    world.inventories.tasks.spawn("new", async move { second.run(&stays).await });
    let is_new = |world: &World| world.inventories.metrics.blocks.get() == 2;
    world.until("the second one took its place", is_new).await;
    end.cancel();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(world.knows("a") && is_new(&world), "the end of the first one wiped it");
    // Where nobody follows it goes.
    going.cancel();
    world.until("it is forgotten", |world| world.inventories.metrics.blocks.get() == 0).await;
    assert!(world.inventories.book().writers.is_empty() && !old.is_cancelled());
    stop.cancel();
    assert!(listen().is_none(), "who was to leave takes no place");
}
