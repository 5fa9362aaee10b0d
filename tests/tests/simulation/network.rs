//! The network between simulated processes: what becomes of each message, and when.
//!
//! Every message arrives in a millisecond of its own: each directed pair of processes has its own residue of the virtual time, and
//! no two messages of a pair share a millisecond. The paused clock moves only when all is quiet, so one message is dealt with
//! at a time, whichever order tokio polls in. What becomes of a message is a function of (seed, pair, how many came before on
//! this pair), so that the order in which a process writes to different peers does not matter.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
    time::Duration,
};

use longshore_blocks::BlockKey;
use longshore_fabric::{Code, Error};
use longshore_kvstore::KvStore;
use longshore_tests::draws::Draws;
use tokio::{sync::watch, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Most processes of a simulation.
pub(crate) const NODES: usize = 8;
const PAIRS: u64 = (NODES * NODES) as u64;
/// When HTTP/2 notices that a peer is silent, with the defaults of the `grpc` lane: 20 s and 10 s more.
const KEEPALIVE_MS: u64 = 30_000;
/// Entries of the journal that a failed seed shows.
const JOURNAL_MAX: usize = 200;
/// Violations that are kept.
const VIOLATIONS_MAX: usize = 20;

/// How messages fare.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weather {
    /// Longest time on the way.
    pub(crate) slowest_ms: u64,
    /// Messages of a thousand whose connection breaks.
    pub(crate) lost: u64,
    /// Tiles of a thousand in which a bit flips.
    pub(crate) damaged: u64,
}

impl Weather {
    pub(crate) const CALM: Self = Self { slowest_ms: 20, lost: 0, damaged: 0 };
}

/// A process in one life; what it sends after its end goes nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Origin {
    pub(crate) node: usize,
    pub(crate) life: u64,
}

/// A shard that runs.
#[derive(Debug, Clone)]
pub(crate) struct Life {
    pub(crate) number: u64,
    /// Fires when it is killed.
    pub(crate) dead: CancellationToken,
    pub(crate) store: Arc<KvStore>,
    /// The epoch that it sees.
    pub(crate) epoch: watch::Receiver<u64>,
    /// It was asked to drain.
    pub(crate) drained: Arc<AtomicBool>,
}

/// When something happened, and what.
pub(crate) type Mark = (u64, Happened);

/// What two runs of one seed have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Happened {
    /// A message arrived, or its sender learned that it does not.
    Message { from: usize, to: usize, arrived: bool },
    /// A block was acknowledged to a client.
    Stored(BlockKey),
    /// A client read so many blocks.
    Read(usize),
}

/// What becomes of a message.
enum Fate {
    /// It arrives then; a bit flips where the number says, when there is one.
    Arrives(u64, Option<u64>),
    /// Its sender learns then that the connection is gone.
    Breaks(u64),
}

#[derive(Debug)]
struct State {
    weather: Weather,
    /// Processes on different sides do not reach each other.
    sides: [u8; NODES],
    /// Messages from the first to the second vanish.
    one_way: Option<(usize, usize)>,
    lives: [Option<Life>; NODES],
    sent: [u64; NODES * NODES],
    taken: BTreeSet<u64>,
    marks: Vec<Mark>,
    messages: u64,
    journal: VecDeque<String>,
    violations: Vec<String>,
}

/// The network of one simulation.
#[derive(Debug)]
pub(crate) struct Network {
    seed: u64,
    started: Instant,
    state: Mutex<State>,
    /// Owner of what carries streams.
    pub(crate) tasks: TaskTracker,
}

