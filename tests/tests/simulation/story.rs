//! What happens in a simulation: rounds of stores, reads and faults, each with at most one failure that takes blocks with it, and
//! after each round the dust settles and everything is looked at.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use longshore_blocks::{BlockKey, BlockPlace, quorum::CopyRule};
use longshore_tests::draws::Draws;
use tokio::task::JoinSet;

use super::{
    calls::{CALL_TIMEOUT, Call, Ledger, Shared, Text, locked, texts},
    cluster::{Cluster, FIRST_CLIENT, LAYERS, Labelled, Name, Plan},
    disks::Disks,
    lanes::Sabotage,
    network::{Mark, NODES, Network, Weather},
};

/// Rounds of a simulation.
const ROUNDS: u64 = 3;
/// Stores and reads of a round.
const CALLS: u64 = 14;
/// Virtual time in which they and the faults begin.
const ROUND_MS: u64 = 12_000;
/// Virtual time in which all must be as it should be, once the faults are over.
const SETTLED_WITHIN_MS: u64 = 240_000;

/// What is told of a simulation without violations.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// What happened when: some thousand, so whoever runs many seeds keeps the totals only.
    pub(crate) marks: Vec<Mark>,
    pub(crate) totals: Totals,
}

/// How much happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) messages: u64,
    /// Blocks that were acknowledged.
    pub(crate) stored: u64,
    /// Blocks that were read while faults were about, and afterwards.
    pub(crate) read: u64,
    /// Calls that failed, as some do while faults are about.
    pub(crate) failed: u64,
    /// Failures that took blocks with them, and changes of the members.
    pub(crate) losses: u64,
    pub(crate) changes: u64,
    /// Shards that were asked to hand their blocks over.
    pub(crate) drains: u64,
    /// Uses of disks that took long, and writes that failed.
    pub(crate) disks: (u64, u64),
}

/// Something that begins at a time of its own.
#[derive(Debug, Clone, Copy)]
enum Event {
    Store {
        client: usize,
        text: usize,
        streams: bool,
    },
    Read {
        client: usize,
        text: usize,
    },
    View {
        client: usize,
        text: usize,
    },
    Weather(Weather),
    Cut {
        sides: [u8; NODES],
        one_way: Option<(usize, usize)>,
    },
    Crash {
        node: usize,
    },
    Restart,
    Rot,
    Join,
    Leave {
        node: usize,
    },
    /// A shard is asked to hand its blocks over, or to stop doing so.
    Drain {
        node: usize,
        on: bool,
    },
    /// Shards that are drained end, however far that is.
    Stop,
    /// All disks are slow from now on, or as quick as memory.
    SlowDisks {
        slow: bool,
    },
    /// From now on most writes to the disk of a shard fail.
    BadDisk {
        node: usize,
    },
}

/// The plan that a seed makes.
pub(crate) fn plan(seed: u64) -> Plan {
    let mut draws = Draws::new(&[seed, 2]);
    let rule = if draws.per_mille(800) { (2, 2) } else { (3, 2) };
    let labels = *draws.pick(&[Labelled::Nothing, Labelled::Nothing, Labelled::Hosts, Labelled::Zones]);
    // Three hosts of two, or that nobody is alone.
    let shards = if labels == Labelled::Nothing { draws.between(3..=5) } else { 5 } as usize;
    let rule = CopyRule::new(rule.0, rule.1).expect("the rule is valid");
    Plan { shards, rule, labels, sabotage: Sabotage::None, disks: false }
}

/// Runs one simulation to its end. The error tells what went wrong and all that led there.
pub(crate) fn run(seed: u64, plan: Plan) -> Result<Report, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .max_blocking_threads(1)
        .build()
        .expect("a runtime starts");
    runtime.block_on(async {
        let mut story = Story::new(seed, plan);
        for round in 0..ROUNDS {
            story.round(round).await;
            if !story.network.violations().is_empty() {
                break;
            }
        }
        story.end()
    })
}

