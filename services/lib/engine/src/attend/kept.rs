//! Attention where the backend left its rows: queries and what comes of them stay on the device.

use std::time::Instant;

use longshore_attention::Queries;
use longshore_fabric::CallContext;
use longshore_model::{Activations, KeptPart, KeptVisits};

use super::{AttendTimes, LayerAttention, Part, sparse::with_plan};
use crate::{Engine, Error, StepInput, StepObserver};

impl Engine {
    /// Attention of a layer, f32 `[rows, query_heads * head_dim]`; where a shard is asked, or no executor is on the backend's device, with queries
    /// of the host.
    pub(crate) fn attend_layer(
        &self,
        (ctx, layer): (&CallContext, usize),
        batch: &mut [StepInput<'_>],
        (q, parts): (&Activations, Vec<Part>),
        failed: &mut Vec<Option<Error>>,
        observer: &mut dyn StepObserver,
    ) -> Result<Activations, Error> {
        let started = Instant::now();
        if !observer.probes()
            && let Some(output) = self.attend_kept(layer, batch, q, &parts)?
        {
            observer.attended(layer, &AttendTimes { local: started.elapsed(), ..AttendTimes::default() });
            return Ok(output);
        }
        let (width, q) = (q.width(), q.to_host()?);
        let mut attention = LayerAttention::new(self, ctx, layer, &*batch, failed);
        let mut output = attention.run(&q, parts.clone(), observer)?;
        observer.attended(layer, &attention.times);
        let lost = std::mem::take(&mut attention.lost);
        let of = (&*q, &*parts);
        self.attend_elsewhere((ctx, layer), batch, of, (lost, failed), &mut output, observer)?;
        Ok(Activations::from_host(width, output))
    }

    /// `None`: with queries of the host.
    fn attend_kept(
        &self,
        layer: usize,
        batch: &[StepInput<'_>],
        q: &Activations,
        parts: &[Part],
    ) -> Result<Option<Activations>, Error> {
        let Some(kept) = self.kept.as_ref().filter(|_| q.on_device().is_some()) else { return Ok(None) };
        let sequence = |part: &Part| &*batch[part.input].sequence;
        let is_here = |part: &Part| {
            let sequence = sequence(part);
            sequence.remote_blocks() == 0 && sequence.answer_from().is_none()
        };
        if parts.is_empty() || !parts.iter().all(is_here) {
            return Ok(None);
        }
        let config = self.backend().config();
        let (heads, scale) = (config.heads, config.attention_scale());
        // A prompt is computed alone.
        if let [part] = parts
            && let Some(prefill) = sequence(part).prefill()
        {
            let queries = Queries { shape: heads, first_position: part.first_position, scale, data: &[] };
            return with_plan(sequence(part), prefill, layer, queries, |input| {
                let visits = KeptVisits::By { policy: &prefill.policy, input };
                let part = KeptPart { rows: part.rows.clone(), first_position: part.first_position, visits };
                Ok(kept.attend_kept((heads, scale), q, &[part])?)
            });
        }
        if parts.iter().any(|part| sequence(part).prefill().is_some()) {
            return Ok(None);
        }
        let tiles: Vec<_> = parts.iter().map(|part| sequence(part).layer(layer)).collect();
        let all = parts.iter().zip(&tiles).map(|(part, kv)| KeptPart {
            rows: part.rows.clone(),
            first_position: part.first_position,
            visits: KeptVisits::All { kv, first_key: 0 },
        });
        Ok(kept.attend_kept((heads, scale), q, &all.collect::<Vec<_>>())?)
    }
}
