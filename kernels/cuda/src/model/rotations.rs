//! Rotations of the rows of recent calls, on the device: all layers of a step ask for the same positions. Angles are the CPU's, in f64, so
//! that they are exact at any position.

use std::sync::{Arc, Mutex, PoisonError};

use longshore_model::Rope;

use super::compute::Compute;
use crate::{Buffer, Error};

/// Steps that are remembered; as many callers as there may be at once without computing anew.
const STEPS: usize = 4;

/// Positions of some rows, and f32 `[rows, 2, dim / 2]`: cosines, then sines, of each.
type Step = (Vec<u64>, Arc<Buffer>);

/// The rotations of the last few distinct lists of positions, the latest last.
#[derive(Debug, Default)]
pub(super) struct Rotations {
    steps: Mutex<Vec<Step>>,
}

impl Rotations {
    /// The table of some positions.
    pub(super) fn at(&self, compute: &Compute, rope: &Rope, positions: &[u64]) -> Result<Arc<Buffer>, Error> {
        let lock = || self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, known)) = lock().iter().find(|(known, _)| known == positions) {
            return Ok(Arc::clone(known));
        }
        let mut table = Vec::with_capacity(positions.len() * 2 * rope.frequencies().len());
        for position in positions {
            let rotation = rope.at(*position);
            table.extend_from_slice(rotation.cos());
            table.extend_from_slice(rotation.sin());
        }
        let table = Arc::new(Buffer::from_slice(&compute.device, &table)?);
        let mut steps = lock();
        if steps.len() == STEPS {
            steps.remove(0);
        }
        steps.push((positions.to_vec(), Arc::clone(&table)));
        Ok(table)
    }
}
