//! Reading blocks so that partial success counts: what arrived and verified before a failure is told and can be used.

use futures::StreamExt;
use longshore_proto::types::{GetBlocks, TileMessage};

use crate::{BoxStream, CallContext, Code, Error, Shard};

/// In which order tiles are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// All layers of a block, then the next block: a failure leaves whole blocks.
    Blocks,
    /// All blocks of a layer, then the next layer: a walk over the layers may begin with the first one while others are on their way.
    Layers,
}

/// What a transfer brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    /// Blocks, from the first key on without a gap, of which every layer asked for verified.
    pub blocks: usize,
    /// Layers, from the first on without a gap, of which every block verified.
    pub layers: u32,
    /// Why it ended before everything was there: `NotFound` for a block that is not held, `DataLoss` for a tile that did not verify.
    pub failure: Option<Error>,
}

/// Reads `layers` layers of every block of `get` from its first layer on. `land` copies a tile to where it stays and says whether
/// the copy verified; it gets tiles in `order` and none after the first failure. Whatever ends the future ends the transfer on both sides.
pub async fn read(
    shard: &dyn Shard,
    ctx: &CallContext,
    get: GetBlocks,
    layers: u32,
    order: Order,
    mut land: impl FnMut(&TileMessage) -> bool + Send,
) -> Transfer {
    let blocks = get.keys.len();
    match order {
        Order::Blocks => {
            let get = GetBlocks { layers: Some(layers), ..get };
            let (tiles, failure) = walk(shard, ctx, &get, &mut land).await;
            let blocks = tiles / layers.max(1) as usize;
            let layers = if failure.is_none() { layers } else { 0 };
            Transfer { blocks, layers, failure }
        }
        Order::Layers => {
            let mut done = 0;
            while done < layers {
                let get = GetBlocks {
                    first_layer: get.first_layer + done,
                    layers: Some(1),
                    keys: get.keys.clone(),
                    ..get
                };
                let (tiles, failure) = walk(shard, ctx, &get, &mut land).await;
                if failure.is_some() {
                    let blocks = if done + 1 == layers { tiles } else { 0 };
                    return Transfer { blocks, layers: done, failure };
                }
                done += 1;
            }
            Transfer { blocks, layers, failure: None }
        }
    }
}

/// One call. Tiles that verified before the first failure, and that.
async fn walk(
    shard: &dyn Shard,
    ctx: &CallContext,
    get: &GetBlocks,
    land: &mut (impl FnMut(&TileMessage) -> bool + Send),
) -> (usize, Option<Error>) {
    let mut tiles = 0;
    let outcome = async {
        let mut answers = shard.get_blocks(ctx, get.clone()).await?;
        for &key in &get.keys {
            for layer in get.first_layer..get.first_layer + get.layers.unwrap_or(1) {
                let tile = next(&mut answers).await?;
                let tile =
                    tile.ok_or_else(|| Error::new(Code::NotFound, format!("block `{key}` is not held")))?;
                if (tile.key, tile.layer) != (key, layer) || !land(&tile) {
                    let text = format!("the tile of block `{key}` in layer {layer} did not verify");
                    return Err(Error::new(Code::DataLoss, text));
                }
                tiles += 1;
            }
        }
        Ok(())
    };
    let failure = outcome.await.err();
    (tiles, failure)
}

async fn next(answers: &mut BoxStream<Option<TileMessage>>) -> Result<Option<TileMessage>, Error> {
    let ended = || Err(Error::new(Code::Unavailable, "the shard ended its answer early"));
    answers.next().await.unwrap_or_else(ended)
}
