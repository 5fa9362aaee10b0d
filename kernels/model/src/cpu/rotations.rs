//! Rotations of the rows of recent calls: all layers of a step ask for the same positions, and sines in f64 cost more than the
//! rotation itself.

use std::sync::{Arc, Mutex, PoisonError};

use crate::rope::{Rope, Rotation};

/// Steps that are remembered; as many callers as there may be at once without computing anew.
const STEPS: usize = 4;

/// Positions of some rows, and their rotations.
type Step = (Vec<u64>, Arc<[Rotation]>);

/// The rotations of the last few distinct lists of positions, the latest last.
#[derive(Debug, Default)]
pub(super) struct Rotations {
    steps: Mutex<Vec<Step>>,
}

impl Rotations {
    /// One rotation for each position.
    pub(super) fn at(&self, rope: &Rope, positions: &[u64]) -> Arc<[Rotation]> {
        let lock = || self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, known)) = lock().iter().find(|(known, _)| known == positions) {
            return Arc::clone(known);
        }
        let rotations: Arc<[Rotation]> = positions.iter().map(|position| rope.at(*position)).collect();
        let mut steps = lock();
        if steps.len() == STEPS {
            steps.remove(0);
        }
        steps.push((positions.to_vec(), Arc::clone(&rotations)));
        rotations
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RopeConfig, RopeScaling, RopeStyle};

    #[test]
    fn remembered_rotations_are_those_of_the_positions() {
        let config = RopeConfig { style: RopeStyle::Halves, theta: 1e4, dim: 8, scaling: RopeScaling::None };
        let (rope, rotations) = (Rope::new(&config).unwrap(), Rotations::default());
        for step in [0u64, 1, 0, 2, 3, 4, 5, 0, 1] {
            let positions: Vec<u64> = (0..=step).map(|i| step * 1_000_003 + i).collect();
            let expected: Vec<Rotation> = positions.iter().map(|position| rope.at(*position)).collect();
            assert_eq!(*rotations.at(&rope, &positions), *expected);
        }
        assert_eq!(rotations.steps.lock().unwrap().len(), STEPS);
    }
}
