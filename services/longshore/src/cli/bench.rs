//! Flags of the measurements.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{serve::ServeArgs, trace::BenchTraceArgs};

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Time to first token and inter-token latency of any OpenAI endpoint.
    Serve(BenchServeArgs),
    /// Attention, linear layers and the whole model on this machine, beside what the machine can do at most.
    Compute(Box<BenchComputeArgs>),
    /// Prompts under prefill policies: time to first token, attention, selection, density.
    Prefill(Box<BenchPrefillArgs>),
    /// Tiles into shards and out of them over every lane, beside memcpy, raw TCP and stock tonic.
    Store(Box<BenchStoreArgs>),
    /// Kernels of the GPU, as parts of what the GPU can do at most.
    Cuda(Box<BenchCudaArgs>),
    /// Recorded requests: which of their blocks would have been held, by eviction policy and capacity.
    Trace(Box<BenchTraceArgs>),
}

/// Ways to a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StoreLane {
    /// Called in the same process.
    Local,
    /// Shared memory of one host.
    Shm,
    /// From GPU to GPU over NCCL, beside gRPC; needs two GPUs.
    Nccl,
    /// TCP connections for tiles, beside gRPC.
    Tcp,
    /// gRPC with our own bodies.
    Grpc,
    /// gRPC as tonic generates it, with its own settings: what to compare with.
    Stock,
}

/// What lies behind a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StoreEnd {
    /// Memory that is there already: verifies and copies tiles into it. Shows the lane.
    Slab,
    /// A shard as `longshore kvstore` runs it.
    Store,
}

/// Flags of `longshore bench store`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  longshore bench store                                                every lane, one process and two; about two minutes
  longshore bench store --lanes tcp,grpc,stock --tile-bytes 1048576 --json store.json
  longshore bench store --lanes grpc --ends slab --processes 2 --unverified    what the checksums cost
  longshore bench store --lanes tcp,nccl --ends slab --processes 2             from GPU to GPU, or NOT RUN and why")]
pub(crate) struct BenchStoreArgs {
    /// Lanes. Where `nccl` cannot be had the report says NOT RUN, and why.
    #[arg(long, value_delimiter = ',', value_name = "LANES", default_value = "local,shm,tcp,grpc,stock")]
    pub(crate) lanes: Vec<StoreLane>,
    /// What lies behind them.
    #[arg(long, value_delimiter = ',', value_name = "ENDS", default_value = "slab,store")]
    pub(crate) ends: Vec<StoreEnd>,
    /// Bytes of a tile (K and V of one block in one layer): multiples of 32,768.
    #[arg(long, value_delimiter = ',', value_name = "BYTES", default_value = "262144,1048576", value_parser = clap::value_parser!(u64).range(8_192..=8 << 20))]
    pub(crate) tile_bytes: Vec<u64>,
    /// Layers, which is tiles of a block.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=128))]
    pub(crate) layers: u32,
    /// Streams at the same time.
    #[arg(long, value_delimiter = ',', value_name = "STREAMS", default_value = "1,4", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) concurrency: Vec<u32>,
    /// 1: client and shard in this process; 2: the shard in a process of its own.
    #[arg(long, value_delimiter = ',', value_name = "COUNTS", default_value = "1,2", value_parser = clap::value_parser!(u32).range(1..=2))]
    pub(crate) processes: Vec<u32>,
    /// Seconds of each point.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) seconds: f64,
    /// Connections of the grpc lane that carry tiles.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) connections: u32,
    /// Largest HTTP/2 frame of the grpc lane.
    #[arg(long, default_value_t = 1 << 20, value_parser = clap::value_parser!(u32).range(16_384..=16_777_215))]
    pub(crate) frame_bytes: u32,
    /// HTTP/2 window of a stream of the grpc lane; that of a connection is twice as large.
    #[arg(long, default_value_t = 8 << 20, value_parser = clap::value_parser!(u32).range(65_535..=1 << 29))]
    pub(crate) window_bytes: u32,
    /// Leave out the checksums of the slab end and of readers, to see what they cost; the tcp lane takes them anyway. Nothing else can.
    #[arg(long)]
    pub(crate) unverified: bool,
    /// Folders that are searched first for the libraries of the lane `nccl`, as `cuda.library_path`.
    #[arg(long, value_delimiter = ',', value_name = "FOLDERS")]
    pub(crate) library_path: Vec<PathBuf>,
    /// Leave out lookups of a prefix of a million tokens over four shards.
    #[arg(long)]
    pub(crate) without_lookups: bool,
    /// Write all figures as JSON; `-` is standard output, where the tables are left out then.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Be the process with the shard: print addresses, serve until standard input ends.
    #[arg(long, hide = true)]
    pub(crate) child: bool,
}

