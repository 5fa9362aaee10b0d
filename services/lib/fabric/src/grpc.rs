//! The `grpc` lane: the service traits over tonic clients.

mod attend;
mod call;
mod dial;
mod epochs;
mod exchanged;
mod front;
mod lanes;
mod leased;
mod over;
mod pool;
mod shard;
mod streamed;
mod tiles;
mod workers;

use std::{sync::Arc, time::Duration};

use tonic::transport::Channel;

use crate::{
    Code, Connector, Decoder, Describer, Error, Inference, Prefiller, Shard, TcpPatience, nccl::GpuLanes,
};

use pool::{Pool, Use};

/// Limits and timings of gRPC clients.
#[derive(Debug, Clone)]
pub struct GrpcOptions {
    /// Most connections kept; the one that was asked for least recently makes room.
    pub connections_max: usize,
    /// How long a connection attempt may take.
    pub connect_timeout: Duration,
    /// Silence after which the peer is pinged.
    pub keepalive_interval: Duration,
    /// How long the peer may take to answer a ping before its connection counts as dead.
    pub keepalive_timeout: Duration,
    /// Largest message in either direction.
    pub message_bytes_max: usize,
    /// HTTP/2 flow-control window of one stream.
    pub stream_window_bytes: u32,
    /// HTTP/2 flow-control window of one connection.
    pub connection_window_bytes: u32,
    /// Largest HTTP/2 frame.
    pub frame_bytes_max: u32,
    /// Memory of each connection of the `shm` lane for what it sends, a multiple of 2 MiB; 0 never uses that lane.
    pub shm_arena_bytes: usize,
    /// Connections of the `tcp` lane to a peer; calls beyond them send their tiles over gRPC. 0 never uses that lane.
    pub tcp_connections_max: usize,
    /// How long the `tcp` lane waits for peers.
    pub tcp_patience: TcpPatience,
    /// What makes the client's ends of the lane `nccl`; without it that lane is never used.
    pub nccl: Option<Arc<dyn GpuLanes>>,
    /// Ends of the lane `nccl` to a peer; calls beyond them send their tiles another way. 0 never uses that lane.
    pub nccl_ends_max: usize,
    /// Ends of that lane to a peer that attend streams take for themselves, one each; the partials of streams beyond them stay in
    /// messages. Apart from those of calls with tiles, which streams that last would take for good. 0: partials never go that way.
    pub nccl_attend_ends_max: usize,
    /// Connections to a peer that carry tiles, by turns.
    pub tile_connections: usize,
}

impl Default for GrpcOptions {
    fn default() -> Self {
        Self {
            connections_max: 256,
            connect_timeout: Duration::from_secs(5),
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(10),
            message_bytes_max: 16 << 20,
            stream_window_bytes: 8 << 20,
            connection_window_bytes: 16 << 20,
            frame_bytes_max: 1 << 20,
            shm_arena_bytes: 32 << 20,
            tcp_connections_max: 16,
            tcp_patience: TcpPatience::default(),
            nccl: None,
            nccl_ends_max: 2,
            nccl_attend_ends_max: 1,
            tile_connections: 2,
        }
    }
}

/// Clients of `http://host:port` addresses over a bounded pool of lazy connections. Cheap to clone; clones share the pool.
#[derive(Debug, Clone)]
pub struct GrpcConnector {
    pool: Arc<Pool>,
}

impl GrpcConnector {
    /// An empty pool.
    ///
    /// # Panics
    /// Outside a tokio runtime. The connections live on the runtime of this call, whichever thread makes clients later.
    pub fn new(options: GrpcOptions) -> Self {
        Self { pool: Arc::new(Pool::new(options)) }
    }

    /// A client of a shard over the `shm` lane alone: `Unavailable` when that is not offered, and for good when it ends.
    pub async fn shm_shard(&self, address: &str) -> Result<Arc<dyn Shard>, Error> {
        lanes::shm_alone(address, &self.pool).await
    }

    /// A client of a shard whose tiles travel over the `tcp` lane alone: `Unavailable` when that is not offered or does not work.
    pub fn tcp_shard(&self, address: &str) -> Result<Arc<dyn Shard>, Error> {
        Ok(Arc::new(self.shard_over_grpc(address, Alone::Tcp)?))
    }

