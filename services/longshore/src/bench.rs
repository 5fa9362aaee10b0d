//! Measurements: of running endpoints, and of what this machine computes.

mod compute;
mod cuda;
mod noise;
mod noise_shard;
mod prefill;
mod runner;
mod serve;
mod statistics;
mod store;
mod trace;

pub(crate) use compute::compute;
pub(crate) use cuda::cuda;
pub(crate) use prefill::prefill;
pub(crate) use serve::serve;
pub(crate) use store::store;
pub(crate) use trace::trace;
