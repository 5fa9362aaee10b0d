//! The GPU of the commands that are about GPUs.

mod metrics;
mod selftest;
pub(crate) mod shortages;

use std::sync::Arc;

use anyhow::{Context, Result};
use longshore_cuda::CudaDevice;

pub(crate) use metrics::report;
pub(crate) use selftest::selftest;

use crate::{config::Config, device};

/// Opens the GPU that the configuration names, or the first.
pub(crate) fn open(config: &Config) -> Result<Arc<CudaDevice>> {
    let index = device::choice(config).gpu();
    let opened = CudaDevice::open(index, &config.cuda.options());
    Ok(Arc::new(opened.with_context(|| format!("cannot use `cuda:{index}`"))?))
}
