//! How tenants share the shard, at a scrape. Labels name what is shared, never a tenant: there may be any number of them.

use std::fmt;

use longshore_blocks::pool::{PoolStats, Resource, ResourceStats};
use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

/// Writes the gauges and counters of everything that is shared.
pub(super) fn encode(encoder: &mut DescriptorEncoder<'_>, stats: &PoolStats) -> Result<(), fmt::Error> {
    let tenants = gauge(stats.tenants);
    let help = "Tenants with views, streams or incomplete blocks";
    tenants.encode(encoder.encode_descriptor("tenants", help, None, tenants.metric_type())?)?;
    let broken = ConstCounter::new(stats.broken_promises_total);
    let help = "Blocks dropped before their promise ended, because their tenant kept most";
    broken.encode(encoder.encode_descriptor("broken_promises", help, None, broken.metric_type())?)?;
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
