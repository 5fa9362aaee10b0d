//! The one binary: services, clients and tools. Wiring only; what the services do lies in their crates.

mod bench;
mod cli;
mod client;
mod config;
mod console;
mod cuda;
mod device;
mod doctor;
mod eval;
mod head_plan;
mod machine;
mod members;
mod model;
mod node;
mod process;
mod random;
mod reads;
mod ready;
mod role;
mod store;
mod up;
mod wiring;

use std::process::ExitCode;

use anyhow::{Context, Result};
use longshore_cluster::Role;

use cli::{BenchCommand, Cli, Command, CudaCommand, ModelCommand};

fn main() -> ExitCode {
    match run(Cli::of_process()).and_then(|()| console::written()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<process::Drained>() => ExitCode::from(process::Drained::STATUS),
        Err(error) => {
            console::fail(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("reactor").build();
    let runtime = runtime.context("cannot start the runtime")?;
    let outcome = runtime.block_on(dispatch(cli.command));
    // A thread that still reads standard input or computes must not hold up the end.
    runtime.shutdown_background();
    outcome
}

async fn dispatch(command: Command) -> Result<()> {
    match command {
        Command::Up(args) => up::up(args).await,
        Command::Router(args) => role::run(Role::Router, args.into_role()).await,
        Command::Prefill(args) => role::run(Role::Prefill, args).await,
        Command::Decode(args) => role::run(Role::Decode, args).await,
        Command::Kvstore(args) => role::run(Role::KvStore, args).await,
        Command::Generate(args) => client::generate(args).await,
        Command::Chat(args) => client::chat(args).await,
        Command::Store { command } => store::store(command).await,
        Command::Model { command } => role::blocking(move || model_command(command)).await,
        Command::Doctor(args) => role::blocking(move || doctor::doctor(&args)).await,
        Command::Eval { command } => role::blocking(move || eval::eval(&command)).await,
        Command::Calibrate(args) => role::blocking(move || eval::calibrate(&args)).await,
        Command::Bench { command: BenchCommand::Serve(args) } => bench::serve(args).await,
        Command::Bench { command: BenchCommand::Compute(args) } => {
            role::blocking(move || bench::compute(&args)).await
        }
        Command::Bench { command: BenchCommand::Store(args) } => bench::store(*args).await,
        Command::Bench { command: BenchCommand::Prefill(args) } => {
            role::blocking(move || bench::prefill(&args)).await
        }
        Command::Bench { command: BenchCommand::Trace(args) } => {
            role::blocking(move || bench::trace(&args)).await
        }
        Command::Bench { command: BenchCommand::Cuda(args) } => {
            role::blocking(move || bench::cuda(&args)).await
        }
        Command::Cuda { command: CudaCommand::Selftest(args) } => {
            role::blocking(move || cuda::selftest(&args)).await
        }
    }
}

fn model_command(command: ModelCommand) -> Result<()> {
    match command {
        ModelCommand::Pull { model } => {
            let path = model::pull(&model::Cache::of_user()?, &model::ModelRef::parse(&model)?)?;
            console::say(path.display().to_string());
            Ok(())
        }
        ModelCommand::MakeRecall(args) => model::make_recall(&args.folder, &args.options()),
        ModelCommand::List => model::list(),
        ModelCommand::Show { model, json } => model::show(&model::ModelRef::parse(&model)?, json),
    }
}
