//! What every process of a deployment derives from the model and the configuration: shapes, digests, limits, the backend.

mod backend;

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow, ensure};
use longshore_attention::{Executor, HeadPlan, TileShape};
use longshore_blocks::{Deployment, DeploymentParts, Geometry};
use longshore_compute::ComputePool;
use longshore_cuda::{CudaDevice, CudaExecutor};
use longshore_engine::{Engine, EngineOptions, Limits, wire_tile_shape};
use longshore_model::{KeptAttention, LoadProgress, LoadedModel, ModelInfo};
use longshore_proto::types::{ModelDescription, WireTileShape};
use longshore_router::Policies;

use self::backend::{Attention, Computing};
use crate::{
    config::Config,
    console,
    device::Choice,
    head_plan,
    model::{self, ModelRef},
};

/// The model and what follows from it.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    /// Tokenizer, template, shape.
    pub(crate) info: Arc<ModelInfo>,
    /// Name that clients ask for.
    pub(crate) name: String,
    /// What the KV depends on.
    pub(crate) deployment: Deployment,
    /// Block and stripe sizes.
    pub(crate) geometry: Geometry,
    /// Shape of every tile.
    pub(crate) tile_shape: TileShape,
    /// Positions that a sequence may have.
    pub(crate) context_tokens: u64,
    /// What each attention head visits in a prefill, where the deployment has a plan.
    pub(crate) head_plan: Option<Arc<HeadPlan>>,
    /// What attends on a GPU, in a process that attends on one.
    pub(crate) gpu: Option<Arc<CudaExecutor>>,
    /// The GPU that it attends on.
    pub(crate) device: Option<Arc<CudaDevice>>,
}

/// Why a model cannot be read, and what a model is.
fn unreadable(path: &Path, error: &longshore_model::Error) -> anyhow::Error {
    let hint = if path.is_dir() {
        "a folder needs `config.json`, `tokenizer.json` and `*.safetensors`"
    } else {
        "give a GGUF file, or a folder with safetensors; a file that was cut short must be fetched again"
    };
    anyhow!("cannot read the model: {error}; hint: {hint}")
}

impl Node {
    /// Finds the model, fetching it when it is missing, and reads everything but its weights.
    pub(crate) fn open(config: &Config) -> Result<Self> {
        let reference = ModelRef::parse(&config.model.reference)?;
        let path = model::ensure(&reference).context("cannot get the model")?;
        let info = ModelInfo::open(&path).map_err(|error| unreadable(&path, &error))?;
        Self::of(config, &reference, info)
    }

    /// The same with what a shard attends with, on the device `on`.
    pub(crate) fn open_shard(
        config: &Config,
        on: Choice,
        pool: &Arc<ComputePool>,
    ) -> Result<(Self, Arc<dyn Executor>)> {
        let node = Self::open(config)?;
        let Attention { executor, gpu, device } = backend::of_shard(config, on, node.tile_shape, pool)?;
        Ok((Self { gpu, device, ..node }, executor))
    }

