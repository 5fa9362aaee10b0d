//! The commands against real shards over gRPC in this process.

mod blocks;
mod drains;
mod finding;
mod house;
mod upkeep;