struct Story {
    seed: u64,
    cluster: Cluster,
    network: Arc<Network>,
    texts: Arc<Vec<Text>>,
    ledger: Shared,
    draws: Draws,
    losses: u64,
    changes: u64,
    drains: u64,
}

impl Story {
    fn new(seed: u64, plan: Plan) -> Self {
        let cluster = Cluster::start(seed, plan);
        let network = Arc::clone(&cluster.network);
        network.tell(format!("seed {seed}: {plan:?}"));
        let mut draws = Draws::new(&[seed, 3]);
        let texts = Arc::new(texts(&mut draws));
        Self {
            seed,
            cluster,
            network,
            texts,
            ledger: Shared::default(),
            draws,
            losses: 0,
            changes: 0,
            drains: 0,
        }
    }

    async fn round(&mut self, round: u64) {
        let mut calls = JoinSet::new();
        let start = self.network.now_ms();
        for (at, event) in self.schedule() {
            let due = Duration::from_millis((start + at).saturating_sub(self.network.now_ms()));
            tokio::time::sleep(due).await;
            self.begin(event, &mut calls);
        }
        // Calls end by their deadlines; those that never do are found here.
        let ended = async { while calls.join_next().await.is_some() {} };
        if tokio::time::timeout(CALL_TIMEOUT * 4, ended).await.is_err() {
            self.network.violated("hang: a call outlived its deadline by a minute");
        }
        self.network.set_weather(Weather::CALM);
        self.network.cut([0; NODES], None);
        if let Some((disks, _)) = &self.cluster.disks {
            disks.calm();
        }
        self.cluster.inform();
        self.network.tell(format!("round {round} is over"));
        self.settle().await;
        self.read_everything().await;
        if self.stop_drained() {
            // Every block has all its copies elsewhere: nothing is lost, and nothing is to be made anew.
            self.settle().await;
        }
        self.restart_dead();
        self.retire();
        self.settle().await;
    }

    /// What happens in one round, in order.
    fn schedule(&mut self) -> Vec<(u64, Event)> {
        let mut events = Vec::new();
        for _ in 0..CALLS {
            let (client, text) = (
                self.draws.below((NODES - FIRST_CLIENT) as u64) as usize,
                self.draws.below(self.texts.len() as u64) as usize,
            );
            let event = match self.draws.below(10) {
                0..6 => Event::Store { client, text, streams: self.draws.per_mille(500) },
                6..9 => Event::Read { client, text },
                _ => Event::View { client, text },
            };
            events.push((self.draws.below(ROUND_MS), event));
        }
        for _ in 0..2 {
            let weather = Weather {
                slowest_ms: *self.draws.pick(&[5, 60, 400, 2_000]),
                lost: *self.draws.pick(&[0, 5, 30]),
                damaged: *self.draws.pick(&[0, 10, 100]),
            };
            events.push((self.draws.below(ROUND_MS), Event::Weather(weather)));
            let begins = self.draws.below(ROUND_MS);
            let ends = begins + self.draws.below(ROUND_MS);
            let cut = self.cut();
            events.push((begins, cut));
            events.push((ends, Event::Cut { sides: [0; NODES], one_way: None }));
        }
        if self.cluster.plan.disks {
            events.push((0, Event::SlowDisks { slow: true }));
            events.push((self.draws.between(ROUND_MS / 2..=ROUND_MS), Event::SlowDisks { slow: false }));
        }
        let at = self.draws.below(ROUND_MS);
        self.disturbance(at, &mut events);
        // Equal times keep their order.
        events.sort_by_key(|(at, _)| *at);
        events
    }

    fn cut(&mut self) -> Event {
        let node = self.draws.below(NODES as u64) as usize;
        let mut sides = [0; NODES];
        match self.draws.below(3) {
            0 => sides[node] = 1,
            1 => sides.iter_mut().for_each(|side| *side = self.draws.below(2) as u8),
            _ => {
                let to = self.draws.below(NODES as u64) as usize;
                return Event::Cut { sides, one_way: Some((node, to)) };
            }
        }
        Event::Cut { sides, one_way: None }
    }

