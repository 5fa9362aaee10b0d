//! Comparisons of the device with the CPU, written once for every [`Device`]: tests run them on the emulator, `longshore cuda selftest`
//! on a GPU.

mod decode;
mod decode_cases;
mod material;
mod pages;
mod plan;
mod select;
mod select_cases;
mod tile;
mod tile_cases;

use std::sync::Arc;

use crate::{Device, Error, model};

type Run = dyn Fn(&Arc<dyn Device>) -> Result<f64, Error> + Send + Sync;

/// One comparison.
pub struct Case {
    /// What is compared.
    pub name: String,
    /// Largest error that is right.
    pub limit: f64,
    run: Box<Run>,
}

impl Case {
    pub(crate) fn new(
        name: impl Into<String>,
        limit: f64,
        run: impl Fn(&Arc<dyn Device>) -> Result<f64, Error> + Send + Sync + 'static,
    ) -> Self {
        Self { name: name.into(), limit, run: Box::new(run) }
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

/// Comparisons of the forward pass, pages, decode attention, merges, selection and summaries.
pub fn cases() -> Vec<Case> {
    let parts = [model::checks::cases(), tile_cases::cases(), decode_cases::cases(), select_cases::cases()];
    parts.into_iter().flatten().collect()
}

/// Comparisons that only a GPU has time for: sequences and lists as long as those of real prompts.
pub fn large_cases() -> Vec<Case> {
    [tile_cases::large_cases(), decode_cases::large_cases(), select_cases::large_cases()]
        .into_iter()
        .flatten()
        .collect()
}
