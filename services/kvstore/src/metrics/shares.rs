//! How tenants share the shard, at a scrape. Labels name what is shared, never a tenant: there may be any number of them.

use std::fmt;

use longshore_blocks::pool::{PoolStats, Resource, ResourceStats};
use longshore_chassis::{encode_counters, encode_gauges};
use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

/// Writes the gauges and counters of everything that is shared.
pub(super) fn encode(encoder: &mut DescriptorEncoder<'_>, stats: &PoolStats) -> Result<(), fmt::Error> {
    let help = "Tenants with views, streams or incomplete blocks";
    encode_gauges(encoder, [("tenants", help, stats.tenants)])?;
    let help = "Blocks dropped before their promise ended, because their tenant kept most";
    encode_counters(encoder, [("broken_promises", help, stats.broken_promises_total)])?;
    let taken = |share: &ResourceStats| gauge(share.taken);
    family(encoder, ("tenant_taken", "What all tenants take, by resource"), stats, taken)?;
    let most = |share: &ResourceStats| gauge(share.most);
    family(encoder, ("tenant_most", "The most that one tenant takes, by resource"), stats, most)?;
    let refused = |share: &ResourceStats| ConstCounter::new(share.refused_total);
    let help = "Refusals because one tenant would have taken too much, by resource";
    family(encoder, ("tenant_refused", help), stats, refused)
}

fn gauge(value: u64) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX))
}

fn family<M: EncodeMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help): (&str, &str),
    stats: &PoolStats,
    metric: impl Fn(&ResourceStats) -> M,
) -> Result<(), fmt::Error> {
    let kind = metric(&ResourceStats::default()).metric_type();
    let mut sample = encoder.encode_descriptor(name, help, None, kind)?;
    for (resource, share) in Resource::ALL.iter().zip(&stats.shares) {
        metric(share).encode(sample.encode_family(&[("resource", resource.name())])?)?;
    }
    Ok(())
}
