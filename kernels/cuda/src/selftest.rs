//! Comparisons of the device with the CPU, written once for every [`Device`]: tests run them on the emulator, `longshore cuda selftest`
//! on a GPU.

mod material;
mod prefill;
mod prefill_cases;

use std::sync::Arc;

use crate::{Device, Error};

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
    fn new(
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

/// Comparisons of prefill attention; `large` ones too, which only a GPU has time for.
pub fn prefill_cases(large: bool) -> Vec<Case> {
    prefill_cases::cases(large)
}
