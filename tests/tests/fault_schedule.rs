//! Real processes under a random schedule of faults, one at a time: killed, killed and away for a while, frozen, cut off from the
//! network. Tokens stay the same, no acknowledged block is lost, no wrong byte is read, and copies are made anew. Another test
//! fills the disk of a shard.
//!
//! `LONGSHORE_FAULT_ROUNDS=40` makes it longer, `LONGSHORE_FAULT_SEED=N` another schedule.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt;
use longshore_attention::{KvDtype, TileShape};
use longshore_blocks::{BlockKey, BlockPlace, EXACT_PREFILL, Geometry, KeyChain, quorum::CopyRule};
use longshore_cluster::{ClusterView, Member, Role};
use longshore_engine::{ShardDirectory, store_copies};
use longshore_fabric::{CallContext, Connector, GrpcConnector, GrpcOptions, Shard};
use longshore_proto::types::{
    GetBlocks, Identity, Lookup, ModelDescription, PutOutcome, ShardStats, WireTileShape,
};
use longshore_tests::{
    client::{await_start, generate},
    draws::Draws,
    fleet::{Fleet, FleetPlan},
    truth,
};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

const SHARDS: usize = 3;
/// Rounds of a usual run.
const ROUNDS: u64 = 6;
/// Blocks that are stored in each round, beside those of the texts.
const BLOCKS: usize = 8;
/// How long a process may take until it answers, and copies until they are made anew, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn setting(name: &str, usual: u64) -> u64 {
    let value = std::env::var_os(name);
    value.map_or(usual, |value| {
        value.to_str().and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{name} is no number"))
    })
}

