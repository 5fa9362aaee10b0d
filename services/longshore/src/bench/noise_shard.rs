//! A shard that has every block that it is asked for, full of noise: fills a sequence to a depth without computing it.

use async_trait::async_trait;
use futures::stream;
use longshore_attention::TileShape;
use longshore_blocks::crc32c;
use longshore_fabric::{BoxStream, CallContext, Code, Error, Shard};
use longshore_proto::types::{
    AttendAnswer, AttendQuery, GetBlocks, Identity, Lookup, OpenView, OpenedView, PutAck, ShardStats,
    TileMessage, WireTileShape,
};
use tokio::sync::mpsc;

use super::noise::Noise;

/// The shard; gives blocks and nothing else.
#[derive(Debug)]
pub(super) struct NoiseShard {
    shape: TileShape,
    layers: usize,
}

impl NoiseShard {
    /// A shard for models with so many layers.
    pub(super) fn new(shape: TileShape, layers: usize) -> Self {
        Self { shape, layers }
    }
}

fn not_here<T>() -> Result<T, Error> {
    Err(Error::new(Code::Unimplemented, "a shard of noise only gives blocks"))
}

#[async_trait]
impl Shard for NoiseShard {
    async fn lookup(&self, _ctx: &CallContext, lookup: Lookup) -> Result<Vec<bool>, Error> {
        Ok(vec![true; lookup.keys.len()])
    }

    async fn put_blocks(
        &self,
        _ctx: &CallContext,
        _identity: Identity,
        _shape: WireTileShape,
        _tiles: mpsc::Receiver<TileMessage>,
    ) -> Result<BoxStream<PutAck>, Error> {
        not_here()
    }

    async fn get_blocks(
        &self,
        _ctx: &CallContext,
        get: GetBlocks,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        let mut noise = Noise(7);
        let few: Vec<_> = (0..8).map(|_| noise.tile(self.shape).as_bytes().to_vec()).collect();
        let few: Vec<_> = few.into_iter().map(|body| (crc32c(&body), bytes::Bytes::from(body))).collect();
        let layers = self.layers;
        let tiles = (0..get.keys.len() * layers).map(move |index| {
            let (crc32c, data) = few[index % few.len()].clone();
            Ok(Some(TileMessage {
                key: get.keys[index / layers],
                layer: (index % layers) as u32,
                data: data.into(),
                crc32c,
                place: None,
            }))
        });
        Ok(Box::pin(stream::iter(tiles)))
    }

    async fn open_view(&self, _ctx: &CallContext, _open: OpenView) -> Result<OpenedView, Error> {
        not_here()
    }

    async fn attend(
        &self,
        _ctx: &CallContext,
        _queries: mpsc::Receiver<AttendQuery>,
    ) -> Result<BoxStream<AttendAnswer>, Error> {
        not_here()
    }

    async fn close_view(&self, _ctx: &CallContext, _view_id: u64) -> Result<(), Error> {
        Ok(())
    }

    async fn stats(&self, _ctx: &CallContext) -> Result<ShardStats, Error> {
        not_here()
    }
}
