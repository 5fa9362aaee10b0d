//! Floating-point weights in panels of 16 outputs, in the precision of the file.

use bytemuck::Pod;
use half::{bf16, f16};
use longshore_compute::{ComputePool, SlabArray};

use super::kernel::Loads;
use super::panels::PANEL;

/// A stored floating-point element.
pub(super) trait Stored: Loads + Pod + Default + Send + Sync + 'static {
    fn to_f32(self) -> f32;
}

impl Stored for f32 {
    fn to_f32(self) -> f32 {
        self
    }
}

impl Stored for f16 {
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}

impl Stored for bf16 {
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}

/// A matrix `[outputs, inputs]`, packed `[ceil(outputs / 16)][inputs][16]`; outputs past the end are zero.
pub(super) struct FloatPanels<E> {
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    weights: SlabArray<[E; PANEL]>,
}

impl<E: Stored> FloatPanels<E> {
    /// Packs a matrix whose rows `row(output, out)` reads, in parallel. `None` when a number is not finite.
    pub(super) fn pack(
        pool: &ComputePool,
        outputs: usize,
        inputs: usize,
        row: impl Fn(usize, &mut [E]) + Sync,
    ) -> Option<Self> {
        let mut weights = SlabArray::<[E; PANEL]>::zeroed(outputs.div_ceil(PANEL) * inputs);
        let finite = std::sync::atomic::AtomicBool::new(true);
        pool.run_chunks(&mut weights[..], inputs, |panel, lanes| {
            let mut values = vec![E::default(); inputs];
            for output in panel * PANEL..outputs.min((panel + 1) * PANEL) {
                row(output, &mut values);
                for (lane, value) in lanes.iter_mut().zip(&values) {
                    lane[output % PANEL] = *value;
                }
                if !values.iter().all(|value| value.to_f32().is_finite()) {
                    finite.store(false, std::sync::atomic::Ordering::Relaxed);
                }
            }
        });
        finite.into_inner().then_some(Self { outputs, inputs, weights })
    }

    /// The panel with this index, `[inputs][16]`.
    pub(super) fn panel(&self, panel: usize) -> &[[E; PANEL]] {
        &self.weights[panel * self.inputs..][..self.inputs]
    }

    /// Weights of one output, f32 `[inputs]`.
    pub(super) fn row(&self, output: usize, row: &mut [f32]) {
        for (weight, lane) in row.iter_mut().zip(self.panel(output / PANEL)) {
            *weight = lane[output % PANEL].to_f32();
        }
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> u64 {
        size_of_val(&*self.weights) as u64
    }
}