    /// A client of a shard whose tiles travel over the `nccl` lane alone: `Unavailable` when this process or the shard has no such lane,
    /// or it does not work. Attend streams begin in an epoch, too; they survive it.
    pub fn nccl_shard(&self, address: &str) -> Result<Arc<dyn Shard>, Error> {
        if self.pool.epochs(address)?.is_none() {
            return Err(Error::new(Code::Unavailable, "this process has no lane `nccl`"));
        }
        Ok(Arc::new(self.shard_over_grpc(address, Alone::Nccl)?))
    }

    /// How long the partials of attend streams to a peer leave the lane `nccl` alone after its last failure there: 5 s after the first one,
    /// twice as long after every further one, up to 5 minutes; zero where it works, and where there is no such lane.
    pub fn nccl_attend_rest(&self, address: &str) -> Result<Duration, Error> {
        Ok(self.pool.attending(address)?.map_or(Duration::ZERO, |epochs| epochs.rest()))
    }

    fn shard_over_grpc(&self, address: &str, alone: Alone) -> Result<shard::ShardClient, Error> {
        let calls = self.pool.channel(address, Use::Calls)?;
        let channels =
            (0..self.pool.tile_connections()).map(|index| self.pool.channel(address, Use::Tiles(index)));
        let limit = self.pool.message_bytes_max();
        let dial = tiles::Streamed { dial: self.pool.dial(address)?, alone: alone == Alone::Tcp };
        let mut tiles = tiles::TileChannels::new(channels.collect::<Result<_, _>>()?, limit).with_dial(dial);
        let epochs = self.pool.epochs(address)?.filter(|_| alone != Alone::Tcp);
        if let Some(epochs) = epochs {
            tiles = tiles.with_epochs(tiles::Exchanged { epochs, alone: alone == Alone::Nccl });
        }
        let attending = self.pool.attending(address)?.filter(|_| alone != Alone::Tcp);
        let attending = attending.map(|epochs| tiles::Exchanged { epochs, alone: alone == Alone::Nccl });
        Ok(shard::ShardClient::new(calls, tiles, attending, limit))
    }
}

/// The only lane that may carry tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Alone {
    /// Whichever works.
    None,
    Nccl,
    Tcp,
}

/// The generated client alone, tiles too.
pub(crate) fn stock(channel: Channel, message_bytes_max: usize) -> Arc<dyn Shard> {
    Arc::new(shard::ShardClient::stock(channel, message_bytes_max))
}

impl Connector for GrpcConnector {
    fn shard(&self, address: &str) -> Result<Arc<dyn Shard>, Error> {
        let grpc = Arc::new(self.shard_over_grpc(address, Alone::None)?);
        if self.pool.options().shm_arena_bytes == 0 {
            return Ok(grpc);
        }
        Ok(Arc::new(lanes::LaneShard::new(address, grpc, Arc::clone(&self.pool))))
    }

    fn prefiller(&self, address: &str) -> Result<Arc<dyn Prefiller>, Error> {
        let channel = self.pool.channel(address, Use::Calls)?;
        Ok(Arc::new(workers::PrefillerClient::new(channel, self.pool.message_bytes_max())))
    }

    fn decoder(&self, address: &str) -> Result<Arc<dyn Decoder>, Error> {
        let channel = self.pool.channel(address, Use::Calls)?;
        Ok(Arc::new(workers::DecoderClient::new(channel, self.pool.message_bytes_max())))
    }

    fn inference(&self, address: &str) -> Result<Arc<dyn Inference>, Error> {
        let channel = self.pool.channel(address, Use::Calls)?;
        Ok(Arc::new(front::InferenceClient::new(channel, self.pool.message_bytes_max())))
    }

    fn describer(&self, address: &str) -> Result<Arc<dyn Describer>, Error> {
        let channel = self.pool.channel(address, Use::Calls)?;
        Ok(Arc::new(front::DescriberClient::new(channel, self.pool.message_bytes_max())))
    }
}
