//! Lanes between processes: one trait per service, implemented by the service itself (`local` lane) and by gRPC clients
//! (`grpc` lane); attention streams, channel pools, deadlines. Callers cannot tell the lanes apart.

mod api;
pub mod baseline;
mod context;
mod error;
mod grpc;
mod lane;
mod link;
mod local;
pub mod nccl;
pub mod server;
mod shm;
pub mod status;
mod tcp;
mod tiles;

pub use api::{BoxStream, Connector, Decoder, Describer, Inference, Prefiller, Shard};
pub use context::{CallContext, Lane};
pub use error::{Code, Error};
pub use grpc::{GrpcConnector, GrpcOptions};
pub use link::{AttendLink, PendingAttend, StripePartial};
pub use local::{AnyConnector, LocalConnector};
pub use tcp::{TcpPatience, TileRooms, TileTraffic};
pub use tiles::PART_REFUSED;
