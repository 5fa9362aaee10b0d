//! Limits and timings of one gRPC listener.

use std::{sync::Arc, time::Duration};

use crate::{TcpPatience, nccl::GpuLanes};

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
    /// HTTP/2 flow-control window of one stream: what a client may send ahead of a busy service.
    pub stream_window_bytes: u32,
    /// HTTP/2 flow-control window of one connection.
    pub connection_window_bytes: u32,
    /// Memory that each connection of the `shm` lane gets for what it sends, a multiple of 2 MiB; 0 offers no such lane.
    pub shm_arena_bytes: usize,
    /// Most connections of the `tcp` lane, open ones and those that were offered; 0 offers no such lane.
    pub tcp_connections_max: usize,
    /// Port of the `tcp` lane, at the address of the listener; 0: any that is free.
    pub tcp_port: u16,
    /// How long the `tcp` lane waits for peers. A tile that comes as a message may take the time of a write there.
    pub tcp_patience: TcpPatience,
    /// What makes the shard's ends of the lane `nccl`; without it there is no such lane.
    pub nccl: Option<Arc<dyn GpuLanes>>,
    /// Most ends of the lane `nccl`: each has a thread, and in an epoch a communicator on the GPU. A gRPC connection may have half of them.
    /// A client has three by default, so that there are enough for eight.
    pub nccl_members_max: usize,
    /// Bytes of tiles that all streams may have under way, those included that HTTP/2 may hold unread for them. A stream has at most its
    /// window, or one tile.
    pub tile_bytes_max: usize,
    /// The same for all streams of one tenant. On every connection, its streams count with what HTTP/2 may hold unread for them alone.
    pub tenant_tile_bytes_max: usize,
    /// The same for all streams of one connection.
    pub peer_tile_bytes_max: usize,
    /// How long a tile waits until others leave room for it, before its stream is refused.
    pub tile_room_patience: Duration,
    /// How long an answer may wait for its reader, who leaves its window closed, before its connection is closed; none: for ever. Services
    /// end streams whose readers take nothing earlier, so that a reader that comes back learns why.
    pub unread_patience: Option<Duration>,
    /// Largest HTTP/2 frame.
    pub frame_bytes_max: u32,
    /// Largest list of headers of one call.
    pub header_bytes_max: u32,
    /// Silence after which the peer is pinged.
    pub keepalive_interval: Duration,
    /// How long the peer may take to answer a ping before its connection counts as dead.
    pub keepalive_timeout: Duration,
    /// How long calls may go on after the shutdown started; later ones are cut off.
    pub drain_timeout: Duration,
}

impl ServerOptions {
    /// For listeners that clients reach: small windows, because anybody may open many connections.
    pub fn front() -> Self {
        Self {
            stream_window_bytes: 256 << 10,
            connection_window_bytes: 1 << 20,
            shm_arena_bytes: 0,
            tcp_connections_max: 0,
            nccl: None,
            // Proxies have many users on a connection.
            unread_patience: None,
            ..Self::default()
        }
    }
}

impl Default for ServerOptions {
    /// For listeners inside the cluster: windows that keep tiles flowing.
    fn default() -> Self {
        Self {
            message_bytes_max: 16 << 20,
            inference_message_bytes_max: 4 << 20,
            connections_max: 1024,
            streams_max: 1024,
            stream_window_bytes: 8 << 20,
            connection_window_bytes: 16 << 20,
            shm_arena_bytes: 32 << 20,
            tcp_connections_max: 1024,
            tcp_port: 0,
            tcp_patience: TcpPatience::default(),
            nccl: None,
            nccl_members_max: 24,
            tile_bytes_max: 2 << 30,
            tenant_tile_bytes_max: 3 << 29,
            peer_tile_bytes_max: 1 << 30,
            tile_room_patience: Duration::from_secs(5),
            unread_patience: Some(Duration::from_secs(240)),
            frame_bytes_max: 1 << 20,
            header_bytes_max: 16 << 10,
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(20),
        }
    }
}
