//! Streams of tiles to all shards of one sequence, while it is computed: every block goes to the shards of its copies.

mod board;

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, future::join_all};
use longshore_blocks::{
    BlockKey,
    quorum::{Tally, Verdict},
};
use longshore_fabric::{CallContext, Code};
use longshore_proto::types::{Identity, PutOutcome, TileMessage, WireTileShape};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::store_block;
use crate::{Error, ShardLink, ShardLinks, intake::within};

use board::AckBoard;

/// How long copies beyond those that were waited for may go on after the sequence was stored.
const BACKGROUND_TIMEOUT: Duration = Duration::from_secs(60);

/// A block that counts as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Copies that arrived damaged and were sent again.
    pub resent: u64,
}

/// Why a block does not count as stored.
#[derive(Debug)]
pub enum Unstored {
    /// This shard has no room.
    NoSpace(usize),
    /// It arrived at this shard damaged, twice.
    Corrupt(usize),
    /// Nothing was heard for as long as the caller is patient.
    Stalled,
    /// A call failed, or the caller no longer wants it.
    Failed(Error),
}

/// One lazily opened `put_blocks` stream per shard; each buffers a bounded number of tiles.
#[derive(Debug)]
pub struct PutStreams {
    ctx: CallContext,
    identity: Identity,
    shape: WireTileShape,
    links: Arc<ShardLinks>,
    buffer_tiles: usize,
    senders: Vec<Option<mpsc::Sender<TileMessage>>>,
    /// Blocks that do not count as stored yet.
    blocks: HashMap<BlockKey, Tally>,
    /// Shards that took no tile for too long.
    given_up: HashSet<usize>,
    board: AckBoard,
    changed: watch::Receiver<u64>,
    change: Arc<watch::Sender<u64>>,
    ended: Arc<AtomicBool>,
}

impl PutStreams {
    /// Streams to the shards of `links`, each of which may buffer `buffer_tiles`; they end with `ctx`, but for further copies of
    /// blocks that are stored.
    pub fn new(
        ctx: CallContext,
        identity: Identity,
        shape: WireTileShape,
        links: Arc<ShardLinks>,
        buffer_tiles: usize,
    ) -> Self {
        let (change, changed) = watch::channel(0);
        let senders = links.links().iter().map(|_| None).collect();
        Self {
            ctx,
            identity,
            shape,
            links,
            buffer_tiles: buffer_tiles.max(1),
            senders,
            blocks: HashMap::new(),
            given_up: HashSet::new(),
            board: AckBoard::default(),
            changed,
            change: Arc::new(change),
            ended: Arc::default(),
        }
    }

    /// The first (shard, block) that found no room, where that means that the block cannot be stored.
    pub fn refused(&self) -> Option<(usize, BlockKey)> {
        self.board.refused().filter(|_| self.links.rule().copies() == 1)
    }

    /// Whether tiles of the block were sent.
    pub fn knows(&self, key: &BlockKey) -> bool {
        self.blocks.contains_key(key)
    }

    /// Begins a block, whose copies go to the first of `candidates`.
    pub fn begin(&mut self, key: BlockKey, candidates: &[usize]) {
        // Shards that were given up come last.
        let (lost, mut good): (Vec<usize>, Vec<usize>) =
            candidates.iter().partition(|shard| self.given_up.contains(shard));
        good.extend(lost);
        self.blocks.insert(key, self.links.tally(&good));
    }

    /// Sends a tile of a block that was begun to all of its shards; waits while their buffers are full, and gives those up
    /// that take nothing for as long as `patience`. Fails when too few shards are left. Must run on a runtime
    /// (`Handle::block_on`).
    pub async fn send(&mut self, tile: TileMessage, patience: Duration) -> Result<(), Error> {
        let key = tile.key;
        let Some(tally) = self.blocks.get(&key) else { return Ok(()) };
        let shards: Vec<usize> = tally.under_way().collect();
        for &shard in &shards {
            if self.senders[shard].is_none() {
                self.senders[shard] = Some(self.open(shard));
            }
        }
        let this = &*self;
        let sends = shards.into_iter().map(|shard| {
            let tile = tile.clone();
            async move {
                let sent = tokio::time::timeout(patience, this.send_to(shard, tile)).await;
                (shard, sent.unwrap_or_else(|_| Err(this.hangs(shard, patience))))
            }
        });
        let mut failure = None;
        let sent = join_all(sends).await;
        for (shard, sent) in sent {
            if let Err(error) = sent {
                crate::error::check(&self.ctx)?;
                self.give_up(shard);
                failure = Some(error);
            }
        }
        match failure {
            Some(error) if self.blocks.get(&key).is_some_and(|tally| tally.verdict() == Verdict::Failed) => {
                Err(error)
            }
            _ => Ok(()),
        }
    }

