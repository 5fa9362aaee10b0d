//! The `grpc` lane: the service traits over tonic clients.

use std::{sync::Arc, time::Duration};

use crate::{Code, Connector, Decoder, Describer, Error, Inference, Prefiller, Shard};

/// Limits and timings of gRPC clients.
#[derive(Debug, Clone)]
pub struct GrpcOptions {
    /// Most connections kept; the one that was used least recently makes room.
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
pub struct GrpcConnector {}

impl GrpcConnector {
    /// An empty pool. Call it on a tokio runtime; its connections live there, whichever thread makes clients later.
    pub fn new(_options: GrpcOptions) -> Self {
        Self {}
    }
}

impl Connector for GrpcConnector {
    fn shard(&self, _address: &str) -> Result<Arc<dyn Shard>, Error> {
        Err(Error::new(Code::Unimplemented, "not yet"))
    }

    fn prefiller(&self, _address: &str) -> Result<Arc<dyn Prefiller>, Error> {
        Err(Error::new(Code::Unimplemented, "not yet"))
    }

    fn decoder(&self, _address: &str) -> Result<Arc<dyn Decoder>, Error> {
        Err(Error::new(Code::Unimplemented, "not yet"))
    }

    fn inference(&self, _address: &str) -> Result<Arc<dyn Inference>, Error> {
        Err(Error::new(Code::Unimplemented, "not yet"))
    }

    fn describer(&self, _address: &str) -> Result<Arc<dyn Describer>, Error> {
        Err(Error::new(Code::Unimplemented, "not yet"))
    }
}
