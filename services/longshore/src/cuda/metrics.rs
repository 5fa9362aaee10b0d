//! What attention on a GPU did so far, as it is at the moment of a scrape.

use std::{fmt, sync::Arc};

use longshore_chassis::{Figure, Metrics, encode_counters, encode_gauges};
use longshore_cuda::{CudaExecutor, ExecutorStats, Shortage};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::counter::ConstCounter,
};

use crate::node::Node;

/// Prefix of every name.
const PREFIX: &str = "longshore_cuda";

/// Tells what the executor of a node's GPU does; nothing where it has none.
pub(crate) fn report(metrics: &Metrics, node: &Node) {
    if let Some(gpu) = &node.gpu {
        register(metrics, Arc::clone(gpu));
    }
}

fn register(metrics: &Metrics, gpu: Arc<CudaExecutor>) {
    metrics.sub(PREFIX).with(|registry| registry.register_collector(Box::new(Attention { gpu })));
}

#[derive(Debug)]
struct Attention {
    gpu: Arc<CudaExecutor>,
}

impl Collector for Attention {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let stats = self.gpu.stats();
        encode_gauges(&mut encoder, gauges(&stats))?;
        encode_counters(&mut encoder, counters(&stats))?;
        encode_fallbacks(&mut encoder, &stats)
    }
}

/// Calls that the CPU did, by what the GPU lacked.
fn encode_fallbacks(encoder: &mut DescriptorEncoder<'_>, stats: &ExecutorStats) -> fmt::Result {
    let help = "Calls of attention that the CPU did because the GPU had no room for them";
    let of = |shortage: Shortage| ConstCounter::new(stats.fallbacks.of(shortage));
    let kind = of(Shortage::Memory).metric_type();
    let mut family = encoder.encode_descriptor("fallbacks", help, None, kind)?;
    for shortage in Shortage::ALL {
        of(shortage).encode(family.encode_family(&[("reason", shortage.name())])?)?;
    }
    Ok(())
}

fn gauges(stats: &ExecutorStats) -> [Figure; 2] {
    [
        ("pages", "Tiles of which the GPU has a copy", stats.pages.pages as u64),
        ("page_bytes", "Bytes of GPU memory taken for copies of tiles", stats.pages.reserved_bytes as u64),
    ]
}

fn counters(stats: &ExecutorStats) -> [Figure; 13] {
    [
        ("page_hits", "Tiles that were attended to and had a copy", stats.pages.hits),
        (
            "page_misses",
            "Tiles that were copied to the GPU, or whose pages were begun there",
            stats.pages.misses,
        ),
        ("page_evictions", "Copies that made way", stats.pages.evictions),
        ("page_shortages", "Times that there was room for fewer copies than wanted", stats.pages.shortages),
        (
            "page_returns",
            "Times that memory of copies was given back for something else",
            stats.pages.returned,
        ),
        ("launches", "Kernels queued by attention", stats.launches),
        ("uploaded_bytes", "Bytes that attention brought to the GPU", stats.uploaded_bytes),
        ("downloaded_bytes", "Bytes of results of attention", stats.downloaded_bytes),
        ("waits", "Times that attention waited for the GPU", stats.waits),
        (
            "to_lists",
            "Calls by lists of the host that would have stayed on the GPU, had it had memory and pages",
            stats.to_lists,
        ),
        (
            "refused_appends",
            "Times that keys and values became no pages on the GPU, for want of memory or pages: they go up as tiles",
            stats.refused_appends,
        ),
        ("refused_means", "The same of means of blocks", stats.refused_means),
        (
            "refused_departures",
            "Copies to the host that could not be begun ahead, for want of pinned memory: they are waited for",
            stats.refused_departures,
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_has_a_name_of_its_own_and_its_value() {
        let mut stats = ExecutorStats {
            launches: 8,
            uploaded_bytes: 9,
            downloaded_bytes: 10,
            waits: 11,
            to_lists: 12,
            refused_appends: 13,
            refused_means: 14,
            refused_departures: 15,
            ..Default::default()
        };
        (stats.pages.pages, stats.pages.reserved_bytes) = (1, 2);
        (stats.pages.hits, stats.pages.misses) = (3, 4);
        (stats.pages.evictions, stats.pages.shortages, stats.pages.returned) = (5, 6, 7);
        let all: Vec<_> = gauges(&stats).into_iter().chain(counters(&stats)).collect();
        let values: Vec<u64> = all.iter().map(|(_, _, value)| *value).collect();
        assert_eq!(values, (1..=15).collect::<Vec<_>>());
        let mut names: Vec<_> = all.iter().map(|(name, _, _)| *name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all.len());
    }
}
