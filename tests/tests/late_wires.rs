//! Real processes behind a network that is slow: every byte to and from a shard is late by a time that a seed varies, and no more than so
//! many pass in a second. One shard after the other is cut off in the middle of what it sends, falls silent, or is killed. Acknowledged
//! blocks stay readable and right, answers come from the other copy and keep their tokens, and nothing leaks.
//!
//! `LONGSHORE_FAULT_SEED=N` is another network.

use std::time::{Duration, Instant};

use longshore_blocks::quorum::CopyRule;
use longshore_fabric::GrpcOptions;
use longshore_proto::types::ModelDescription;
use longshore_tests::{
    client::{await_start, generate},
    draws::Draws,
    fleet::{Fleet, FleetPlan},
    relay::Lag,
    store_client::StoreClient,
};

const SHARDS: usize = 3;
/// Blocks that each client stores in a round.
const BLOCKS: usize = 4;
/// Tokens of an answer.
const TOKENS: u32 = 12;
/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(100);

/// What happens to a shard behind its wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Its connections are cut in the middle of what they carry, and no others can be made.
    Cut,
    /// The connections of its tiles alone.
    TilesCut,
    /// Nothing passes, and no connection ends.
    Silent,
    /// `kill -9`, and it is away.
    Killed,
}

fn late() -> Lag {
    Lag { late_ms: 5..=60, bytes_per_second: 2 << 20 }
}

fn plan(seed: u64) -> FleetPlan {
    let sets = [
        "model.block_tokens=16",
        "model.stripe_blocks=1",
        "store.copies=2",
        "store.write_acks=2",
        "store.patience_ms=1000",
        "kvstore.retention_ms=200",
        "kvstore.repair.ping_interval_ms=100",
        "kvstore.repair.down_after_ms=1500",
        "kvstore.repair.scan_interval_ms=1000",
        "kvstore.repair.retry_ms=100",
        "decode.stall_timeout_ms=5000",
        "decode.lease_ms=6000",
        "prefill.lease_ms=6000",
        "telemetry.filter=\"warn\"",
    ];
    let sets = sets.map(str::to_owned).to_vec();
    FleetPlan { shards: SHARDS, workers: true, far: Some(seed), sets, ..FleetPlan::default() }
}

/// One client for each lane between hosts.
fn clients(fleet: &Fleet, model: &ModelDescription) -> [StoreClient; 2] {
    let rule = CopyRule::new(2, 2).expect("the rule is valid");
    let over_grpc = GrpcOptions { tcp_connections_max: 0, ..GrpcOptions::default() };
    [GrpcOptions::default(), over_grpc].map(|options| {
        StoreClient::with(fleet.members(), model, rule, options).with_patience(Duration::from_millis(1_500))
    })
}

/// Stores fresh blocks over both lanes at once.
async fn store([tcp, grpc]: &mut [StoreClient; 2], name: u64) -> usize {
    let (over_tcp, over_grpc) = tokio::join!(tcp.store(2 * name, BLOCKS), grpc.store(2 * name + 1, BLOCKS));
    over_tcp + over_grpc
}

/// Acknowledged blocks that nobody gives out.
async fn lost([tcp, grpc]: &[StoreClient; 2]) -> usize {
    let within = Duration::from_secs(20);
    let (over_tcp, over_grpc) = tokio::join!(tcp.lost(within), grpc.lost(within));
    over_tcp + over_grpc
}

fn text() -> String {
    (0..12).map(|at| format!("line {at} of a text that is asked about; ")).collect()
}