    /// The same with the weights, which are read and hashed once, and the engine of a worker; with a progress bar.
    pub(crate) fn load(config: &Config, pool: &Arc<ComputePool>) -> Result<(Self, Arc<Engine>)> {
        let reference = ModelRef::parse(&config.model.reference)?;
        let path = model::ensure(&reference).context("cannot get the model")?;
        // Known before the first bytes are read, so that the bar does not begin full.
        let file_bytes = std::fs::metadata(&path).map_or(0, |file| file.len());
        let bar = console::byte_bar("loading", file_bytes);
        let read = |progress: LoadProgress| {
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.done_bytes);
        };
        let LoadedModel { info, weights } =
            LoadedModel::open(&path, &read).map_err(|error| unreadable(&path, &error))?;
        bar.set_prefix("packing");
        let node = Self::of(config, &reference, info)?;
        let shape = (&node.info.config, node.tile_shape);
        let Computing { backend, attention: Attention { executor, gpu, device } } =
            backend::load(config, shape, &weights, pool, &read)?;
        bar.finish_and_clear();
        let options = EngineOptions {
            kv_dtype: node.tile_shape.dtype,
            patience: Duration::from_millis(config.store.patience_ms),
            ..EngineOptions::default()
        };
        let engine = Engine::new(backend, executor, Arc::clone(pool), node.geometry, options);
        let engine = engine.context("cannot set up the engine")?;
        let engine = match &gpu {
            Some(gpu) => engine.with_kept(Arc::clone(gpu) as Arc<dyn KeptAttention>),
            None => engine,
        };
        Ok((Self { gpu, device, ..node }, Arc::new(engine)))
    }

    fn of(config: &Config, reference: &ModelRef, mut info: ModelInfo) -> Result<Self> {
        let scaling = config.model.position_scaling().context("`model.rope_scaling` is no scaling")?;
        scaling.apply(&mut info.config);
        let geometry = Geometry::new(config.model.block_tokens, config.model.stripe_blocks)?;
        let dtype =
            config.model.dtype().context("`model.kv_dtype` must be `f32`, `f16`, `bf16` or `int8`")?;
        let heads = info.config.heads;
        let tile_shape = TileShape {
            block_tokens: geometry.block_tokens() as usize,
            kv_heads: heads.kv_heads,
            head_dim: heads.head_dim,
            dtype,
        };
        tile_shape.validate().context("the model's KV fits no tile")?;
        let deployment = Deployment::new(&DeploymentParts {
            model: &info.digest,
            position: &info.config.position_fingerprint(),
            representation: dtype.name(),
            block_tokens: geometry.block_tokens(),
            stripe_blocks: geometry.stripe_blocks(),
            linear: &config.arithmetic(),
        });
        let name = if config.model.name.is_empty() { reference.name() } else { config.model.name.clone() };
        let context_tokens = context_tokens(config, &info)?;
        let head_plan = head_plan::of(config, &info)?;
        let info = Arc::new(info);
        let (gpu, device) = (None, None);
        let node =
            Self { info, name, deployment, geometry, tile_shape, context_tokens, head_plan, gpu, device };
        if node.head_plan.is_some() {
            // Told before minutes are spent on packing. Without a plan the configuration was checked with all the rest.
            node.policies(config)?;
        }
        Ok(node)
    }

    /// Prefill policies that requests may name, and the default.
    pub(crate) fn policies(&self, config: &Config) -> Result<Policies> {
        Ok(Policies::new(&config.router.prefill_policy, self.head_plan.clone())?)
    }

    /// What workers accept.
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            deployment: self.deployment,
            context_tokens: self.context_tokens,
            vocabulary: u32::try_from(self.info.config.vocabulary).unwrap_or(u32::MAX),
        }
    }

    /// Shape of every tile as it travels.
    pub(crate) fn wire_tile_shape(&self) -> WireTileShape {
        wire_tile_shape(self.tile_shape, self.info.config.layers)
    }

    /// The model as clients and peers see it.
    pub(crate) fn describe_model(&self) -> ModelDescription {
        let block_bytes = (self.tile_shape.bytes() * self.info.config.layers) as u64;
        ModelDescription {
            name: self.name.clone(),
            architecture: self.info.config.architecture.clone(),
            max_context_tokens: self.context_tokens,
            vocabulary: self.limits().vocabulary,
            tile_shape: self.wire_tile_shape(),
            kv_bytes_per_token: block_bytes / u64::from(self.geometry.block_tokens()),
            deployment: self.deployment,
        }
    }
}

fn context_tokens(config: &Config, info: &ModelInfo) -> Result<u64> {
    let own = info.config.context_tokens;
    let asked = config.model.max_context_tokens;
    if asked > own {
        tracing::warn!(
            asked,
            own,
            "`model.max_context_tokens` is beyond what the model was made for: answers degrade there"
        );
    }
    let tokens = if asked == 0 { own } else { asked };
    ensure!(tokens >= 2, "`model.max_context_tokens` is {tokens}, must be at least 2");
    Ok(tokens)
}
