//! What a step does when a shard fails it: the stripes go on at other copies, and their attention is computed anew.

use std::sync::Arc;

use longshore_fabric::CallContext;

use super::{LayerAttention, Lost, Part};
use crate::{Engine, Error, StepInput, StepObserver};

/// How often the stripes of one layer may move to other copies.
const MOVES_MAX: usize = 4;

impl Engine {
    /// Attends anew for sequences whose shards failed, over other copies of their blocks, and writes their rows of `output`.
    pub(crate) fn attend_elsewhere(
        &self,
        (ctx, layer): (&CallContext, usize),
        batch: &mut [StepInput<'_>],
        (q, parts): (&[f32], &[Part]),
        (mut lost, failed): (Vec<Lost>, &mut Vec<Option<Error>>),
        output: &mut [f32],
        observer: &mut dyn StepObserver,
    ) -> Result<(), Error> {
        for _ in 0..MOVES_MAX {
            let moved = self.move_away(ctx, batch, &lost, failed);
            if moved.is_empty() {
                break;
            }
            let again: Vec<Part> = parts.iter().filter(|part| moved.contains(&part.input)).cloned().collect();
            let mut attention = LayerAttention::new(self, ctx, layer, &*batch, failed);
            attention.patient = true;
            let redone = attention.run(q, again.clone(), observer)?;
            lost = std::mem::take(&mut attention.lost);
            let width = output.len() / parts.last().map_or(1, |part| part.rows.end.max(1));
            for part in again {
                let rows = part.rows.start * width..part.rows.end * width;
                output[rows.clone()].copy_from_slice(&redone[rows]);
            }
        }
        Ok(())
    }

    /// Moves what lies on the shards that failed to other copies; tells whose sequences can go on.
    fn move_away(
        &self,
        ctx: &CallContext,
        batch: &mut [StepInput<'_>],
        lost: &[Lost],
        failed: &mut [Option<Error>],
    ) -> Vec<usize> {
        let mut moved = Vec::new();
        for (input, step) in batch.iter_mut().enumerate() {
            let own = || lost.iter().filter(|lost| lost.input == input);
            let shards: Vec<usize> = own().map(|lost| lost.shard).collect();
            let links = Arc::clone(step.sequence.links());
            if shards.is_empty() || links.rule().copies() == 1 {
                continue;
            }
            let leaving = async {
                let leaving =
                    tokio::time::timeout(self.options().attend_timeout, step.sequence.leave(ctx, &shards));
                leaving.await.unwrap_or(Err(Error::Broken("its copies did not open in time")))
            };
            match self.while_waiting(|| links.runtime().block_on(leaving)) {
                Ok(()) => {
                    failed[input] = None;
                    moved.push(input);
                }
                // Nobody said that they cannot answer: they are asked again, and waited for.
                Err(_) if own().all(|lost| lost.late) => {
                    failed[input] = None;
                    moved.push(input);
                }
                Err(error) => {
                    tracing::warn!(%error, "no other copy of a sequence's blocks can be read");
                    // What is missing on the last copy is computed again; that says more than why the first one failed.
                    if matches!(error, Error::Missing { .. }) {
                        failed[input] = Some(error);
                    }
                }
            }
        }
        moved
    }
}
