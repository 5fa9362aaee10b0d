//! Where a process computes: what `compute.device` says, and what this machine has.

use anyhow::{Context, Result, ensure};
use longshore_cuda::CudaDevice;

use crate::{config::Config, console};

/// A device as it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The processor.
    Cpu,
    /// The GPU with this number.
    Cuda(u32),
    /// The first GPU where it can be used, else the processor.
    Auto,
}

impl Choice {
    /// `cpu`, `cuda`, `cuda:N`, `auto`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        match text {
            "cpu" => Some(Self::Cpu),
            "auto" => Some(Self::Auto),
            "cuda" => Some(Self::Cuda(0)),
            // Digits only: `parse` would take `+1`.
            other => {
                let digits = other.strip_prefix("cuda:").filter(|n| n.bytes().all(|b| b.is_ascii_digit()))?;
                digits.parse().ok().map(Self::Cuda)
            }
        }
    }

    /// The GPU that a command which is about GPUs means: that of the configuration, else the first.
    pub(crate) fn gpu(self) -> u32 {
        match self {
            Self::Cuda(index) => index,
            Self::Cpu | Self::Auto => 0,
        }
    }
}

/// Refuses a GPU that was asked for and cannot be used, before anything else is done; replaces `auto` by what it means here, with a
/// warning where that is the CPU.
pub(crate) fn resolve(config: &mut Config) -> Result<()> {
    match choice(config) {
        Choice::Cpu => {}
        Choice::Cuda(index) => {
            CudaDevice::examine(index, &config.cuda.options()).with_context(|| asked(config))?;
        }
        Choice::Auto => match CudaDevice::examine(0, &config.cuda.options()) {
            Ok(_) => config.compute.device = "cuda:0".to_owned(),
            Err(error) => {
                console::note(format!("warning: computing on the CPU, since no GPU can be used: {error}"));
                config.compute.device = "cpu".to_owned();
            }
        },
    }
    Ok(())
}

/// Where a shard attends. Shards of a deployment that computes on GPUs may lie on machines without one: they say so, and attend on
/// the CPU. Replaces `auto` as [`resolve`] does, since what it means belongs to the deployment.
pub(crate) fn of_shard(config: &mut Config) -> Choice {
    let asked_for = choice(config);
    let Choice::Cuda(index) = asked_for else {
        resolve(config).expect("`auto` and the CPU are never refused");
        return choice(config);
    };
    match CudaDevice::examine(index, &config.cuda.options()) {
        Ok(_) => asked_for,
        Err(error) => {
            console::note(format!(
                "warning: {}, but a shard attends on the CPU here: {error}",
                asked(config)
            ));
            Choice::Cpu
        }
    }
}

/// Refuses a GPU for a command that looks at the CPU.
pub(crate) fn ensure_cpu(config: &Config, command: &str) -> Result<()> {
    let is_cpu = choice(config) == Choice::Cpu;
    ensure!(
        is_cpu,
        "{}, `{command}` is about the CPU; hint: use `--device cpu`, or `longshore bench cuda`",
        asked(config)
    );
    Ok(())
}

/// The device of the configuration.
pub(crate) fn choice(config: &Config) -> Choice {
    config.compute.choice().expect("a configuration was validated")
}

/// What the configuration asks for, to begin an error with.
pub(crate) fn asked(config: &Config) -> String {
    format!("`compute.device` is `{}`", config.compute.device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read() {
        let parse = Choice::parse;
        assert_eq!((parse("cpu"), parse("auto")), (Some(Choice::Cpu), Some(Choice::Auto)));
        assert_eq!((parse("cuda"), parse("cuda:0")), (Some(Choice::Cuda(0)), Some(Choice::Cuda(0))));
        assert_eq!(parse("cuda:12"), Some(Choice::Cuda(12)));
        for text in ["", "cuda:", "cuda:+1", "cuda:-1", "cuda:1.0", "cuda:4294967296", "Cuda:0", "gpu"] {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_eq!([Choice::Cpu, Choice::Auto, Choice::Cuda(3)].map(Choice::gpu), [0, 0, 3]);
    }
}
