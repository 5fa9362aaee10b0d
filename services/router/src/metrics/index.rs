//! Counters of the index that follows the shards' inventories.

use longshore_chassis::Metrics;
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};

/// Counters of the index; clones share them.
#[derive(Debug, Clone, Default)]
pub struct IndexMetrics {
    /// Namespaces that are followed.
    pub namespaces: Gauge,
    /// Pairs of namespace and shard whose blocks are known.
    pub current: Gauge,
    /// Blocks, counted once for each shard that holds them.
    pub blocks: Gauge,
    /// Blocks that came to shards, as they told it.
    pub stored: Counter,
    /// Blocks that went from shards, as they told it.
    pub gone: Counter,
    /// Times that a shard's blocks were told anew.
    pub resets: Counter,
    /// Times that what a shard told did not follow what it told before.
    pub out_of_step: Counter,
    /// Times that there was no room for a shard's blocks.
    pub full: Counter,
    /// Keys that no shard was asked for because none holds them.
    pub spared_keys: Counter,
    /// Lookups that found more than the index knew of.
    pub behind: Counter,
    /// Lookups that found less than the index knew of.
    pub ahead: Counter,
}

impl IndexMetrics {
    pub(super) fn register(&self, to: &Metrics) {
        let gauges = [
            ("index_namespaces", "Namespaces whose blocks are followed", &self.namespaces),
            ("index_current", "Pairs of namespace and shard whose blocks are known", &self.current),
            ("index_blocks", "Blocks in the index, once for each shard that holds them", &self.blocks),
        ];
        gauges.into_iter().for_each(|(name, help, gauge)| to.register(name, help, gauge.clone()));
        let counters = [
            ("index_stored", "Blocks that came to shards, as they told it", &self.stored),
            ("index_gone", "Blocks that went from shards, as they told it", &self.gone),
            ("index_resets", "Times that the blocks of a shard were told anew", &self.resets),
            ("index_out_of_step", "Times that a shard told what does not follow", &self.out_of_step),
            ("index_full", "Times that there was no room for the blocks of a shard", &self.full),
            ("index_spared_keys", "Keys that shards were not asked for", &self.spared_keys),
            ("index_behind", "Lookups that found more than the index knew of", &self.behind),
            ("index_ahead", "Lookups that found less than the index knew of", &self.ahead),
        ];
        counters.into_iter().for_each(|(name, help, counter)| to.register(name, help, counter.clone()));
    }
}
