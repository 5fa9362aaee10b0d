//! Streams of tiles to all shards of one sequence, while it is computed.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use futures::StreamExt;
use longshore_blocks::BlockKey;
use longshore_fabric::{CallContext, Code};
use longshore_proto::types::{Identity, PutAck, PutOutcome, TileMessage, WireTileShape};
use tokio::sync::{mpsc, watch};

use crate::{Error, ShardLink, ShardLinks, intake::within};

/// What the shards acknowledged so far. It holds an entry per block of one request, so that taking an acknowledgement
/// never waits for the engine, which may itself be waiting to send.
#[derive(Debug, Clone, Default)]
pub struct AckBoard {
    state: Arc<Mutex<Board>>,
}

#[derive(Debug, Default)]
struct Board {
    outcomes: HashMap<BlockKey, PutOutcome>,
    /// By shard: why it will acknowledge nothing more.
    failures: HashMap<usize, Error>,
    /// The first block that found no room, and its shard.
    refused: Option<(usize, BlockKey)>,
}

impl AckBoard {
    /// Outcome of a block on a shard, `None` while it is under way; the failure of the shard's stream when there was one.
    pub fn outcome(&self, shard: usize, key: &BlockKey) -> Result<Option<PutOutcome>, Error> {
        let board = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match (board.outcomes.get(key), board.failures.get(&shard)) {
            (Some(&outcome), _) => Ok(Some(outcome)),
            (None, Some(failure)) => Err(failure.clone()),
            (None, None) => Ok(None),
        }
    }

    /// The first (shard, block) that found no room.
    pub fn refused(&self) -> Option<(usize, BlockKey)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).refused
    }

    fn note(&self, shard: usize, ack: &PutAck) {
        let mut board = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        board.outcomes.insert(ack.key, ack.outcome);
        if ack.outcome == PutOutcome::NoSpace {
            board.refused.get_or_insert((shard, ack.key));
        }
    }

    fn fail(&self, shard: usize, error: Error) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).failures.entry(shard).or_insert(error);
    }
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
    board: AckBoard,
    changed: watch::Receiver<u64>,
    change: Arc<watch::Sender<u64>>,
}

impl PutStreams {
    /// Streams to the shards of `links`, each of which may buffer `buffer_tiles`; they end with `ctx`.
    pub fn new(
        ctx: CallContext,
        identity: Identity,
        shape: WireTileShape,
        links: Arc<ShardLinks>,
        buffer_tiles: usize,
    ) -> Self {
        let (change, changed) = watch::channel(0);
        let senders = links.links().iter().map(|_| None).collect();
        let buffer_tiles = buffer_tiles.max(1);
        Self {
            ctx,
            identity,
            shape,
            links,
            buffer_tiles,
            senders,
            board: AckBoard::default(),
            changed,
            change: Arc::new(change),
        }
    }

    /// What was acknowledged.
    pub fn board(&self) -> &AckBoard {
        &self.board
    }

    /// Sends a tile to a shard; waits while the shard's buffer is full. Must run on a runtime (`Handle::block_on`).
    pub async fn send(&mut self, shard: usize, tile: TileMessage) -> Result<(), Error> {
        let key = tile.key;
        if self.senders[shard].is_none() {
            self.senders[shard] = Some(self.open(shard));
        }
        let sender = self.senders[shard].as_ref().expect("the stream was opened above");
        let sent = within(&self.ctx, sender.send(tile)).await;
        match sent.map_err(|source| Error::of_shard(&self.ctx, &self.links.links()[shard].id, source))? {
            Ok(()) => Ok(()),
            // Acknowledged before its last tile, or never: the wait tells.
            Err(_) => self.wait(shard, key).await.map(drop),
        }
    }

    fn open(&self, shard: usize) -> mpsc::Sender<TileMessage> {
        let (sender, receiver) = mpsc::channel(self.buffer_tiles);
        let link = self.links.links()[shard].clone();
        let (ctx, identity, shape) = (self.ctx.clone(), self.identity, self.shape);
        let (board, change) = (self.board.clone(), Arc::clone(&self.change));
        let run = async move {
            let ended = run(&ctx, (shard, &link), (identity, shape), receiver, &board, &change).await;
            // Blocks that nobody acknowledged by now never will be.
            board.fail(shard, ended.err().unwrap_or_else(|| ended_early(&link)));
            change.send_modify(|version| *version += 1);
        };
        self.links.tasks().spawn_on(run, self.links.runtime());
        sender
    }

    /// Ends the streams: what is complete is acknowledged, the rest dropped.
    pub fn end(&mut self) {
        self.senders.iter_mut().for_each(|sender| *sender = None);
    }

    /// Waits until a block was acknowledged by its shard, whatever the outcome, or the shard's stream failed.
    pub async fn wait(&mut self, shard: usize, key: BlockKey) -> Result<PutOutcome, Error> {
        loop {
            self.changed.mark_unchanged();
            if let Some(outcome) = self.board.outcome(shard, &key)? {
                return Ok(outcome);
            }
            // The sending half of the watch lives as long as self.
            match within(&self.ctx, self.changed.changed()).await {
                Ok(_) => {}
                Err(error) if error.code == Code::DeadlineExceeded => return Err(Error::DeadlineExceeded),
                Err(_) => return Err(Error::Cancelled),
            }
        }
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
