//! Measurements of running endpoints.

mod serve;
mod statistics;

pub(crate) use serve::serve;
