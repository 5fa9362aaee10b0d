//! Attention where the backend left its rows: queries and what comes of them stay on the device.

use std::time::Instant;

use longshore_attention::Queries;
use longshore_fabric::CallContext;
use longshore_model::{Activations, KeptPart, KeptVisits};

use super::{AttendTimes, LayerAttention, Part, sparse::with_plan};
use crate::{Engine, Error, StepInput, StepObserver, step::Behind};

/// One layer of a step, before its attention.
pub(crate) struct LayerTurn<'a, 'b> {
    pub(crate) ctx: &'a CallContext,
    pub(crate) layer: usize,
    /// Sequences that fail get their error here.
    pub(crate) failed: &'a mut Vec<Option<Error>>,
    /// Layers whose tiles are not written yet, this one the last of them.
    pub(crate) behind: &'a mut Behind<'b>,
}

impl Engine {
    /// Attention of a layer, f32 `[rows, query_heads * head_dim]`; where a shard is asked, or no executor is on the backend's device, with queries
    /// of the host. Tiles are written first where anything here reads them.
    pub(crate) fn attend_layer(
        &self,
        turn: LayerTurn<'_, '_>,
        batch: &mut [StepInput<'_>],
        (q, parts): (&Activations, Vec<Part>),
        observer: &mut dyn StepObserver,
    ) -> Result<Activations, Error> {
        let LayerTurn { ctx, layer, failed, behind } = turn;
        if !observer.probes() && self.may_stay(batch, q, &parts) {
            // Policies read summaries, which are made of tiles where the device has not made them.
            let lacks_means = |part: &Part| {
                batch[part.input].sequence.prefill().is_some() && !behind.has_means(layer, part.input)
            };
            if !behind.has_pages(layer) || parts.iter().any(lacks_means) {
                self.settle(behind, 0, batch, observer)?;
            }
            let started = Instant::now();
            if let Some(output) = self.attend_kept(layer, batch, (q, &parts), behind)? {
                let times = AttendTimes { local: started.elapsed(), ..AttendTimes::default() };
                observer.attended(layer, &times);
                return Ok(output);
            }
        }
        // Keys and values were on their way before: with the queries they are here.
        let (width, q) = (q.width(), q.to_host()?);
        self.settle(behind, 0, batch, observer)?;
        let mut attention = LayerAttention::new(self, ctx, layer, &*batch, failed);
        let mut output = attention.run(&q, parts.clone(), observer)?;
        observer.attended(layer, &attention.times);
        let lost = std::mem::take(&mut attention.lost);
        let of = (&*q, &*parts);
        self.attend_elsewhere((ctx, layer), batch, of, (lost, failed), &mut output, observer)?;
        Ok(Activations::from_host(width, output))
    }

    /// Whether an executor on the device of the rows could take them: all that they visit is here.
    fn may_stay(&self, batch: &[StepInput<'_>], q: &Activations, parts: &[Part]) -> bool {
        let sequence = |part: &Part| &*batch[part.input].sequence;
        let is_here = |part: &Part| {
            let sequence = sequence(part);
            sequence.remote_blocks() == 0 && sequence.answer_from().is_none()
        };
        // A prompt by a policy is computed alone.
        let alone = parts.len() == 1 || parts.iter().all(|part| sequence(part).prefill().is_none());
        self.kept.is_some()
            && q.on_device().is_some()
            && !parts.is_empty()
            && parts.iter().all(is_here)
            && alone
    }

    /// `None`: with queries of the host.
    fn attend_kept(
        &self,
        layer: usize,
        batch: &[StepInput<'_>],
        (q, parts): (&Activations, &[Part]),
        behind: &Behind<'_>,
    ) -> Result<Option<Activations>, Error> {
        let Some(kept) = &self.kept else { return Ok(None) };
        let sequence = |part: &Part| &*batch[part.input].sequence;
        let config = self.backend().config();
        let (heads, scale) = (config.heads, config.attention_scale());
        if let [part] = parts
            && let Some(prefill) = sequence(part).prefill()
        {
            let queries = Queries { shape: heads, first_position: part.first_position, scale, data: &[] };
            return with_plan(sequence(part), prefill, layer, queries, |input| {
                let promised = behind.promised(layer, part.input);
                let visits = KeptVisits::By { policy: &prefill.policy, input, promised };
                let part = KeptPart { rows: part.rows.clone(), first_position: part.first_position, visits };
                Ok(kept.attend_kept((heads, scale), q, &[part])?)
            });
        }
        let tiles: Vec<_> = parts.iter().map(|part| sequence(part).layer(layer)).collect();
        let all = parts.iter().zip(&tiles).map(|(part, kv)| KeptPart {
            rows: part.rows.clone(),
            first_position: part.first_position,
            visits: KeptVisits::All { kv, first_key: 0, promised: behind.promised(layer, part.input).tiles },
        });
        Ok(kept.attend_kept((heads, scale), q, &all.collect::<Vec<_>>())?)
    }
}
