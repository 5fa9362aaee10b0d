//! How many wait for a turn, at a scrape. Labels name what they wait for, never a tenant.

use std::fmt;

use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::gauge::ConstGauge,
};

use crate::store::Store;

/// Writes the length of each queue.
pub(super) fn encode(encoder: &mut DescriptorEncoder<'_>, store: &Store) -> Result<(), fmt::Error> {
    let help = "Pieces of work that wait for a thread, by kind";
    let gauge = |count: usize| ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
    let mut family = encoder.encode_descriptor("waiting_turns", help, None, gauge(0).metric_type())?;
    for (kind, turns) in store.all_turns() {
        gauge(turns.waiting()).encode(family.encode_family(&[("kind", kind)])?)?;
    }
    Ok(())
}
