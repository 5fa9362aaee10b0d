//! Figures that are told at a scrape, by a collector that knows them then.

use std::fmt;

use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

/// Name, help and value.
pub type Figure = (&'static str, &'static str, u64);

/// Writes gauges; values beyond i64 are its largest.
pub fn encode_gauges(
    encoder: &mut DescriptorEncoder<'_>,
    figures: impl IntoIterator<Item = Figure>,
) -> fmt::Result {
    let gauge = |value: u64| ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
    encode(encoder, figures, gauge)
}

/// Writes counters.
pub fn encode_counters(
    encoder: &mut DescriptorEncoder<'_>,
    figures: impl IntoIterator<Item = Figure>,
) -> fmt::Result {
    encode(encoder, figures, ConstCounter::<u64>::new)
}

fn encode<M: EncodeMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    figures: impl IntoIterator<Item = Figure>,
    metric: impl Fn(u64) -> M,
) -> fmt::Result {
    for (name, help, value) in figures {
        let metric = metric(value);
        let sample = encoder.encode_descriptor(name, help, None, metric.metric_type())?;
        metric.encode(sample)?;
    }
    Ok(())
}