    /// The one failure, or change of the members, of a round.
    fn disturbance(&mut self, at: u64, events: &mut Vec<(u64, Event)>) {
        let members: Vec<usize> = self.cluster.members().iter().copied().collect();
        let node = *self.draws.pick(&members);
        let hosts = self.cluster.hosts_without(node);
        let is_bad_disk = self.cluster.plan.disks && self.draws.per_mille(500);
        match self.draws.below(8) {
            _ if self.cluster.plan.sabotage == Sabotage::Disks => {
                events.extend(members.iter().map(|node| (0, Event::BadDisk { node: *node })));
            }
            _ if self.cluster.plan.sabotage == Sabotage::Drains => {
                events.extend([(at, Event::Drain { node, on: true }), (at + 1, Event::Stop)]);
            }
            _ if is_bad_disk => events.push((at / 4, Event::BadDisk { node })),
            0..4 => {
                events.push((at, Event::Crash { node }));
                if self.draws.per_mille(600) {
                    events.push((at + self.draws.below(9_000), Event::Restart));
                }
            }
            4 => events.push((at, Event::Rot)),
            5 if members.len() < FIRST_CLIENT => events.push((at, Event::Join)),
            // Enough hosts for all copies stay, and one more.
            6 if members.len() > 4 => events.push((at, Event::Leave { node })),
            7 if hosts >= self.cluster.plan.rule.copies() => {
                events.push((at, Event::Drain { node, on: true }));
                if self.draws.per_mille(300) {
                    events.push((at + self.draws.below(9_000), Event::Drain { node, on: false }));
                }
            }
            _ => {}
        }
    }

    fn begin(&mut self, event: Event, calls: &mut JoinSet<()>) {
        self.network.tell(format!("{event:?}"));
        match event {
            Event::Store { client, text, streams } => {
                let (call, texts) = (self.call(client), Arc::clone(&self.texts));
                calls.spawn(async move { call.store(&texts[text], streams).await });
            }
            Event::Read { client, text } => {
                let (call, texts) = (self.call(client), Arc::clone(&self.texts));
                calls.spawn(async move { call.read(&texts[text], false).await });
            }
            Event::View { client, text } => {
                let (call, texts) = (self.call(client), Arc::clone(&self.texts));
                calls.spawn(async move { call.view(&texts[text]).await });
            }
            Event::Weather(weather) => self.network.set_weather(weather),
            Event::Cut { sides, one_way } => self.network.cut(sides, one_way),
            Event::Crash { node } => {
                self.losses += 1;
                let together = self.cluster.fails_with(node);
                together.into_iter().for_each(|node| self.cluster.kill(node));
            }
            Event::Restart => self.restart_dead(),
            Event::Rot => self.rot(),
            Event::Join => {
                let free = (0..FIRST_CLIENT).find(|node| !self.cluster.members().contains(node));
                let node = free.expect("it was looked before");
                self.changes += 1;
                self.cluster.start_shard(node);
                self.cluster.change(node, true);
            }
            Event::Leave { node } => {
                self.changes += 1;
                self.cluster.change(node, false);
            }
            Event::Drain { node, on } => {
                self.drains += u64::from(on);
                self.cluster.drain(node, on);
            }
            Event::Stop => {
                self.stop_drained();
            }
            Event::SlowDisks { slow } => self.disks().set_slow(slow),
            Event::BadDisk { node } => {
                self.losses += 1;
                self.disks().set_bad(node, true);
            }
        }
    }

    fn call(&self, client: usize) -> Call {
        Call {
            client: Arc::clone(&self.cluster.clients[client]),
            network: Arc::clone(&self.network),
            ledger: Arc::clone(&self.ledger),
        }
    }

    fn disks(&self) -> &Disks {
        &self.cluster.disks.as_ref().expect("only plans with disks have events of them").0
    }

