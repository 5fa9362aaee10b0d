//! What is seen of attention while a prompt is computed: times, and how much was visited.

use std::time::Duration;

use indicatif::ProgressBar;
use longshore_engine::{AttendTimes, AttentionProbe, Error, StepInput, StepObserver};
use longshore_model::Activations;

use super::pairs::Pairs;

/// Looks at the attention of one layer and step under a policy.
type Look<'a> = &'a mut dyn FnMut(&AttentionProbe<'_>);

/// Adds up what the engine tells.
#[derive(Default)]
pub(super) struct Watch<'a> {
    /// Attention in all, planning included.
    pub(super) attention: Duration,
    /// Planning alone.
    pub(super) planning: Duration,
    /// By layer and KV head; empty under `exact`.
    pub(super) heads: Vec<Vec<Pairs>>,
    /// Last hidden states of the rows that are kept.
    pub(super) hidden: Vec<Vec<f32>>,
    kept: &'a [u64],
    finished: u64,
    look: Option<Look<'a>>,
    bar: Option<(&'a ProgressBar, u64)>,
}

impl<'a> Watch<'a> {
    /// Also calls `look` for each layer and step.
    pub(super) fn looking(look: Look<'a>) -> Self {
        Self { look: Some(look), ..Self::default() }
    }

    /// Keeps the last hidden states of the rows at these positions, ascending; all logits must be wanted.
    #[must_use]
    pub(super) fn keeping(mut self, rows: &'a [u64]) -> Self {
        self.kept = rows;
        self
    }

    /// Moves `bar` by the tokens of each step, a layer at a time; `layers` in all.
    #[must_use]
    pub(super) fn telling(mut self, bar: &'a ProgressBar, layers: usize) -> Self {
        self.bar = Some((bar, layers as u64));
        self
    }

    /// Of all layers and heads.
    pub(super) fn pairs(&self) -> Pairs {
        let mut all = Pairs::default();
        self.heads.iter().flatten().for_each(|pairs| all.add(*pairs));
        all
    }
}

impl StepObserver for Watch<'_> {
    fn layer_done(&mut self, layer: usize, batch: &[StepInput<'_>]) -> Result<(), Error> {
        if let Some((bar, layers)) = self.bar {
            let tokens: u64 = batch.iter().map(|step| step.tokens.len() as u64).sum();
            let (layer, before) = (layer as u64 + 1, layer as u64);
            bar.inc(tokens * layer / layers - tokens * before / layers);
        }
        Ok(())
    }

    fn attended(&mut self, _layer: usize, times: &AttendTimes) {
        self.attention += times.plan + times.local + times.merge;
        self.planning += times.plan;
    }

    fn finished(&mut self, hidden: &Activations) -> Result<(), Error> {
        // On a GPU the rows are there; a device is waited for once a step here.
        for row in hidden.to_host()?.chunks_exact(hidden.width()) {
            if self.kept.binary_search(&self.finished).is_ok() {
                self.hidden.push(row.to_vec());
            }
            self.finished += 1;
        }
        Ok(())
    }

    fn probes(&self) -> bool {
        true
    }

    fn probe(&mut self, probe: &AttentionProbe<'_>) {
        let kv_heads = probe.work.kv_heads();
        if self.heads.len() <= probe.layer {
            self.heads.resize(probe.layer + 1, vec![Pairs::default(); kv_heads]);
        }
        for (kv_head, pairs) in self.heads[probe.layer].iter_mut().enumerate() {
            for tile in 0..probe.work.tiles() {
                pairs.add(Pairs::of(probe.work, &probe.plan, kv_head, tile));
            }
        }
        if let Some(look) = &mut self.look {
            look(probe);
        }
    }
}
