//! The one configuration of every process: each component's part lies in its own crate.

mod compute;
mod copies;
mod cuda;
mod drain;
#[cfg(test)]
mod page;
mod position;

use longshore_attention::KvDtype;
use longshore_blocks::{Geometry, quorum::CopyRule};
use longshore_chassis::{
    Fault, TelemetryConfig, Validate,
    config::{check_range, join},
    listen,
};
use longshore_cluster::Member;
use longshore_model::Linear;
use longshore_router::Policies;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    device::Choice,
    model::{DEFAULT_MODEL, ModelRef},
};

pub(crate) use compute::ComputeConfig;
pub(crate) use cuda::CudaConfig;
pub(crate) use drain::DrainConfig;
pub(crate) use position::PositionScaling;

/// Everything that can be configured.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// Which model, and how its KV looks.
    pub(crate) model: ModelConfig,
    /// Where a process computes.
    pub(crate) compute: ComputeConfig,
    /// Libraries and compiled kernels of GPUs.
    pub(crate) cuda: CudaConfig,
    /// Addresses.
    pub(crate) listen: ListenConfig,
    /// Who belongs to the cluster.
    pub(crate) cluster: ClusterConfig,
    /// Front door.
    pub(crate) router: longshore_router::Config,
    /// Prefill workers.
    pub(crate) prefill: longshore_prefill::Config,
    /// Decode workers.
    pub(crate) decode: longshore_decode::Config,
    /// Shards.
    pub(crate) kvstore: longshore_kvstore::Config,
    /// Copies of blocks.
    pub(crate) store: StoreConfig,
    /// Logs.
    pub(crate) telemetry: TelemetryConfig,
    /// End of the process.
    pub(crate) drain: DrainConfig,
}

/// Which model, and how its KV looks. Equal in every process of a cluster.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ModelConfig {
    /// A name, `pypi:package==version`, `hf:org/name` or a path.
    pub(crate) reference: String,
    /// Name that clients ask for; empty: follows from the reference.
    pub(crate) name: String,
    /// Element type of the KV cache: `f32`, `f16`, `bf16` or `int8`.
    pub(crate) kv_dtype: String,
    /// Arithmetic of the linear layers: `int8` (weights of quantised files times activations rounded to 8 bits), `f32`, or
    /// `auto`: `int8` where the file is quantised.
    pub(crate) linear: String,
    /// Rotary scaling: `none`, `linear:F` or `yarn:F`; empty: the model's own.
    pub(crate) rope_scaling: String,
    /// Positions of a sequence, prompt and answer together; 0: the model's own limit.
    pub(crate) max_context_tokens: u64,
    /// Token positions of a block.
    pub(crate) block_tokens: u32,
    /// Consecutive blocks that are placed together.
    pub(crate) stripe_blocks: u32,
    /// File that says what each attention head visits in a prefill: budgets as `longshore calibrate` writes them (JSON), or
    /// as MInference (JSON) or DuoAttention (TSV) do; empty: what is shipped for the model, if anything. Routers, prefill
    /// and decode workers read it.
    pub(crate) head_plan: String,
}

impl Default for ModelConfig {
    fn default() -> Self {
        let geometry = Geometry::default();
        Self {
            reference: DEFAULT_MODEL.to_owned(),
            name: String::new(),
            kv_dtype: "f16".to_owned(),
            linear: "auto".to_owned(),
            rope_scaling: String::new(),
            max_context_tokens: 0,
            block_tokens: geometry.block_tokens(),
            stripe_blocks: geometry.stripe_blocks(),
            head_plan: String::new(),
        }
    }
}

/// Addresses; an empty one is not listened on.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ListenConfig {
    /// OpenAI HTTP API of a router.
    pub(crate) http: String,
    /// gRPC.
    pub(crate) grpc: String,
    /// Port of the `tcp` lane of a shard, at the address of `grpc`; 0: any that is free, which the others are told.
    pub(crate) tiles_port: u16,
    /// Health, metrics and configuration.
    pub(crate) admin: String,
}

impl Default for ListenConfig {
    fn default() -> Self {
        Self {
            http: "127.0.0.1:8000".to_owned(),
            grpc: "127.0.0.1:9000".to_owned(),
            tiles_port: 0,
            admin: String::new(),
        }
    }
}

impl ListenConfig {
    /// Refuses one address for two listeners of a process; `http` tells whether that is one of them.
    pub(crate) fn check_distinct(&self, http: bool) -> anyhow::Result<()> {
        let listeners = [("grpc", &self.grpc), ("admin", &self.admin), ("http", &self.http)];
        let listeners = &listeners[..if http { 3 } else { 2 }];
        for (index, (field, address)) in listeners.iter().enumerate() {
            let same = listeners[..index].iter().find(|(_, other)| listen::collide(other, address));
            if let Some((other, taken)) = same {
                anyhow::bail!(
                    "`listen.{field}` is `{address}`, which is taken by `listen.{other}`, `{taken}`; hint: give each a port of its own"
                );
            }
        }
        Ok(())
    }
}

/// Who belongs to the cluster.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ClusterConfig {
    /// Name of this process.
    pub(crate) id: String,
    /// Members as `role=id@address[;weight=N][;host=H][;zone=Z]`, the same in every process.
    pub(crate) members: Vec<String>,
    /// File with more members, one a line; read again when it changes. Empty: none.
    pub(crate) members_file: String,
}