    async fn send_to(&self, shard: usize, tile: TileMessage) -> Result<(), Error> {
        let sender = self.senders[shard].as_ref().expect("the stream was opened before");
        let key = tile.key;
        let sent = within(&self.ctx, sender.send(tile)).await;
        let id = &self.links.links()[shard].id;
        if sent.map_err(|source| Error::of_shard(&self.ctx, id, source))?.is_ok() {
            return Ok(());
        }
        // Acknowledged before its last tile, or never. The stream's end is noted just after its receiver is gone.
        let mut changed = self.changed.clone();
        loop {
            changed.mark_unchanged();
            if self.board.outcome(shard, &key)?.is_some() {
                return Ok(());
            }
            let waited = within(&self.ctx, changed.changed()).await;
            waited.map_err(|source| Error::of_shard(&self.ctx, id, source))?.ok();
        }
    }

    fn hangs(&self, shard: usize, patience: Duration) -> Error {
        let message = format!("took no tile for {} ms; hint: look at the shard", patience.as_millis());
        let source = longshore_fabric::Error::new(Code::Unavailable, message);
        Error::Shard { shard: self.links.links()[shard].id.clone(), source }
    }

    /// Expects nothing from a shard any more.
    fn give_up(&mut self, shard: usize) {
        if self.given_up.insert(shard) {
            self.links.links()[shard].health.failed(Instant::now());
        }
        for (key, tally) in &mut self.blocks {
            // What it acknowledged before still counts.
            match self.board.outcome(shard, key) {
                Ok(Some(PutOutcome::Stored | PutOutcome::Duplicate)) => tally.held(shard),
                _ => tally.refused(shard),
            }
        }
    }

    fn open(&self, shard: usize) -> mpsc::Sender<TileMessage> {
        let (sender, receiver) = mpsc::channel(self.buffer_tiles);
        let link = self.links.links()[shard].clone();
        let (ctx, identity, shape) = (self.ctx.clone(), self.identity, self.shape);
        let (board, change) = (self.board.clone(), Arc::clone(&self.change));
        let ended = Arc::clone(&self.ended);
        let run = async move {
            // Its own token: copies that nobody waits for outlive the call.
            let own = CallContext { cancel: CancellationToken::new(), ..ctx.clone() };
            let _ends_the_call = own.cancel.clone().drop_guard();
            let stream = run(&own, (shard, &link), (identity, shape), receiver, &board, &change);
            let outcome = tokio::select! {
                outcome = stream => outcome,
                () = stopped(&ctx, &ended) => Err(Error::Cancelled),
            };
            // Blocks that nobody acknowledged by now never will be.
            board.fail(shard, outcome.err().unwrap_or_else(|| ended_early(&link)));
            change.send_modify(|version| *version += 1);
        };
        self.links.tasks().spawn_on(run, self.links.runtime());
        sender
    }

    /// Ends the streams: what is complete is acknowledged, the rest dropped.
    pub fn end(&mut self) {
        self.senders.iter_mut().for_each(|sender| *sender = None);
    }

