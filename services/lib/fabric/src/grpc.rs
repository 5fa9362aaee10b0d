//! The `grpc` lane: the service traits over tonic clients.

mod call;
mod front;
mod pool;
mod shard;
mod workers;

use std::{sync::Arc, time::Duration};

use crate::{Connector, Decoder, Describer, Error, Inference, Prefiller, Shard};

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
}

impl Default for GrpcOptions {
    fn default() -> Self {
        Self {
            connections_max: 256,
            connect_timeout: Duration::from_secs(5),
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(10),
            message_bytes_max: 16 << 20,
            stream_window_bytes: 4 << 20,
            connection_window_bytes: 16 << 20,
            frame_bytes_max: 256 << 10,
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
}

impl Connector for GrpcConnector {
    fn shard(&self, address: &str) -> Result<Arc<dyn Shard>, Error> {
        let calls = self.pool.channel(address, Use::Calls)?;
        let tiles = self.pool.channel(address, Use::Tiles)?;
        Ok(Arc::new(shard::ShardClient::new(calls, tiles, self.pool.message_bytes_max())))
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