/// Parts of `longshore bench compute`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ComputePart {
    /// Attention kernels, prefill and decode.
    Attention,
    /// Linear layers by row count.
    Linear,
    /// Prompts of the whole model.
    Prefill,
    /// Decode steps of the whole model, by depth.
    Decode,
    /// From the start of a process to its first token.
    FirstToken,
}

/// Flags of `longshore bench compute`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  longshore bench compute --quick                             under five minutes on two cores
  longshore bench compute --full --json compute.json          up to 32,768 tokens; half an hour
  longshore bench compute --only prefill --lengths 512,2048   two points of the whole model")]
pub(crate) struct BenchComputeArgs {
    /// Model and threads, as every server takes them.
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    /// Measure these parts only [default: all but first-token].
    #[arg(long, value_delimiter = ',', value_name = "PARTS")]
    pub(crate) only: Vec<ComputePart>,
    /// Fewer and shorter points.
    #[arg(long, conflicts_with = "full")]
    pub(crate) quick: bool,
    /// Long points too: prompts and depths of 16,384 and 32,768 tokens.
    #[arg(long)]
    pub(crate) full: bool,
    /// Prompt lengths of `prefill` instead of the usual ones.
    #[arg(long, value_delimiter = ',', value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub(crate) lengths: Vec<u32>,
    /// Depths of `decode` instead of the usual ones.
    #[arg(long, value_delimiter = ',', value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(0..=1 << 24))]
    pub(crate) depths: Vec<u32>,
    /// Samples of each point; the median is shown.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) repeats: u32,
    /// Decode steps of one sample.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) steps: u32,
    /// Write all samples as JSON; `-` is standard output, where the tables are left out then.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Load, prefill, sample one token, say so and end: what `first-token` starts and times.
    #[arg(long, hide = true)]
    pub(crate) until_first_token: bool,
}

/// Flags of `longshore bench cuda`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  longshore bench cuda                              the first GPU
  longshore bench cuda --device cuda:1 --json -     another, for programs
`python3 tests/perf/cuda_peers.py` measures what others do on the same shapes.")]
pub(crate) struct BenchCudaArgs {
    /// Device and libraries, as every server takes them.
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    /// Tokens of prompts (dense ones up to 131,072) and keys of decode steps; those that the device has no room for are left out.
    #[arg(long, value_delimiter = ',', value_name = "KEYS", default_value = "8192,131072,1048576", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub(crate) lengths: Vec<u32>,
    /// Samples of each point; the median is shown.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) repeats: u32,
    /// Show rates beside those of other programs on the same GPU: the JSON of `tests/perf/cuda_peers.py`.
    #[arg(long, value_name = "FILE")]
    pub(crate) peers: Option<PathBuf>,
    /// Write all figures as JSON; `-` is standard output, where the tables are left out then.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

/// Flags of `longshore bench prefill`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  longshore bench prefill --lengths 4096,8192                                     exact and balanced, random tokens
  longshore bench prefill --lengths 32768 --policy balanced --file book.txt       a text, over and over to that length
  longshore bench prefill --policy balanced:gamma=0.95 --json out.json --plot out.svg")]
pub(crate) struct BenchPrefillArgs {
    /// Model and threads, as every server takes them.
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    /// Prompt lengths.
    #[arg(long, value_delimiter = ',', value_name = "TOKENS", default_value = "4096,8192", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub(crate) lengths: Vec<u32>,
    /// A prefill policy; may be repeated.
    #[arg(long = "policy", value_name = "POLICY", default_values = ["exact", "balanced"])]
    pub(crate) policies: Vec<String>,
    /// Text of the prompts, repeated where it is too short [default: random tokens].
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Seed of random tokens.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Chunks of each prompt in which exact attention is timed beside the policy; 0: none.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(0..=4096))]
    pub(crate) dense_samples: u32,
    /// Write all figures as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Draw seconds against tokens as SVG.
    #[arg(long, value_name = "FILE")]
    pub(crate) plot: Option<PathBuf>,
}

/// Flags of `longshore bench serve`.
#[derive(Debug, Args)]
pub(crate) struct BenchServeArgs {
    /// Base address of the endpoint, with or without `/v1`.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub(crate) url: String,
    /// Model name [default: the first that /v1/models lists].
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Requests in all.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) requests: u32,
    /// Requests at the same time.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) concurrency: u32,
    /// Words of each prompt; a word is about one to two tokens, the endpoint's own count is reported.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=4_000_000))]
    pub(crate) prompt_words: u32,
    /// Tokens to generate for each request.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) max_tokens: u32,
    /// Words that all prompts share at the beginning, to measure the prefix cache.
    #[arg(long, default_value_t = 0)]
    pub(crate) shared_words: u32,
    /// Seed of the prompts.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Bearer token, if the endpoint wants one.
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}
