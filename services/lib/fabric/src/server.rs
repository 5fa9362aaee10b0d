//! gRPC servers: listeners with health, reflection, limits and graceful shutdown.

use std::{sync::Arc, time::Duration};

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{Decoder, Describer, Error, Inference, Prefiller, Shard};

/// Limits and timings of one gRPC listener.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Largest message of internal services, in either direction.
    pub message_bytes_max: usize,
    /// Largest message of `InferenceService`, in either direction.
    pub inference_message_bytes_max: usize,
    /// Most connections; later ones are closed at once.
    pub connections_max: usize,
    /// Most calls at a time on one connection.
    pub streams_max: u32,
    /// HTTP/2 flow-control window of one stream.
    pub stream_window_bytes: u32,
    /// HTTP/2 flow-control window of one connection.
    pub connection_window_bytes: u32,
    /// Largest HTTP/2 frame.
    pub frame_bytes_max: u32,
    /// Silence after which the peer is pinged.
    pub keepalive_interval: Duration,
    /// How long the peer may take to answer a ping before its connection counts as dead.
    pub keepalive_timeout: Duration,
    /// How long calls may go on after the shutdown started.
    pub drain_timeout: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            message_bytes_max: 16 << 20,
            inference_message_bytes_max: 4 << 20,
            connections_max: 1024,
            streams_max: 1024,
            stream_window_bytes: 4 << 20,
            connection_window_bytes: 16 << 20,
            frame_bytes_max: 256 << 10,
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(20),
        }
    }
}

/// What a listener serves. Health and reflection are always there.
#[derive(Debug)]
pub struct Services {}

/// Switches the readiness of a listener, as `grpc.health.v1` tells it.
#[derive(Debug, Clone)]
pub struct Readiness {}

impl Services {
    /// Nothing but health and reflection.
    pub fn new(_options: ServerOptions) -> Self {
        Self {}
    }

    /// Serves `KvStoreService`.
    pub fn shard(self, _shard: Arc<dyn Shard>) -> Self {
        self
    }

    /// Serves `PrefillService`.
    pub fn prefiller(self, _prefiller: Arc<dyn Prefiller>) -> Self {
        self
    }

    /// Serves `DecodeService`.
    pub fn decoder(self, _decoder: Arc<dyn Decoder>) -> Self {
        self
    }

    /// Serves `InferenceService`.
    pub fn inference(self, _inference: Arc<dyn Inference>) -> Self {
        self
    }

    /// Serves `ClusterService`.
    pub fn describer(self, _describer: Arc<dyn Describer>) -> Self {
        self
    }

    /// The switch of `readiness` and of every service's health; ready until told otherwise.
    pub fn readiness(&self) -> Readiness {
        Readiness {}
    }
}

impl Readiness {
    /// Serving or not; `liveness` stays as it is.
    pub fn set(&self, _ready: bool) {}
}

/// Serves until `shutdown` fires and the calls under way ended, at most for the drain timeout after that.
pub async fn serve(
    _listener: TcpListener,
    _services: Services,
    _shutdown: CancellationToken,
) -> Result<(), Error> {
    Ok(())
}
