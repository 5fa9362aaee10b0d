//! Real processes under a random schedule of faults, one at a time: killed, killed and away for a while, frozen, cut off from the
//! network, behind a wire whose packets are late or queue up. Tokens stay the same, no acknowledged block is lost, no wrong byte is read, and copies are made anew. Other tests
//! fill the disk of a shard and slow it down, and a measurement looks at its memory.
//!
//! `LONGSHORE_FAULT_ROUNDS=40` makes it longer, `LONGSHORE_FAULT_SEED=N` another schedule.

use std::{
    fs,
    io::Read,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use longshore_blocks::quorum::CopyRule;
use longshore_model::testing::TinyOptions;
use longshore_tests::{
    client::{await_start, generate},
    draws::Draws,
    fleet::{Fleet, FleetPlan, Wire},
    server::send_signal,
    store_client::StoreClient,
};

const SHARDS: usize = 3;
/// Rounds of a usual run.
const ROUNDS: u64 = 6;
/// Blocks that are stored in each round, beside those of the texts.
const BLOCKS: usize = 8;
/// How long a process may take until it answers, and copies until they are made anew, on a busy machine. Views whose close
/// did not come through are kept for their lease, which is a third of it here.
const PATIENCE: Duration = Duration::from_secs(100);

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
        "decode.stall_timeout_ms=20000",
        "decode.lease_ms=30000",
        "prefill.lease_ms=30000",
        "telemetry.filter=\"warn\"",
    ]
    .map(str::to_owned)
    .to_vec()
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
    /// Packets are late.
    Late,
    /// Packets queue up, and some are dropped.
    Narrow,
}

/// What wires can be.
const WIRES: [(Fault, Wire); 2] = [(Fault::Late, Wire::Late), (Fault::Narrow, Wire::Narrow)];

