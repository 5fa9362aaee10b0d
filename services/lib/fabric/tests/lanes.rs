//! One body of checks for every lane, and what only the gRPC lane has.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by panicking")]

#[path = "lanes/attention.rs"]
mod attention;
#[path = "lanes/calls.rs"]
mod calls;
#[path = "lanes/fake.rs"]
mod fake;
#[path = "lanes/flood.rs"]
mod flood;
#[path = "lanes/forward.rs"]
mod forward;
#[path = "lanes/gpu.rs"]
mod gpu;
// What the binary puts between the fabric and the GPU half: no copy of it is tested, but itself.
#[path = "../../../longshore/src/cuda/lane.rs"]
mod gpu_lane;
#[path = "lanes/house.rs"]
mod house;
#[path = "lanes/liar.rs"]
mod liar;
#[path = "lanes/nccl.rs"]
mod nccl;
#[path = "lanes/nccl_attend.rs"]
mod nccl_attend;
#[path = "lanes/nccl_attend_lies.rs"]
mod nccl_attend_lies;
#[path = "lanes/nccl_hostile.rs"]
mod nccl_hostile;
#[path = "lanes/prompts.rs"]
mod prompts;
#[path = "lanes/raw.rs"]
mod raw;
#[path = "lanes/stories.rs"]
mod stories;
#[path = "lanes/tcp.rs"]
mod tcp;
#[path = "lanes/tcp_hostile.rs"]
mod tcp_hostile;
#[path = "lanes/tcp_lies.rs"]
mod tcp_lies;
#[path = "lanes/tiles.rs"]
mod tiles;
#[path = "lanes/wire.rs"]
mod wire;
