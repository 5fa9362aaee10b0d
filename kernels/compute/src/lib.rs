//! What all CPU kernels share: the compute pool of a process, the instruction set that it chose, and memory in huge pages.
//! Knows no network, no clock, no async.

mod error;
mod instruction_set;
pub mod peak;
mod pool;
mod slab;
mod slice;

pub use error::{Error, Kind};
pub use instruction_set::InstructionSet;
pub use pool::{ComputePool, Held, PoolOptions};
pub use slab::{SlabArray, SlabBuffer};
pub use slice::DisjointSlice;