    fn restart_dead(&mut self) {
        let running = self.cluster.running();
        let dead: Vec<usize> =
            self.cluster.members().iter().copied().filter(|node| !running.contains(node)).collect();
        dead.into_iter().for_each(|node| self.cluster.start_shard(node));
    }

    /// Shards that are drained end; whether there were any.
    fn stop_drained(&mut self) -> bool {
        let drained = self.cluster.draining().clone();
        drained.iter().for_each(|node| self.cluster.kill(*node));
        !drained.is_empty()
    }

    /// Shards that are no members any more end.
    fn retire(&mut self) {
        let members = self.cluster.members().clone();
        let gone: Vec<usize> =
            self.cluster.running().into_iter().filter(|node| !members.contains(node)).collect();
        gone.into_iter().for_each(|node| self.cluster.kill(node));
    }

    /// A bit of a stored tile flips.
    fn rot(&mut self) {
        let stored: Vec<BlockKey> =
            locked(&self.ledger, |ledger| ledger.stored.keys().map(|(_, key)| *key).collect());
        if stored.is_empty() {
            return;
        }
        let key = *self.draws.pick(&stored);
        let layer = self.draws.below(u64::from(LAYERS)) as u32;
        let lives = self.cluster.running().into_iter().filter_map(|node| self.network.life(node));
        if lives.into_iter().any(|life| life.store.corrupt_for_test(key, layer)) {
            self.losses += 1;
        }
    }

    /// Waits until all is as it should be.
    async fn settle(&self) {
        let began = self.network.now_ms();
        loop {
            let (known, stored) =
                locked(&self.ledger, |ledger| (ledger.known.clone(), ledger.stored.clone()));
            let unsettled = match self.cluster.compare(&known).await {
                Ok(()) => None,
                Err(unsettled) => Some(unsettled.0),
            };
            if unsettled.is_none() {
                return self.check_stored(&stored).await;
            }
            if self.network.now_ms() - began > SETTLED_WITHIN_MS {
                let why = unsettled.unwrap_or_default();
                return self.network.violated(format!("repair: after {SETTLED_WITHIN_MS} ms {why}"));
            }
            tokio::time::sleep(Duration::from_millis(1_037)).await;
        }
    }

    /// Every acknowledged block is somewhere.
    async fn check_stored(&self, stored: &BTreeMap<Name, BlockPlace>) {
        match self.cluster.held(stored).await {
            Ok(held) => {
                for (name, _) in stored.iter().filter(|(name, _)| !held.contains_key(name)) {
                    self.network.violated(format!("lost: acknowledged block {} is nowhere", name.1));
                }
            }
            Err(unsettled) => self.network.violated(format!("repair: {}", unsettled.0)),
        }
    }

    /// Nothing is at fault: every acknowledged block is read.
    async fn read_everything(&self) {
        if !self.network.violations().is_empty() {
            return;
        }
        for (at, text) in self.texts.iter().enumerate() {
            self.call(at % self.cluster.clients.len()).read(text, true).await;
        }
    }

    fn end(self) -> Result<Report, String> {
        let violations = self.network.violations();
        if violations.is_empty() {
            let (marks, messages) = self.network.marks();
            let ledger = |count: fn(&Ledger) -> u64| locked(&self.ledger, |ledger| count(ledger));
            let totals = Totals {
                messages,
                stored: ledger(|ledger| ledger.stored.len() as u64),
                read: ledger(|ledger| ledger.read),
                failed: ledger(|ledger| ledger.failed),
                losses: self.losses,
                changes: self.changes,
                drains: self.drains,
                disks: self.cluster.disks.as_ref().map_or((0, 0), |(disks, _)| disks.told()),
            };
            return Ok(Report { marks, totals });
        }
        let story = self.network.journal().join("\n");
        Err(format!("seed {}:\n{}\n\nwhat led there:\n{story}", self.seed, violations.join("\n")))
    }
}