/// The answer of the cluster; it may take a while until it has one again.
async fn answer(router: &str, when: &str) -> Vec<u32> {
    let began = Instant::now();
    loop {
        match generate(router, &text(), TOKENS, |_| ()).await {
            Ok((tokens, _)) => return tokens,
            Err(error) => assert!(began.elapsed() < PATIENCE, "{when}: {error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A cluster, what it is asked, and what it answered when nothing was late.
struct Story {
    fleet: Fleet,
    ids: Vec<String>,
    clients: [StoreClient; 2],
    router: String,
    expected: Vec<u32>,
    seed: u64,
    began: Instant,
}

impl Story {
    async fn begin(seed: u64) -> Self {
        let (fleet, began) = (Fleet::start(&plan(seed)), Instant::now());
        let ids: Vec<String> = (0..SHARDS).map(|shard| format!("kv-{shard}")).collect();
        for id in ids.iter().map(String::as_str).chain(["prefill-0", "decode-0", "router-0"]) {
            await_start(fleet.address(id), None, PATIENCE).await;
        }
        let describe = await_start(fleet.address("kv-0"), None, PATIENCE).await;
        let clients = clients(&fleet, &describe.models[0]);
        let router = fleet.address("router-0").to_owned();
        let expected = answer(&router, "without delay").await;
        Self { fleet, ids, clients, router, expected, seed, began }
    }

    /// Asks and stores, whatever goes on: the answer stays, and all that was acknowledged is given out.
    async fn goes_on(&mut self, round: u64, when: &str) {
        let stored = store(&mut self.clients, (self.seed << 32) | round);
        let (tokens, refused) = tokio::join!(answer(&self.router, when), stored);
        assert_eq!(tokens, self.expected, "{when}");
        assert_eq!(lost(&self.clients).await, 0, "{when}: acknowledged blocks that nobody gave out");
        self.say(&format!("{when}: {refused} of {} blocks refused", 2 * BLOCKS));
    }

    async fn settled(&self, when: &str) {
        let [tcp, grpc] = &self.clients;
        tokio::join!(tcp.settled(2, PATIENCE, when), grpc.settled(2, PATIENCE, when));
        assert_eq!(lost(&self.clients).await, 0, "{when}: lost blocks");
    }

    fn strike(&mut self, fault: Fault, id: &str, draws: &mut Draws) {
        match fault {
            // Somewhere in the tiles and calls of a round.
            Fault::Cut => self.fleet.far(id).cut_after(draws.between(500..=8_000)),
            Fault::TilesCut => self.fleet.far(id).tiles.cut_after(draws.between(1..=4_000)),
            Fault::Silent => self.fleet.far(id).hold(),
            Fault::Killed => self.fleet.kill(id),
        }
    }

    async fn mend(&mut self, fault: Fault, id: &str) {
        match fault {
            Fault::Cut => {
                assert!(self.fleet.far(id).calls.is_cut(), "{id} was never cut off: nothing passed");
                self.fleet.far(id).mend();
            }
            Fault::TilesCut => {
                assert!(
                    self.fleet.far(id).tiles.is_cut(),
                    "{id} lost no connection of tiles: nothing passed"
                );
                self.fleet.far(id).mend();
            }
            Fault::Silent => self.fleet.far(id).mend(),
            Fault::Killed => self.fleet.start_one(id),
        }
        await_start(self.fleet.address(id), None, PATIENCE).await;
    }

    #[allow(clippy::print_stdout, reason = "a test says how far it is")]
    fn say(&self, what: &str) {
        println!("{:>6.1} s  {what}", self.began.elapsed().as_secs_f64());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn late_wires_and_a_shard_that_is_cut_off_lose_no_block_and_change_no_token() {
    let seed = std::env::var_os("LONGSHORE_FAULT_SEED");
    let seed = seed.map_or(1, |seed| seed.to_str().and_then(|seed| seed.parse().ok()).expect("a number"));
    let (mut story, mut draws) = (Story::begin(seed).await, Draws::new(&[seed]));
    story.ids.iter().for_each(|id| story.fleet.far(id).lag(Some(&late())));
    story.goes_on(0, "late wires").await;
    story.settled("late wires").await;
    // Tiles first: after another fault the shard's connections for them are left alone for a while.
    for (fault, round) in [Fault::TilesCut, Fault::Cut, Fault::Silent, Fault::Killed].into_iter().zip(1..) {
        let id = story.ids[draws.below(SHARDS as u64) as usize].clone();
        let when = format!("seed {seed}, {fault:?} {id}");
        story.strike(fault, &id, &mut draws);
        // All of it before the fault ends: the answer and what is read come from other copies.
        story.goes_on(round, &when).await;
        story.mend(fault, &id).await;
        story.settled(&when).await;
    }
    assert_eq!(answer(&story.router, "afterwards").await, story.expected);
    let stored = story.clients.each_ref().map(|client| client.stored().len());
    assert!(stored.iter().all(|stored| *stored > BLOCKS), "{stored:?}: blocks are stored beside a fault");
    let tiles: u64 = story.ids.iter().map(|id| story.fleet.far(id).tiles.passed()).sum();
    assert!(tiles > 0, "tiles went over the lane `tcp`, through its relays");
    story.say(&format!("{stored:?} blocks acknowledged over tcp and grpc"));
}
