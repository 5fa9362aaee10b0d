//! What workers and shards compute with, on the device of the configuration: the forward pass and attention.

use std::{sync::Arc, time::Instant};

use anyhow::{Context, Result, bail, ensure};
use longshore_attention::{CpuExecutor, Executor, KvDtype, TileShape};
use longshore_compute::ComputePool;
use longshore_cuda::{CudaBackend, CudaDevice, CudaExecutor, Device, ModelOptions, PageShape, Precision};
use longshore_model::{Backend, CpuBackend, CpuOptions, Linear, LoadProgress, ModelConfig, Weights};

use crate::{
    config::Config,
    console,
    cuda::shortages::Shortages,
    device::{self, Choice},
    machine::Machine,
};

/// The forward pass and attention of a worker.
pub(super) struct Computing {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) attention: Attention,
}

/// Attention, and the same again where it is on a GPU, for what is told of it.
#[derive(Debug, Clone)]
pub(crate) struct Attention {
    pub(crate) executor: Arc<dyn Executor>,
    pub(crate) gpu: Option<Arc<CudaExecutor>>,
    /// Where that is.
    pub(crate) device: Option<Arc<CudaDevice>>,
}

impl Attention {
    fn cpu(executor: CpuExecutor) -> Self {
        Self { executor: Arc::new(executor), gpu: None, device: None }
    }

    fn gpu(executor: CudaExecutor, device: Arc<CudaDevice>) -> Self {
        let gpu = Arc::new(executor);
        Self { executor: Arc::clone(&gpu) as Arc<dyn Executor>, gpu: Some(gpu), device: Some(device) }
    }
}

/// Packs the weights where the configuration says; attention runs there too, over tiles of `tile`.
pub(super) fn load(
    config: &Config,
    (model, tile): (&ModelConfig, TileShape),
    weights: &Weights,
    pool: &Arc<ComputePool>,
    progress: &dyn Fn(LoadProgress),
) -> Result<Computing> {
    match device::choice(config) {
        Choice::Cuda(index) => on_gpu(index, config, (model, tile), weights, pool, progress),
        // What `auto` means was found out when the configuration was read.
        Choice::Cpu | Choice::Auto => on_cpu(config, model, weights, pool, progress),
    }
}

/// What a shard answers attention with.
pub(super) fn of_shard(
    config: &Config,
    on: Choice,
    tile: TileShape,
    pool: &Arc<ComputePool>,
) -> Result<Attention> {
    let cpu = CpuExecutor::new(Arc::clone(pool));
    let Choice::Cuda(index) = on else { return Ok(Attention::cpu(cpu)) };
    check_tile(tile)?;
    let device = CudaDevice::open(index, &config.cuda.options()).with_context(|| device::asked(config))?;
    let device = Arc::new(device);
    let executor = executor(Arc::clone(&device), config, tile, cpu)?;
    Ok(Attention::gpu(executor, device))
}

fn on_cpu(
    config: &Config,
    model: &ModelConfig,
    weights: &Weights,
    pool: &Arc<ComputePool>,
    progress: &dyn Fn(LoadProgress),
) -> Result<Computing> {
    let linear = config.model.linear().context("`model.linear` must be `auto`, `int8` or `f32`")?;
    let needed = CpuBackend::expected_bytes(model, weights, linear)?;
    check_room(needed, Machine::read().memory_available_bytes)?;
    let options = CpuOptions { pool: Arc::clone(pool), linear };
    let backend =
        CpuBackend::new(model.clone(), weights, options, progress).context("cannot pack the weights")?;
    let (packed, linear) = (console::bytes(backend.memory_bytes()), backend.linear_description());
    tracing::info!(%packed, %linear, threads = pool.threads(), "packed the weights");
    Ok(Computing {
        backend: Arc::new(backend),
        attention: Attention::cpu(CpuExecutor::new(Arc::clone(pool))),
    })
}

fn on_gpu(
    index: u32,
    config: &Config,
    (model, tile): (&ModelConfig, TileShape),
    weights: &Weights,
    pool: &Arc<ComputePool>,
    progress: &dyn Fn(LoadProgress),
) -> Result<Computing> {
    check_tile(tile)?;
    let device = CudaDevice::open(index, &config.cuda.options()).with_context(|| device::asked(config))?;
    let precision = precision(config)?;
    let options = ModelOptions { precision, ..ModelOptions::new(Arc::clone(pool)) };
    let needed = CudaBackend::expected_bytes(model, weights, &options)?;
    check_device_room(needed, device.memory()?.0 as u64)?;
    let gpu = Arc::new(device);
    let device: Arc<dyn Device> = Arc::clone(&gpu) as Arc<dyn Device>;
    let backend = CudaBackend::load(Arc::clone(&device), model.clone(), weights, &options, progress)
        .context("cannot bring the weights to the GPU")?;
    let (packed, linear) = (console::bytes(backend.memory_bytes()), backend.linear_description());
    tracing::info!(device = %device.name(), %packed, %linear, "brought the weights to the GPU");
    let executor = executor(Arc::clone(&gpu), config, tile, CpuExecutor::new(Arc::clone(pool)))?;
    Ok(Computing { backend: Arc::new(backend), attention: Attention::gpu(executor, gpu) })
}

