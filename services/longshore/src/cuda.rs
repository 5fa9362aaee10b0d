//! The GPU of the commands that are about GPUs.

mod lane;
mod metrics;
mod selftest;
pub(crate) mod shortages;

use std::sync::Arc;

use anyhow::{Context, Result};
use longshore_cuda::{CudaDevice, CudaOptions, Device, Nccl, NcclConvener};
use longshore_fabric::nccl::GpuLanes;

pub(crate) use metrics::report;
pub(crate) use selftest::selftest;

use self::lane::CudaLanes;
use crate::{config::Config, console, device, node::Node};

/// Opens the GPU that the configuration names, or the first.
pub(crate) fn open(config: &Config) -> Result<Arc<CudaDevice>> {
    let index = device::choice(config).gpu();
    let opened = CudaDevice::open(index, &config.cuda.options());
    Ok(Arc::new(opened.with_context(|| format!("cannot use `cuda:{index}`"))?))
}

/// What makes ends of the lane `nccl` in this process, where the configuration wants it and it can be had; where it cannot, a warning says
/// why and tiles go another way.
pub(crate) fn lanes(config: &Config, node: &Node) -> Option<Arc<dyn GpuLanes>> {
    if !config.cuda.nccl_lane {
        return None;
    }
    let warn =
        |why: String| console::note(format!("warning: `cuda.nccl_lane` is set, tiles go another way: {why}"));
    let Some(gpu) = &node.device else {
        warn("this process computes nothing on a GPU; hint: pass `--device cuda`".to_owned());
        return None;
    };
    let nccl =
        Nccl::open(&config.cuda.options().library_path).inspect_err(|error| warn(error.to_string())).ok()?;
    tracing::info!(version = %nccl.version_name(), path = nccl.path(), "offers and uses the lane `nccl`");
    Some(lanes_on(gpu, nccl))
}

/// What makes ends of the lane `nccl` on the GPU of this number, for a command that measures it.
pub(crate) fn lanes_of(index: u32, options: &CudaOptions) -> Result<Arc<dyn GpuLanes>> {
    let gpu = CudaDevice::open(index, options).with_context(|| format!("cannot use `cuda:{index}`"))?;
    Ok(lanes_on(&Arc::new(gpu), Nccl::open(&options.library_path)?))
}

fn lanes_on(gpu: &Arc<CudaDevice>, nccl: Nccl) -> Arc<dyn GpuLanes> {
    let device: Arc<dyn Device> = Arc::clone(gpu) as Arc<dyn Device>;
    Arc::new(CudaLanes::new(Arc::new(NcclConvener::new(nccl, Arc::clone(gpu))), device))
}
