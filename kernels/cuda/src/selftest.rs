//! Comparisons of the device with the CPU, written once for every [`Device`]: tests run them on the emulator, `longshore cuda selftest`
//! on a GPU.

mod append;
mod decode;
mod decode_cases;
mod executor;
mod greedy;
mod material;
mod pages;
mod plan;
mod prefill;
mod prefill_cases;
mod recorded;
mod select;
mod select_cases;
mod tile;
mod tile_cases;
mod visits;
mod walk;

use std::sync::Arc;

pub use greedy::Greedy;
pub use recorded::{record, recorded, recorded_cases, recorded_cases_of};
pub(crate) use walk::{Walk, likeliest};

use crate::{Device, Error, model};

type Run = dyn Fn(&Arc<dyn Device>) -> Result<f64, Error> + Send + Sync;

/// One comparison.
pub struct Case {
    /// What is compared.
    pub name: String,
    /// Largest error that is right.
    pub limit: f64,
    /// Compute capability of the only devices that it is for; `None`: of all.
    pub capability: Option<u32>,
    run: Box<Run>,
}

impl Case {
    pub(crate) fn new(
        name: impl Into<String>,
        limit: f64,
        run: impl Fn(&Arc<dyn Device>) -> Result<f64, Error> + Send + Sync + 'static,
    ) -> Self {
        Self { name: name.into(), limit, capability: None, run: Box::new(run) }
    }

    pub(crate) fn only_on(self, capability: u32) -> Self {
        Self { capability: Some(capability), ..self }
    }

    /// Runs it: the error that was found, a relative L2 distance or a count of what differs.
    pub fn run(&self, device: &Arc<dyn Device>) -> Result<f64, Error> {
        (self.run)(device)
    }
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Case").field("name", &self.name).field("limit", &self.limit).finish_non_exhaustive()
    }
}

/// Comparisons of the forward pass, pages, decode attention, merges, selection and summaries, prefill attention.
pub fn cases() -> Vec<Case> {
    let attention = [decode_cases::cases(), prefill_cases::cases()];
    let parts = [model::checks::cases(), tile_cases::cases(), select_cases::cases()];
    parts.into_iter().chain(attention).flatten().collect()
}

/// Comparisons of the executor: whole calls over tiles of the host.
pub fn executor_cases() -> Vec<Case> {
    executor::cases().into_iter().chain(append::cases()).collect()
}

/// Comparisons of prefill attention by warp groups, also by an executor, which only devices of compute capability 9.0 have.
pub fn wgmma_cases() -> Vec<Case> {
    prefill_cases::wgmma_cases().into_iter().chain(executor::wgmma_cases()).collect()
}

/// Comparisons that only a GPU has time for: sequences and lists as long as those of real prompts.
pub fn large_cases() -> Vec<Case> {
    let attention = [decode_cases::large_cases(), prefill_cases::large_cases()];
    let parts = [tile_cases::large_cases(), select_cases::large_cases()];
    parts.into_iter().chain(attention).flatten().collect()
}