fn check_tile(tile: TileShape) -> Result<()> {
    PageShape::of(tile).map(|_| ()).context("the model's heads do not fit the kernels of GPUs")
}

/// Attention on a GPU, in memory that is free by now.
fn executor(
    gpu: Arc<CudaDevice>,
    config: &Config,
    tile: TileShape,
    cpu: CpuExecutor,
) -> Result<CudaExecutor> {
    let pages = page_budget(config.cuda.page_bytes, gpu.memory()?.0);
    check_pages(pages, tile)?;
    tracing::info!(pages = %console::bytes(pages as u64), "keeps copies of tiles on the GPU");
    let shortages = Shortages::default();
    let executor = CudaExecutor::new(gpu, cpu, pages).with_wgmma(config.cuda.wgmma);
    Ok(executor.on_shortage(move |shortage, error| shortages.tell(Instant::now(), shortage, error)))
}

/// Bytes for copies of tiles: what was asked for, or, of what the weights have left, three quarters: the rest is for rows.
fn page_budget(asked: u64, free: usize) -> usize {
    match asked {
        0 => free / 4 * 3,
        asked => usize::try_from(asked).unwrap_or(usize::MAX),
    }
}

/// Refuses a budget whose smallest share, an eighth, does not hold a tile whose elements became f32.
fn check_pages(pages: usize, tile: TileShape) -> Result<()> {
    let least = 8 * TileShape { dtype: KvDtype::F32, ..tile }.bytes();
    ensure!(
        pages >= least,
        "`cuda.page_bytes`: copies of tiles may take {}, they need {} at least; hint: raise it, or end what else uses the GPU",
        console::bytes(pages as u64),
        console::bytes(least as u64)
    );
    Ok(())
}

/// Precision of linear layers on a GPU; `None`: that of the weights.
fn precision(config: &Config) -> Result<Option<Precision>> {
    match config.model.linear() {
        Some(Linear::Auto) => Ok(None),
        Some(Linear::F32) => Ok(Some(Precision::F32)),
        Some(Linear::Int8) | None => bail!(
            "`model.linear` is `{}`, on GPUs it must be `auto` or `f32`; hint: leave it out, or use `--device cpu`",
            config.model.linear
        ),
    }
}

/// Refuses weights that the machine has no memory for: packing them would end the process, and perhaps others. `available` of 0 is
/// unknown.
fn check_room(needed: u64, available: u64) -> Result<()> {
    ensure!(
        available == 0 || needed <= available,
        "`model.reference`: the packed weights need {}, this machine has {} available; hint: take a smaller or more quantised \
         model, `model.linear = \"int8\"`, or another machine",
        console::bytes(needed),
        console::bytes(available)
    );
    Ok(())
}

/// Refuses weights that the GPU has no memory for, before minutes are spent on them.
fn check_device_room(needed: u64, free: u64) -> Result<()> {
    ensure!(
        needed <= free,
        "`model.reference`: the packed weights need {}, the GPU has {} free; hint: take a smaller or more quantised model, another \
         `--device cuda:N`, or end what else uses it",
        console::bytes(needed),
        console::bytes(free)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_must_fit_into_memory() {
        assert!(check_room(5 << 30, 5 << 30).is_ok() && check_room(5 << 30, 0).is_ok());
        let refusal = check_room(5 << 30, 1 << 30).unwrap_err().to_string();
        assert!(refusal.contains("`model.reference`") && refusal.contains("5.0 GiB"), "{refusal}");
        assert!(check_device_room(5 << 30, 5 << 30).is_ok());
        let refusal = check_device_room(5 << 30, 1 << 30).unwrap_err().to_string();
        assert!(refusal.contains("`model.reference`") && refusal.contains("1.0 GiB free"), "{refusal}");
    }

    #[test]
    fn tiles_get_most_of_what_is_left() {
        assert_eq!((page_budget(0, 100 << 30), page_budget(7 << 20, 1)), (75 << 30, 7 << 20));
        let tile = TileShape { block_tokens: 64, kv_heads: 8, head_dim: 128, dtype: KvDtype::F16 };
        assert!(check_pages(4 << 20, tile).is_ok());
        let refusal = check_pages((4 << 20) - 1, tile).unwrap_err().to_string();
        assert!(refusal.contains("`cuda.page_bytes`") && refusal.contains("4.0 MiB"), "{refusal}");
    }

    #[test]
    fn arithmetic_that_gpus_lack_is_refused() {
        let mut config = Config::default();
        assert_eq!(precision(&config).unwrap(), None);
        config.model.linear = "f32".to_owned();
        assert_eq!(precision(&config).unwrap(), Some(Precision::F32));
        config.model.linear = "int8".to_owned();
        assert!(precision(&config).unwrap_err().to_string().contains("`model.linear` is `int8`"));
    }
}