    /// All blocks are stored: further copies go on without the caller.
    pub fn detach(self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    /// Waits until enough shards hold a block, and sends it whole (`tiles`) to the next ones in place of those that refuse or
    /// fail; once more to those where it arrived damaged. Shards from which nothing is heard for as long as `patience` are
    /// given up.
    pub async fn ensure(
        &mut self,
        key: BlockKey,
        patience: Duration,
        tiles: impl Fn() -> Vec<TileMessage>,
    ) -> Result<Stored, Unstored> {
        let Some(mut tally) = self.blocks.remove(&key) else { return Ok(Stored { resent: 0 }) };
        let mut again = Again { refusal: Unstored::Stalled, resent: HashSet::new() };
        loop {
            self.changed.mark_unchanged();
            for shard in again.absorb(&self.board, &mut tally, &key) {
                self.store_again(shard, patience, tiles(), &mut tally, &mut again).await;
            }
            while let Some(next) = tally.ask_next() {
                self.store_again(next, patience, tiles(), &mut tally, &mut again).await;
            }
            match tally.verdict() {
                Verdict::Stored => return Ok(Stored { resent: again.resent.len() as u64 }),
                Verdict::Failed => return Err(again.refusal),
                Verdict::Waiting => {}
            }
            match tokio::time::timeout(patience, within(&self.ctx, self.changed.changed())).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) if error.code == Code::DeadlineExceeded => {
                    return Err(Unstored::Failed(Error::DeadlineExceeded));
                }
                Ok(Err(_)) => return Err(Unstored::Failed(Error::Cancelled)),
                Err(_) => {
                    again.refusal = Unstored::Stalled;
                    let silent: Vec<usize> = tally.under_way().collect();
                    for shard in silent {
                        tally.refused(shard);
                        self.give_up(shard);
                    }
                }
            }
        }
    }

    async fn store_again(
        &self,
        shard: usize,
        patience: Duration,
        tiles: Vec<TileMessage>,
        tally: &mut Tally,
        again: &mut Again,
    ) {
        let link = &self.links.links()[shard];
        tracing::warn!(shard = %link.id, "sending a block whole, because it arrived damaged or another shard did not take it");
        let store = store_block(&self.ctx, link, self.identity, self.shape, tiles);
        let Ok(outcome) = tokio::time::timeout(patience, store).await else {
            again.refusal = Unstored::Stalled;
            link.health.failed(Instant::now());
            return tally.refused(shard);
        };
        link.note(&outcome);
        match outcome {
            Ok(PutOutcome::Stored | PutOutcome::Duplicate) => return tally.held(shard),
            Ok(PutOutcome::NoSpace) => again.refusal = Unstored::NoSpace(shard),
            Ok(PutOutcome::Corrupt) => again.refusal = Unstored::Corrupt(shard),
            Err(error) => again.refusal = Unstored::Failed(error),
        }
        tally.refused(shard);
    }
}

/// What became of the copies of a block that are not held.
struct Again {
    refusal: Unstored,
    /// Shards that it was sent to again.
    resent: HashSet<usize>,
}

impl Again {
    /// Takes note of what streams brought; returns the shards where the block arrived damaged and is to be sent again.
    fn absorb(&mut self, board: &AckBoard, tally: &mut Tally, key: &BlockKey) -> Vec<usize> {
        let waiting: Vec<usize> = tally.under_way().collect();
        let mut damaged = Vec::new();
        for shard in waiting {
            match board.outcome(shard, key) {
                Ok(None) => {}
                Ok(Some(PutOutcome::Stored | PutOutcome::Duplicate)) => tally.held(shard),
                Ok(Some(PutOutcome::Corrupt)) => {
                    if self.resent.insert(shard) {
                        damaged.push(shard);
                    }
                }
                Ok(Some(PutOutcome::NoSpace)) => {
                    self.refusal = Unstored::NoSpace(shard);
                    tally.refused(shard);
                }
                Err(error) => {
                    self.refusal = Unstored::Failed(error);
                    tally.refused(shard);
                }
            }
        }
        damaged
    }
}

/// Resolves when the caller leaves; once all is stored, after further copies had their time.
async fn stopped(ctx: &CallContext, ended: &AtomicBool) {
    ctx.cancel.cancelled().await;
    if ended.load(Ordering::SeqCst) {
        tokio::time::sleep(BACKGROUND_TIMEOUT).await;
    }
}

/// Feeds one stream and notes its acknowledgements until both sides are done.
async fn run(
    ctx: &CallContext,
    (shard, link): (usize, &ShardLink),
    (identity, shape): (Identity, WireTileShape),
    mut tiles: mpsc::Receiver<TileMessage>,
    board: &AckBoard,
    change: &watch::Sender<u64>,
) -> Result<(), Error> {
    let (sender, receiver) = mpsc::channel(1);
    let feed = async move {
        while let Some(tile) = tiles.recv().await {
            if sender.send(tile).await.is_err() {
                break;
            }
        }
    };
    let answers = async {
        let mut acks = link.shard.put_blocks(ctx, identity, shape, receiver).await?;
        while let Some(ack) = acks.next().await {
            board.note(shard, &ack?);
            change.send_modify(|version| *version += 1);
        }
        Ok(())
    };
    let both = async {
        tokio::pin!(answers);
        tokio::select! {
            answered = &mut answers => answered,
            () = feed => answers.await,
        }
    };
    let ended = within(ctx, both).await.and_then(|ended| ended);
    ended.map_err(|source| Error::of_shard(ctx, &link.id, source))
}

fn ended_early(link: &ShardLink) -> Error {
    let source = longshore_fabric::Error::new(Code::Unavailable, "ended its store stream");
    Error::Shard { shard: link.id.clone(), source }
}