fn text() -> String {
    (0..40).map(|at| format!("line {at} of a text that is asked about; ")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_random_schedule_of_faults_changes_no_token_and_loses_no_block() {
    let rule = CopyRule::new(2, 2).expect("the rule is valid");
    // Shards are frozen for longer than anybody is patient with them, and answers come meanwhile.
    let copies = ["store.copies=2", "store.write_acks=2", "store.patience_ms=1000"].map(str::to_owned);
    let sets = [sets(), copies.to_vec()].concat();
    let mut fleet =
        Fleet::start(&FleetPlan { shards: SHARDS, workers: true, apart: true, sets, ..FleetPlan::default() });
    let faults = possible(&fleet);
    let ids: Vec<String> = (0..SHARDS).map(|shard| format!("kv-{shard}")).collect();
    for id in ids.iter().map(String::as_str).chain(["prefill-0", "decode-0", "router-0"]) {
        await_start(fleet.address(id), None, PATIENCE).await;
    }
    let describe = await_start(fleet.address("kv-0"), None, PATIENCE).await;
    let mut client = StoreClient::new(fleet.members(), &describe.models[0], rule);
    let router = fleet.address("router-0").to_owned();
    let text = text();
    let (expected, _) = generate(&router, &text, 48, |_| ()).await.expect("an answer without faults");
    assert_eq!(client.store(0, BLOCKS).await, 0, "without faults every block is stored");
    client.settled(2, PATIENCE, "without faults").await;

    let (seed, rounds) = (setting("LONGSHORE_FAULT_SEED", 1), setting("LONGSHORE_FAULT_ROUNDS", ROUNDS));
    let mut draws = Draws::new(&[seed]);
    let (mut refused, began) = (0, Instant::now());
    for round in 0..rounds {
        // Every fault comes in turn, the first one by chance.
        let fault = faults[((seed + round) % faults.len() as u64) as usize];
        let victim = draws.below(SHARDS as u64) as usize;
        let least = if fault == Fault::Freeze { 1_500 } else { 300 };
        let (id, pause) = (&ids[victim], Duration::from_millis(draws.between(least..=2_500)));
        let when = format!("seed {seed} round {round}: {fault:?} of {id} for {pause:?}");
        println!("{:>6.1} s  {when}", began.elapsed().as_secs_f64());
        begin(&mut fleet, fault, victim, id);
        let answer = async {
            let (asked, answer) = (Instant::now(), generate(&router, &text, 48, |_| ()).await);
            println!("           answered after {:.1} s", asked.elapsed().as_secs_f64());
            answer
        };
        let (answer, ended) = tokio::join!(answer, async {
            let stored = client.store((seed << 32) | (round + 1), BLOCKS).await;
            // One copy of each lies on a shard that answers, unless it is frozen or cut off: then it is asked in vain.
            let lost = client.lost(Duration::from_secs(20)).await;
            tokio::time::sleep(pause).await;
            (stored, lost)
        });
        assert_eq!(ended.1, 0, "{when}: acknowledged blocks that nobody gave out");
        refused += ended.0;
        end(&mut fleet, fault, victim, id);
        match answer {
            Ok((tokens, _)) => assert_eq!(tokens, expected, "{when}"),
            Err(error) => panic!("{when}: {error:?}"),
        }
        await_start(fleet.address(id), None, PATIENCE).await;
        client.settled(2, PATIENCE, &when).await;
        assert_eq!(client.lost(Duration::from_secs(20)).await, 0, "{when}: lost blocks");
        recovered(&router, &text, &expected, &when).await;
    }
    let (tokens, finished) = generate(&router, &text, 48, |_| ()).await.expect("an answer after the faults");
    assert_eq!(tokens, expected);
    assert!(finished.cached_tokens > 0, "the text is still in the store: {finished:?}");
    println!("{} blocks acknowledged, {refused} not, none lost in {rounds} rounds", client.stored().len());
    assert!(client.stored().len() > BLOCKS, "blocks are stored while one shard is at fault");
}

/// Faults that this machine allows; says which it does not.
#[allow(clippy::print_stdout, reason = "a test says what it cannot do")]
fn possible(fleet: &Fleet) -> Vec<Fault> {
    let mut faults = vec![Fault::Kill, Fault::Away, Fault::Freeze];
    match fleet.not_apart() {
        None => faults.push(Fault::CutOff),
        Some(why) => println!("NOT RUN: shards that are cut off from the network, because {why}"),
    }
    for (fault, wire) in WIRES {
        match fleet.cannot(wire) {
            None => faults.push(fault),
            Some(why) => println!("NOT RUN: {fault:?} wires of shards, because {why}"),
        }
    }
    faults
}

/// Waits until the cluster answers as if nothing had been: one fault at a time, and connections to the last victim may be slow to
/// end.
async fn recovered(router: &str, text: &str, expected: &[u32], when: &str) {
    let began = Instant::now();
    loop {
        match generate(router, text, 48, |_| ()).await {
            Ok((tokens, _)) => return assert_eq!(tokens, expected, "{when}, afterwards"),
            Err(error) => assert!(began.elapsed() < PATIENCE, "{when}, afterwards: {error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
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
        Fault::Late => fleet.make_wire(victim, Some(Wire::Late)),
        Fault::Narrow => fleet.make_wire(victim, Some(Wire::Narrow)),
    }
}

fn end(fleet: &mut Fleet, fault: Fault, victim: usize, id: &str) {
    match fault {
        Fault::Kill => {}
        Fault::Away => fleet.start_one(id),
        Fault::Freeze => fleet.signal(id, "-CONT"),
        Fault::CutOff => fleet.cut(victim, false),
        Fault::Late | Fault::Narrow => fleet.make_wire(victim, None),
    }
}

/// A small file system, where the machine lets us mount one; else files that may not grow beyond the same size.
struct SmallDisk {
    folder: tempfile::TempDir,
    mounted: bool,
}

impl SmallDisk {
    const BYTES: u64 = 512 << 10;

    #[allow(clippy::print_stdout, reason = "a test says what it cannot do")]
    fn make() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={}", Self::BYTES), "tmpfs"]).arg(folder.path());
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        if !mounted {
            println!(
                "NOT RUN: a file system that is full, because none can be mounted; files of limited size instead"
            );
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
            let _ended = Command::new("umount").arg("-l").arg(self.path()).output();
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
        "kvstore.disk.pause_ms=1".to_owned(),
        // Blocks that were just stored make way for no other: of a client that is fast they would fill the memory.
        "kvstore.retention_ms=10".to_owned(),
    ];
    let sets = [sets(), more.to_vec()].concat();
    let plan = FleetPlan { shards: 1, sets, before_shards: disk.limit(), ..FleetPlan::default() };
    let mut fleet = Fleet::start(&plan);
    let describe = await_start(fleet.address("kv-0"), None, PATIENCE).await;
    let mut client = StoreClient::new(fleet.members(), &describe.models[0], CopyRule::default());
    let mut refused = 0;
    for name in 0..12 {
        refused += client.store(name, 50).await;
    }
    let stats = client.stats(0).await.expect("the shard answers");
    let on_disk = stats.tiers.iter().find(|tier| tier.name == "disk").expect("there is a disk tier");
    assert!(on_disk.io_errors_total > 0, "the disk was never full: {on_disk:?}");
    assert!(fleet.runs("kv-0"), "the shard lives");
    // Blocks may be lost here, as in any cache that is full; none may be wrong, which reading checks.
    let (all, unread) = (client.stored().len(), client.unread().await);
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
    let describe = await_start(fleet.address("kv-0"), None, PATIENCE).await;
    let client = client.reconnected(fleet.members(), &describe.models[0], CopyRule::default());
    let found = all - client.unread().await;
    assert!(found > 0, "nothing was found on disk");
    println!("{found} blocks are found after a restart");
}

/// A disk that is slow, for as long as it lives: every read and write of files by offset waits first, in the kernel's hands. Sockets are read
/// and written by other calls, so that only the disk tier notices.
struct SlowDisk {
    tracer: Child,
}

impl SlowDisk {
    /// Makes the disk of a process slow; the error says what the machine does not allow.
    fn make(pid: u32, delay: Duration) -> Result<Self, String> {
        let inject = format!("inject=pread64,pwrite64:delay_enter={}", delay.as_micros());
        let mut tracer = Command::new("strace");
        tracer.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=pread64,pwrite64", "-e", &inject]);
        tracer
            .args(["-p", &pid.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut tracer = tracer.spawn().map_err(|error| format!("`strace` cannot be run: {error}"))?;
        let began = Instant::now();
        while !is_traced(pid) {
            if let Ok(Some(_)) = tracer.try_wait() {
                let mut said = String::new();
                let _said_nothing = tracer.stderr.take().map(|mut from| from.read_to_string(&mut said));
                return Err(format!("`strace` may not look at a process: {}", said.trim()));
            }
            assert!(began.elapsed() < PATIENCE, "strace neither ends nor begins");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { tracer })
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // It lets go of the process when it is asked to end, and the process runs on.
        assert!(send_signal(self.tracer.id(), "-INT"), "strace could not be asked to end");
        let _ended = self.tracer.wait();
    }
}

/// Whether every thread of a process has a tracer.
fn is_traced(pid: u32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    threads.flatten().all(|thread| {
        let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
        let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
        tracer.is_some_and(|tracer| tracer.trim() != "0")
    })
}

/// Blocks that the shard wrote to its disk.
async fn spilled(client: &StoreClient) -> u64 {
    let stats = client.stats(0).await.expect("the shard answers");
    stats.tiers.iter().map(|tier| tier.spilled_total).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_disk_costs_time_or_blocks_and_never_a_wrong_byte_or_the_shard() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().display().to_string();
    let more = [
        // 256 blocks of 4 KiB in memory, and room for all on disk.
        "kvstore.capacity_bytes=1048576".to_owned(),
        format!("kvstore.disk.path={path:?}"),
        "kvstore.disk.capacity_bytes=8388608".to_owned(),
        "kvstore.disk.write_wait_ms=50".to_owned(),
        "kvstore.disk.pause_ms=500".to_owned(),
        "kvstore.scrub_bytes_per_s=0".to_owned(),
    ];
    let mut fleet = Fleet::start(&FleetPlan {
        shards: 1,
        sets: [sets(), more.to_vec()].concat(),
        ..FleetPlan::default()
    });
    let describe = await_start(fleet.address("kv-0"), None, PATIENCE).await;
    let mut client = StoreClient::new(fleet.members(), &describe.models[0], CopyRule::default());
    for name in 0..6 {
        assert_eq!(client.store(name, 50).await, 0, "without faults every block is stored");
    }
    assert_eq!(client.unread().await, 0, "300 blocks, some of them on disk");
    let slow = match SlowDisk::make(fleet.id("kv-0"), Duration::from_millis(20)) {
        Ok(slow) => slow,
        Err(why) => return println!("NOT RUN: a disk that is slow, because {why}"),
    };
    let before = spilled(&client).await;
    let began = Instant::now();
    let refused = client.store(6, 50).await;
    // Every byte that comes is checked; blocks may be late or lost, as in any cache.
    let late = client.unread().await;
    let stats = client.stats(0).await.expect("the shard answers beside its disk");
    let on_disk = stats.tiers.iter().find(|tier| tier.name == "disk").expect("there is a disk tier");
    println!(
        "{:.1} s with a slow disk: {refused} of 50 blocks refused, {late} of {} not read in time, {on_disk:?}",
        began.elapsed().as_secs_f64(),
        client.stored().len()
    );
    assert!(on_disk.spilled_total > before, "nothing was written meanwhile: {on_disk:?}");
    drop(slow);
    assert!(fleet.runs("kv-0"), "the shard lives");
    // Afterwards new blocks are stored, and what was read before the fault and is still held is as it was.
    assert_eq!(client.store(9, 50).await, 0);
    let (all, unread) = (client.stored().len(), client.unread().await);
    assert!(unread < all / 2, "{unread} of {all} blocks are gone");
}

/// Resident memory of a process, bytes.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("Linux tells it");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number") << 10
}

/// `LONGSHORE_CHURN_SECONDS=600` makes it longer.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn measure_memory_of_a_shard_under_churn() {
    const BUDGET: u64 = 256 << 20;
    let model = TinyOptions { layers: 16, kv_heads: 4, head_dim: 64, hidden: 256, ..TinyOptions::default() };
    let sets = [sets(), vec![format!("kvstore.capacity_bytes={BUDGET}")]].concat();
    let mut fleet = Fleet::start(&FleetPlan { shards: 1, sets, model, ..FleetPlan::default() });
    let describe = await_start(fleet.address("kv-0"), None, PATIENCE).await;
    let mut clients: Vec<StoreClient> =
        (0..4).map(|_| StoreClient::new(fleet.members(), &describe.models[0], CopyRule::default())).collect();
    let pid = fleet.id("kv-0");
    let (idle, began, mut most, mut blocks) = (resident(pid), Instant::now(), 0, 0u64);
    let duration = Duration::from_secs(setting("LONGSHORE_CHURN_SECONDS", 120));
    while began.elapsed() < duration {
        let stores =
            clients.iter_mut().zip(0..).map(|(client, at): (_, u64)| client.store((at << 32) | blocks, 16));
        let refused: usize = futures::future::join_all(stores).await.into_iter().sum();
        assert_eq!(refused, 0);
        for client in &mut clients {
            client.unread().await;
            client.forget();
        }
        blocks += 16;
        most = most.max(resident(pid));
    }
    let written = clients.len() as u64 * blocks;
    println!(
        "{written} blocks of 256 KiB in {} s: {} MiB idle, {} MiB at most, budget {} MiB",
        began.elapsed().as_secs(),
        idle >> 20,
        most >> 20,
        BUDGET >> 20
    );
    assert!(most <= idle + BUDGET + BUDGET / 10, "more than the budget and a tenth");
    assert!(fleet.runs("kv-0"));
}