impl Network {
    pub(crate) fn new(seed: u64) -> Arc<Self> {
        let state = State {
            weather: Weather::CALM,
            sides: [0; NODES],
            one_way: None,
            lives: [const { None }; NODES],
            sent: [0; NODES * NODES],
            taken: BTreeSet::new(),
            marks: Vec::new(),
            messages: 0,
            journal: VecDeque::new(),
            violations: Vec::new(),
        };
        Arc::new(Self { seed, started: Instant::now(), state: Mutex::new(state), tasks: TaskTracker::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Virtual milliseconds since the start.
    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(crate) fn set_weather(&self, weather: Weather) {
        self.lock().weather = weather;
    }

    /// Cuts processes apart; all zero and `None`: everybody reaches everybody.
    pub(crate) fn cut(&self, sides: [u8; NODES], one_way: Option<(usize, usize)>) {
        let mut state = self.lock();
        (state.sides, state.one_way) = (sides, one_way);
    }

    pub(crate) fn start(&self, node: usize, life: Life) {
        self.lock().lives[node] = Some(life);
    }

    /// Ends a process at once, with every connection to it.
    pub(crate) fn kill(&self, node: usize) {
        if let Some(life) = self.lock().lives[node].take() {
            life.dead.cancel();
        }
    }

    pub(crate) fn life(&self, node: usize) -> Option<Life> {
        self.lock().lives[node].clone()
    }

    /// Writes a line of the story that a failed seed tells.
    pub(crate) fn tell(&self, line: impl Into<String>) {
        let line = format!("{:>8} ms  {}", self.now_ms(), line.into());
        let mut state = self.lock();
        if state.journal.len() == JOURNAL_MAX {
            state.journal.pop_front();
        }
        state.journal.push_back(line);
    }

    /// Notes that an invariant does not hold.
    pub(crate) fn violated(&self, what: impl Into<String>) {
        let what = what.into();
        self.tell(format!("VIOLATION: {what}"));
        let mut state = self.lock();
        if state.violations.len() < VIOLATIONS_MAX {
            state.violations.push(what);
        }
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    pub(crate) fn journal(&self) -> Vec<String> {
        self.lock().journal.iter().cloned().collect()
    }

    /// What happened when, and how many messages there were.
    pub(crate) fn marks(&self) -> (Vec<Mark>, u64) {
        let state = self.lock();
        (state.marks.clone(), state.messages)
    }

    /// Remembers that something happened.
    pub(crate) fn mark(&self, what: Happened) {
        let now = self.now_ms();
        self.lock().marks.push((now, what));
    }

    /// Carries one message; resolves when it arrives, with where a bit of it flips. The error is what the sender sees of a
    /// connection that is gone.
    pub(crate) async fn pass(&self, from: Origin, to: usize) -> Result<Option<u64>, Error> {
        let (at, arrived) = match self.fate(from, to) {
            Fate::Arrives(at, flip) => (at, Some(flip)),
            Fate::Breaks(at) => (at, None),
        };
        tokio::time::sleep_until(self.started + Duration::from_millis(at)).await;
        self.mark(Happened::Message { from: from.node, to, arrived: arrived.is_some() });
        arrived.ok_or_else(broken)
    }

    fn fate(&self, from: Origin, to: usize) -> Fate {
        let now = self.now_ms();
        let mut state = self.lock();
        let pair = from.node * NODES + to;
        let mut draws = Draws::new(&[self.seed, pair as u64, state.sent[pair]]);
        state.sent[pair] += 1;
        state.messages += 1;
        let delay = draws.below(state.weather.slowest_ms) + 1;
        let lost = draws.per_mille(state.weather.lost);
        // A reset is told at once, silence only by the keepalive.
        let silent = draws.per_mille(500);
        let flip = draws.per_mille(state.weather.damaged).then(|| draws.word());
        // Shards end; clients live as long as the simulation.
        let ended =
            from.life > 0 && state.lives[from.node].as_ref().map(|life| life.number) != Some(from.life);
        let cut = state.sides[from.node] != state.sides[to] || state.one_way == Some((from.node, to));
        if lost || ended || cut {
            let delay = if silent { KEEPALIVE_MS } else { delay };
            return Fate::Breaks(state.arrival(now + delay, pair as u64, now));
        }
        Fate::Arrives(state.arrival(now + delay, pair as u64, now), flip)
    }
}

impl State {
    /// The next free millisecond of a pair.
    fn arrival(&mut self, earliest: u64, pair: u64, now: u64) -> u64 {
        self.taken = self.taken.split_off(&now);
        let mut at = earliest - earliest % PAIRS + pair;
        if at < earliest {
            at += PAIRS;
        }
        while !self.taken.insert(at) {
            at += PAIRS;
        }
        at
    }
}

/// What is seen of a connection that is gone.
pub(crate) fn broken() -> Error {
    Error::new(Code::Unavailable, "the connection is gone")
}
