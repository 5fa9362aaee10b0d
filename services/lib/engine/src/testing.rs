//! What tests of the engine and of the workers need: a tiny model, shards in memory with faults to order, and a cluster of
//! them.

mod cluster;
mod faults;
mod model;
mod shard;
mod sparse;

pub use cluster::{TestCluster, reference_tiles};
pub use faults::Faults;
pub use model::{TinyModel, tokens};
pub use shard::{Bodies, MemoryShard};
