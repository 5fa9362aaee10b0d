//! Measurements: of running endpoints, and of what this machine computes.

mod compute;
mod serve;
mod statistics;

pub(crate) use compute::compute;
pub(crate) use serve::serve;