/// Copies of blocks. Their number and that of acknowledgements are equal in every process of a cluster.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct StoreConfig {
    /// Copies of each block, on different hosts.
    pub(crate) copies: usize,
    /// Copies that must be confirmed before a block counts as stored.
    pub(crate) write_acks: usize,
    /// How long a shard that is read may send nothing before another copy is asked. May differ between processes.
    pub(crate) patience_ms: u64,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self { copies: 1, write_acks: 1, patience_ms: 10_000 }
    }
}

impl StoreConfig {
    /// Copies and acknowledgements as a rule.
    pub(crate) fn rule(&self) -> CopyRule {
        CopyRule::new(self.copies, self.write_acks).expect("a configuration was validated")
    }
}

impl ModelConfig {
    /// Whether `policy` may mean a head plan, that of the configuration or one that is shipped, so that nobody can judge it before
    /// the model is known. A name that is none can be judged at once.
    pub(crate) fn may_plan(&self, policy: &str) -> bool {
        let name = policy.trim().split_once(':').map_or(policy.trim(), |(name, _)| name);
        name == "heads" || (!self.head_plan.is_empty() && Policies::names().any(|known| known == name))
    }

    /// Arithmetic of the linear layers.
    pub(crate) fn linear(&self) -> Option<Linear> {
        self.linear.parse().ok()
    }

    /// Scaling of positions.
    pub(crate) fn position_scaling(&self) -> Option<PositionScaling> {
        PositionScaling::parse(&self.rope_scaling)
    }

    /// Element type of the KV cache.
    pub(crate) fn dtype(&self) -> Option<KvDtype> {
        KvDtype::ALL.into_iter().find(|dtype| dtype.name() == self.kv_dtype)
    }
}

impl Config {
    /// The arithmetic that K and V are results of, by its name in the configuration: `auto` and what it amounts to for a file refuse
    /// each other, and so do the arithmetic of the CPU, that of GPUs, and that of GPUs of other capabilities (their matrix units add
    /// otherwise, and their kernels are cut otherwise).
    pub(crate) fn arithmetic(&self) -> String {
        match self.compute.choice() {
            Some(Choice::Cuda(_)) => {
                let wgmma = if self.cuda.wgmma { " wgmma" } else { "" };
                format!("cuda sm_{} {}{wgmma}", self.cuda.capability, self.model.linear)
            }
            _ => self.model.linear.clone(),
        }
    }

    /// Element type of the KV cache.
    pub(crate) fn kv_dtype(&self) -> KvDtype {
        self.model.dtype().expect("a configuration was validated")
    }

    /// A head plan is read when the model's shape is known, and the default policy is checked with it then.
    fn policy_faults(&self, path: &str, faults: &mut Vec<Fault>) {
        let default = &self.router.prefill_policy;
        if !self.model.may_plan(default)
            && let Err(longshore_router::Error::Invalid { problem, .. }) = Policies::new(default, None)
        {
            faults.push(Fault::new(path, "prefill_policy", problem));
        }
    }
}

impl Validate for Config {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        self.model.faults(&join(path, "model"), faults);
        self.listen.faults(&join(path, "listen"), faults);
        self.cluster.faults(&join(path, "cluster"), faults);
        self.router.faults(&join(path, "router"), faults);
        self.policy_faults(&join(path, "router"), faults);
        self.prefill.faults(&join(path, "prefill"), faults);
        self.decode.faults(&join(path, "decode"), faults);
        self.kvstore.faults(&join(path, "kvstore"), faults);
        self.store.faults(&join(path, "store"), faults);
        self.telemetry.faults(&join(path, "telemetry"), faults);
        self.compute.faults(&join(path, "compute"), faults);
        self.cuda.faults(&join(path, "cuda"), faults);
        self.drain.faults(&join(path, "drain"), faults);
    }
}

impl Validate for ModelConfig {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        if let Err(error) = ModelRef::parse(&self.reference) {
            faults.push(Fault::new(path, "reference", format!("is `{}`: {error}", self.reference)));
        }
        if self.dtype().is_none() {
            faults.push(Fault::new(
                path,
                "kv_dtype",
                format!("is `{}`, must be `f32`, `f16`, `bf16` or `int8`", self.kv_dtype),
            ));
        }
        if self.linear().is_none() {
            let problem = format!("is `{}`, must be `auto`, `int8` or `f32`", self.linear);
            faults.push(Fault::new(path, "linear", problem));
        }
        if self.position_scaling().is_none() {
            let problem = format!("is `{}`, must be {}", self.rope_scaling, position::VALID);
            faults.push(Fault::new(path, "rope_scaling", problem));
        }
        if let Err(error) = Geometry::new(self.block_tokens, self.stripe_blocks) {
            faults.push(Fault { key: path.to_owned(), problem: format!("cannot lay out blocks: {error}") });
        }
        check_range(faults, path, "max_context_tokens", self.max_context_tokens, 0..=1 << 32);
    }
}

impl Validate for StoreConfig {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        if let Err(longshore_blocks::Error::Invalid { field, problem }) =
            CopyRule::new(self.copies, self.write_acks)
        {
            faults.push(Fault::new(path, field, problem));
        }
        check_range(faults, path, "patience_ms", self.patience_ms, 10..=600_000);
    }
}

impl Validate for ListenConfig {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        for (field, address) in [("http", &self.http), ("grpc", &self.grpc), ("admin", &self.admin)] {
            if let Err(problem) = if address.is_empty() { Ok(()) } else { listen::check(address) } {
                faults.push(Fault::new(path, field, problem));
            }
        }
    }
}

impl Validate for ClusterConfig {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        for member in &self.members {
            if let Err(error) = Member::parse(member) {
                faults.push(Fault::new(path, "members", format!("has `{member}`: {error}")));
            }
        }
    }
}
