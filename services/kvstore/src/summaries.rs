//! Summaries of a view's blocks: made per block and layer from the stored tile, which is verified for it, and kept beside the block
//! within the shard's budget as long as there is room.

use std::{ops::Range, sync::Arc, time::Instant};

use longshore_attention::{Mean, Tile};
use longshore_blocks::{
    BlockKey,
    pool::{Noted, Payload, Resource, SealedBlock, ViewBlock, ViewId},
};
use longshore_chassis::Tasks;
use longshore_fabric::{BoxStream, CallContext};
use longshore_proto::types::{GetSummaries, SummariesMessage, Tensor};

use crate::{
    Error,
    borrowed::{Blocks, Borrowed},
    get, lifetime,
    lifetime::{Kind, Outlet, Place, Taken},
    store::Store,
};

const KIND: Kind =
    Kind { task: "kvstore-summaries", stream: "summaries", stalling: "no summary was taken", unread: 4 };
/// Blocks of one message and of one turn on the compute pool, at most.
const STEP_BLOCKS: usize = 256;
/// Bytes that a kept summary takes besides itself: reference counts, its slot, and what the allocator rounds up.
const KEPT_BYTES: usize = 96;

/// Starts a stream of summaries.
pub(crate) fn start(
    store: &Arc<Store>,
    tasks: &Tasks,
    ctx: &CallContext,
    asked: GetSummaries,
) -> Result<BoxStream<SummariesMessage>, Error> {
    store.check_identity(&asked.identity)?;
    let layers = get::layers(asked.first_layer, asked.layers, store.identity().layers)?;
    let (namespace, view) = (asked.identity.namespace, ViewId(asked.view_id));
    let place = Place::take(store, namespace, Resource::Readers)?;
    let (blocks, borrowed) = Borrowed::of(store, namespace, std::iter::once(view))?;
    let blocks = blocks.into_iter().next().expect("one view was borrowed");
    Ok(lifetime::run((store, tasks, ctx), KIND, move |store, messages| async move {
        let _kept = (place, borrowed);
        send(&store, &asked, layers, &blocks, &messages).await
    }))
}

async fn send(
    store: &Arc<Store>,
    asked: &GetSummaries,
    layers: Range<u32>,
    blocks: &Blocks,
    messages: &Outlet<SummariesMessage>,
) -> Result<(), Error> {
    let step = step_blocks(store, asked);
    for layer in layers {
        for first in (0..blocks.len()).step_by(step) {
            let (worker, blocks, asked) = (store.clone(), blocks.clone(), asked.clone());
            let turn = store.read_turns().turn(asked.identity.namespace).await;
            let message = store
                .off_reactor(move || {
                    let _turn = turn;
                    let range = first..blocks.len().min(first + step);
                    let means = means(&worker, &blocks, range, layer)?;
                    message(&worker, &asked, layer, first, &means)
                })
                .await??;
            store.metrics.summary_bytes.inc_by(bytes(&message));
            if messages.send(store, message).await? == Taken::Gone {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Blocks that make a message of the size at which answers are cut.
fn step_blocks(store: &Store, asked: &GetSummaries) -> usize {
    let shape = store.identity().tile_shape;
    let parts = 1 + usize::from(asked.values) + usize::from(asked.spreads);
    let block_bytes =
        shape.kv_heads * (shape.head_dim * parts + usize::from(asked.cosines)) * size_of::<f32>();
    (store.config().attend_message_bytes / block_bytes).clamp(1, STEP_BLOCKS)
}

/// Summaries of some blocks in one layer; blocks in parallel. A block whose tile does not match its checksum is dropped.
fn means(store: &Store, blocks: &Blocks, range: Range<usize>, layer: u32) -> Result<Vec<Arc<Mean>>, Error> {
    let blocks = &blocks[range];
    // Each with whether it is new.
    let made = store.compute_pool().map(blocks.len(), |index| {
        let block = &blocks[index].block;
        let known = block.note::<Mean>(layer as usize).map(|mean| (mean, false));
        let made = || make(store, block, layer).map(|mean| (mean, true));
        known.or_else(made).ok_or_else(|| block.key())
    });
    let corrupt = |key: BlockKey| {
        blocks.iter().filter(|entry| entry.block.key() == key).for_each(|entry| store.condemn(&entry.block));
        Error::Blocks(longshore_blocks::Error::Corrupt {
            what: format!("block `{key}`"),
            problem: format!("the tile of layer {layer} does not match its checksum"),
        })
    };
    let made = made.into_iter().collect::<Result<Vec<_>, _>>().map_err(corrupt)?;
    let keep = |(entry, (mean, fresh)): (&ViewBlock<Arc<Tile>>, (Arc<Mean>, bool))| {
        if fresh {
            store.keep_summary(&entry.block, layer, &mean);
        }
        mean
    };
    Ok(blocks.iter().zip(made).map(keep).collect())
}

/// `None` when the tile does not match its checksum.
fn make(store: &Store, block: &SealedBlock<Arc<Tile>>, layer: u32) -> Option<Arc<Mean>> {
    let mean = match block.payload() {
        Payload::Memory(pages) => {
            get::is_sound(&pages, layer..layer + 1).then(|| Mean::of(&pages[layer as usize].payload))?
        }
        Payload::Disk(extent) => {
            let tiles = store.read_layers(block, &extent, layer..layer + 1).ok()?;
            Mean::of(tiles.first()?)
        }
    };
    store.metrics.summaries_made.inc();
    Some(Arc::new(mean))
}

impl Store {
    /// Keeps a summary beside its block if there is room, which may take the time of a write to disk.
    fn keep_summary(&self, block: &SealedBlock<Arc<Tile>>, layer: u32, mean: &Arc<Mean>) {
        let (started, bytes) = (Instant::now(), (mean.memory_bytes() + KEPT_BYTES) as u64);
        loop {
            let before = self.spills_ended();
            let noted = self.with_pool(|pool, now| {
                pool.take_note(block.generation(), layer as usize, mean.clone(), bytes, now)
            });
            match noted {
                Noted::MakeRoom if self.make_room(before, started) => {}
                // It can be made again: no reason to stop writing to disk.
                Noted::MakeRoom | Noted::Kept | Noted::No => return,
            }
        }
    }
}

fn message(
    store: &Store,
    asked: &GetSummaries,
    layer: u32,
    first: usize,
    means: &[Arc<Mean>],
) -> Result<SummariesMessage, Error> {
    if means.iter().any(|mean| !mean.is_finite()) {
        return Err(Error::NotFinite { view_id: asked.view_id });
    }
    let shape = store.identity().tile_shape;
    let axes = [means.len(), shape.kv_heads, shape.head_dim].map(|extent| extent as u64);
    let tensor = |axes: &[u64], part: fn(&Mean) -> &[f32]| {
        let values: Vec<f32> = means.iter().flat_map(|mean| part(mean)).copied().collect();
        Tensor::from_f32(axes, &values)
    };
    Ok(SummariesMessage {
        layer,
        first: first as u64,
        keys: tensor(&axes, Mean::key),
        values: asked.values.then(|| tensor(&axes, Mean::value)),
        spreads: asked.spreads.then(|| tensor(&axes, Mean::spread)),
        cosines: asked.cosines.then(|| tensor(&axes[..2], Mean::cosines)),
    })
}

fn bytes(message: &SummariesMessage) -> u64 {
    let parts =
        [Some(&message.keys), message.values.as_ref(), message.spreads.as_ref(), message.cosines.as_ref()];
    parts.into_iter().flatten().map(|tensor| tensor.data.len() as u64).sum()
}