fn sets() -> Vec<String> {
    [
        "model.block_tokens=16",
        "model.stripe_blocks=1",
        "kvstore.retention_ms=200",
        "kvstore.repair.ping_interval_ms=100",
        "kvstore.repair.down_after_ms=1500",
        "kvstore.repair.scan_interval_ms=1000",
        "kvstore.repair.retry_ms=100",
        "telemetry.filter=\"error\"",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// A process that stores blocks and reads them, as a worker would.
struct Client {
    directory: ShardDirectory,
    shards: Vec<Arc<dyn Shard>>,
    identity: Identity,
    shape: WireTileShape,
    tile_bytes: usize,
    /// Acknowledged blocks.
    stored: BTreeMap<BlockKey, BlockPlace>,
    _views: watch::Sender<Arc<ClusterView>>,
}

impl Client {
    fn new(members: &[Member], model: &ModelDescription, rule: CopyRule) -> Self {
        let shards: Vec<Member> =
            members.iter().filter(|member| member.role == Role::KvStore).cloned().collect();
        let view = Arc::new(ClusterView::new(shards.clone()).expect("the members are valid"));
        let deployment = model.deployment;
        let namespace = deployment.namespace(EXACT_PREFILL, b"faults");
        let identity = Identity { deployment, namespace, shard_map_epoch: view.epoch() };
        let (views, told) = watch::channel(view);
        let connector = GrpcConnector::new(GrpcOptions::default());
        let clients = shards.iter().map(|member| connector.shard(&member.address).expect("an address"));
        let clients = clients.collect();
        let directory = ShardDirectory::new(told, Arc::new(connector), TaskTracker::new(), 4);
        let shape = model.tile_shape;
        let tile = TileShape {
            block_tokens: shape.block_tokens as usize,
            kv_heads: shape.kv_heads as usize,
            head_dim: shape.head_dim as usize,
            dtype: KvDtype::F16,
        };
        Self {
            directory: directory.with_copies(rule),
            shards: clients,
            identity,
            shape,
            tile_bytes: tile.bytes(),
            stored: BTreeMap::new(),
            _views: views,
        }
    }

    /// Stores the blocks of a fresh text; keeps those that were acknowledged. Returns how many were not.
    async fn store(&mut self, name: u64, blocks: usize) -> usize {
        let geometry = Geometry::new(self.shape.block_tokens, 1).expect("the sizes are valid");
        let mut chain = KeyChain::new(self.identity.namespace, geometry);
        let mut draws = Draws::new(&[name]);
        let tokens: Vec<u32> =
            (0..blocks as u64 * u64::from(self.shape.block_tokens)).map(|_| draws.below(200) as u32).collect();
        chain.push(&tokens);
        let links = self.directory.current().expect("the addresses make clients");
        let mut refused = 0;
        for (&key, index) in chain.keys().iter().zip(0..) {
            let place = BlockPlace { stripe_seed: chain.stripe_seed(index), index };
            let tiles = truth::messages(self.tile_bytes, self.shape.layers, key, place);
            let ctx = CallContext::new("store").with_timeout(Duration::from_secs(3));
            let candidates = links.candidates(&place.stripe_seed).expect("there are shards");
            let outcome = store_copies(&ctx, &links, &candidates, self.identity, self.shape, tiles).await;
            match outcome {
                Ok(PutOutcome::Stored | PutOutcome::Duplicate) => drop(self.stored.insert(key, place)),
                _ => refused += 1,
            }
        }
        refused
    }

    /// Reads blocks of one shard; those that it gave out, each checked. None when it does not answer.
    async fn read(&self, shard: usize, keys: &[BlockKey]) -> Option<Vec<BlockKey>> {
        let get = GetBlocks { identity: self.identity, keys: keys.to_vec(), first_layer: 0, layers: None };
        let ctx = CallContext::new("read").with_timeout(Duration::from_secs(5));
        let mut tiles = self.shards[shard].get_blocks(&ctx, get).await.ok()?;
        let mut found = Vec::new();
        while let Some(tile) = tiles.next().await {
            let Some(tile) = tile.ok()? else { continue };
            let sound = tile.data.matches(tile.crc32c);
            assert!(!sound || truth::is_right(&tile), "shard {shard} gave out a wrong byte of {}", tile.key);
            if sound && tile.layer == 0 {
                found.push(tile.key);
            }
        }
        Some(found)
    }

    /// Reads every acknowledged block from whoever answers; how many nobody gave out.
    async fn unread(&self) -> usize {
        let mut left: Vec<BlockKey> = self.stored.keys().copied().collect();
        for shard in 0..self.shards.len() {
            let found = self.read(shard, &left).await.unwrap_or_default();
            left.retain(|key| !found.contains(key));
        }
        left.len()
    }

    /// On how many shards each acknowledged block is.
    async fn copies(&self) -> BTreeMap<usize, usize> {
        let keys: Vec<BlockKey> = self.stored.keys().copied().collect();
        let mut counts = vec![0; keys.len()];
        for shard in &self.shards {
            let lookup = Lookup { identity: self.identity, keys: keys.clone(), peek: true };
            let ctx = CallContext::new("count").with_timeout(Duration::from_secs(5));
            let held = shard.lookup(&ctx, lookup).await.unwrap_or_default();
            held.iter().zip(&mut counts).for_each(|(held, count)| *count += usize::from(*held));
        }
        let mut blocks = BTreeMap::new();
        counts.into_iter().for_each(|count| *blocks.entry(count).or_default() += 1);
        blocks
    }

    async fn stats(&self, shard: usize) -> Option<ShardStats> {
        self.shards[shard].stats(&CallContext::new("stats").with_timeout(Duration::from_secs(2))).await.ok()
    }

    /// Waits until every acknowledged block has `copies` copies and no shard has anything that is not a block.
    async fn settled(&self, copies: usize, when: &str) {
        let began = Instant::now();
        loop {
            let found = self.copies().await;
            let mut leaks = Vec::new();
            for shard in 0..self.shards.len() {
                let Some(stats) = self.stats(shard).await else {
                    leaks.push(format!("shard {shard} does not answer"));
                    continue;
                };
                let bytes = stats.blocks * self.tile_bytes as u64 * u64::from(self.shape.layers);
                if (stats.used_bytes, stats.open_blocks, stats.views) != (bytes, 0, 0) {
                    leaks.push(format!("shard {shard}: {stats:?}"));
                }
            }
            if found.keys().all(|count| *count == copies) && leaks.is_empty() {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{when}: blocks by copies {found:?}, {leaks:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// What happens to a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// `kill -9`, and started at once.
    Kill,
    /// `kill -9`, and connections are refused for a while.
    Away,
    /// SIGSTOP, and SIGCONT later.
    Freeze,
    /// Packets vanish for a while.
    CutOff,
}

fn text() -> String {
    (0..40).map(|at| format!("line {at} of a text that is asked about; ")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_random_schedule_of_faults_changes_no_token_and_loses_no_block() {
    let rule = CopyRule::new(2, 2).expect("the rule is valid");
    let sets = [sets(), vec!["store.copies=2".to_owned(), "store.write_acks=2".to_owned()]].concat();
    let mut fleet =
        Fleet::start(&FleetPlan { shards: SHARDS, workers: true, apart: true, sets, ..FleetPlan::default() });
    let mut faults = vec![Fault::Kill, Fault::Away, Fault::Freeze];
    match fleet.not_apart() {
        None => faults.push(Fault::CutOff),
        Some(why) => println!("NOT RUN: shards that are cut off from the network, because {why}"),
    }
    println!("NOT RUN: delay by `tc netem`; frozen processes stand for slow ones");
    let ids: Vec<String> = (0..SHARDS).map(|shard| format!("kv-{shard}")).collect();
    for id in ids.iter().map(String::as_str).chain(["prefill-0", "decode-0", "router-0"]) {
        await_start(fleet.address(id), None, PATIENCE).await;
    }
    let describe = await_start(fleet.address("kv-0"), None, PATIENCE).await;
    let mut client = Client::new(fleet.members(), &describe.models[0], rule);
    let router = fleet.address("router-0").to_owned();
    let text = text();
    let (expected, _) = generate(&router, &text, 48, |_| ()).await.expect("an answer without faults");
    assert_eq!(client.store(0, BLOCKS).await, 0, "without faults every block is stored");
    client.settled(2, "without faults").await;

    let (seed, rounds) = (setting("LONGSHORE_FAULT_SEED", 1), setting("LONGSHORE_FAULT_ROUNDS", ROUNDS));
    let mut draws = Draws::new(&[seed]);
    let (mut refused, began) = (0, Instant::now());
    for round in 0..rounds {
        // Every fault comes in turn, the first one by chance.
        let fault = faults[((seed + round) % faults.len() as u64) as usize];
        let victim = draws.below(SHARDS as u64) as usize;
        let (id, pause) = (&ids[victim], Duration::from_millis(draws.between(300..=2_500)));
        let when = format!("seed {seed} round {round}: {fault:?} of {id} for {pause:?}");
        println!("{:>6.1} s  {when}", began.elapsed().as_secs_f64());
        begin(&mut fleet, fault, victim, id);
        let answer = generate(&router, &text, 48, |_| ());
        let (answer, ended) = tokio::join!(answer, async {
            let stored = client.store((seed << 32) | (round + 1), BLOCKS).await;
            // One copy of each lies on a shard that answers, unless it is frozen or cut off: then it is asked in vain.
            let unread = client.unread().await;
            tokio::time::sleep(pause).await;
            (stored, unread)
        });
        assert_eq!(ended.1, 0, "{when}: acknowledged blocks that nobody gave out");
        refused += ended.0;
        end(&mut fleet, fault, victim, id);
        match answer {
            Ok((tokens, _)) => assert_eq!(tokens, expected, "{when}"),
            Err(error) => panic!("{when}: {error:?}"),
        }
        await_start(fleet.address(id), None, PATIENCE).await;
        client.settled(2, &when).await;
        assert_eq!(client.unread().await, 0, "{when}: lost blocks");
    }
    let (tokens, finished) = generate(&router, &text, 48, |_| ()).await.expect("an answer after the faults");
    assert_eq!(tokens, expected);
    assert!(finished.cached_tokens > 0, "the text is still in the store: {finished:?}");
    println!("{} blocks acknowledged, {refused} not, none lost in {rounds} rounds", client.stored.len());
    assert!(client.stored.len() > BLOCKS, "blocks are stored while one shard is at fault");
}

fn begin(fleet: &mut Fleet, fault: Fault, victim: usize, id: &str) {
    match fault {
        Fault::Kill => {
            fleet.kill(id);
            fleet.start_one(id);
        }
        Fault::Away => fleet.kill(id),
        Fault::Freeze => fleet.signal(id, "-STOP"),
        Fault::CutOff => fleet.cut(victim, true),
    }
}

fn end(fleet: &mut Fleet, fault: Fault, victim: usize, id: &str) {
    match fault {
        Fault::Kill => {}
        Fault::Away => fleet.start_one(id),
        Fault::Freeze => fleet.signal(id, "-CONT"),
        Fault::CutOff => fleet.cut(victim, false),
    }
}

/// A small file system, where the machine lets us mount one; else files that may not grow beyond the same size.
struct SmallDisk {
    folder: tempfile::TempDir,
    mounted: bool,
}

impl SmallDisk {
    const BYTES: u64 = 512 << 10;

    fn make() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={}", Self::BYTES), "tmpfs"]).arg(folder.path());
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        if !mounted {
            println!("NOT RUN: a file system that is full, because none can be mounted; files of limited size instead");
        }
        Self { folder, mounted }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// What makes a shard's files end at the same size; a write beyond it is an error and not a signal.
    fn limit(&self) -> String {
        match self.mounted {
            true => String::new(),
            false => format!("trap '' XFSZ; ulimit -f {}; ", Self::BYTES >> 10),
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if self.mounted {
            let _ended = std::process::Command::new("umount").arg("-l").arg(self.path()).output();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_costs_blocks_and_never_a_wrong_byte_or_the_shard() {
    let disk = SmallDisk::make();
    let path = disk.path().display().to_string();
    let more = [
        // 256 blocks of 4 KiB in memory; the disk is full long before it has what it was promised.
        "kvstore.capacity_bytes=1048576".to_owned(),
        format!("kvstore.disk.path={path:?}"),
        "kvstore.disk.capacity_bytes=4194304".to_owned(),
        "kvstore.disk.pause_ms=0".to_owned(),
    ];
    let sets = [sets(), more.to_vec()].concat();
    let plan = FleetPlan { shards: 1, sets, before_shards: disk.limit(), ..FleetPlan::default() };
    let mut fleet = Fleet::start(&plan);
    let describe = await_start(fleet.address("kv-0"), None, PATIENCE).await;
    let mut client = Client::new(fleet.members(), &describe.models[0], CopyRule::default());
    let mut refused = 0;
    for name in 0..12 {
        refused += client.store(name, 50).await;
    }
    let stats = client.stats(0).await.expect("the shard answers");
    let on_disk = stats.tiers.iter().find(|tier| tier.name == "disk").expect("there is a disk tier");
    assert!(on_disk.io_errors_total > 0, "the disk was never full: {on_disk:?}");
    assert!(fleet.runs("kv-0"), "the shard lives");
    // Blocks may be lost here, as in any cache that is full; none may be wrong, which reading checks.
    let (all, unread) = (client.stored.len(), client.unread().await);
    assert!(refused == 0 && all == 600 && (1..all - 100).contains(&unread), "{refused}, {all}, {unread}");
    let files: u64 = fs::read_dir(disk.path().join("shard-kv-0"))
        .expect("the shard made its folder")
        .flatten()
        .filter_map(|file| file.metadata().ok())
        .map(|file| file.len())
        .max()
        .unwrap_or(0);
    println!("{} of {all} blocks are kept, {on_disk:?}, longest file {files}", all - unread);
    // And after a restart, with what is found on the full disk.
    fleet.kill("kv-0");
    fleet.start_one("kv-0");
    await_start(fleet.address("kv-0"), None, PATIENCE).await;
    let found = all - client.unread().await;
    assert!(found > 0, "nothing was found on disk");
    println!("{found} blocks are found after a restart");
}
