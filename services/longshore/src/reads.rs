//! Which copies of blocks workers read, as it is at the moment of a scrape.

use std::fmt;

use longshore_chassis::Metrics;
use longshore_engine::ReadCounts;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::counter::ConstCounter,
};

/// Prefix of every name.
const PREFIX: &str = "longshore_engine";

/// Tells what decided which copies a worker reads.
pub(crate) fn report(metrics: &Metrics, reads: &ReadCounts) {
    let reads = Reads(reads.clone());
    metrics.sub(PREFIX).with(|registry| registry.register_collector(Box::new(reads)));
}

#[derive(Debug)]
struct Reads(ReadCounts);

impl Collector for Reads {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "Searches for who reads a stripe, by what decided which of its copies is asked first";
        let kind = ConstCounter::new(0_u64).metric_type();
        let mut family = encoder.encode_descriptor("reads", help, None, kind)?;
        for (name, count) in self.0.each() {
            ConstCounter::new(count).encode(family.encode_family(&[("decided_by", name)])?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_decision_has_a_line() {
        let (metrics, reads) = (Metrics::new(), ReadCounts::default());
        report(&metrics.labelled("member", "decode-0"), &reads);
        let text = metrics.encode();
        for (name, count) in reads.each() {
            let line =
                format!("longshore_engine_reads_total{{decided_by=\"{name}\",member=\"decode-0\"}} {count}");
            let other =
                format!("longshore_engine_reads_total{{member=\"decode-0\",decided_by=\"{name}\"}} {count}");
            assert!(text.contains(&line) || text.contains(&other), "{line} in {text}");
        }
    }
}
