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
            let info = CudaDevice::examine(index, &config.cuda.options()).with_context(|| asked(config))?;
            agree(config, info.capability)?;
        }
        Choice::Auto => match CudaDevice::examine(0, &config.cuda.options()) {
            Ok(info) => {
                config.compute.device = "cuda:0".to_owned();
                agree(config, info.capability)?;
            }
            Err(error) => {
                console::note(format!("warning: computing on the CPU, since no GPU can be used: {error}"));
                config.compute.device = "cpu".to_owned();
            }
        },
    }
    Ok(())
}

/// The capability belongs to the deployment: takes that of the GPU that is here, which must be no other than the one that was named.
fn agree(config: &mut Config, found: u32) -> Result<()> {
    let named = config.cuda.capability;
    ensure!(
        named == 0 || named == found,
        "`cuda.capability` is {named}, the GPU has {found}; hint: GPUs of one deployment have one capability, take another GPU, or \
         leave it 0 where all have this one"
    );
    config.cuda.capability = found;
    Ok(())
}

/// What a process that does not compute must know of the GPUs of those that do.
pub(crate) fn of_others(config: &mut Config) -> Result<()> {
    let Choice::Cuda(index) = choice(config) else { return Ok(()) };
    if config.cuda.capability == 0 {
        let info = CudaDevice::examine(index, &config.cuda.options()).with_context(|| {
            format!(
                "{}, and there is no such GPU here to tell the capability that the deployment has; hint: set `cuda.capability` to that of \
                 the workers' GPUs (90 for 9.0; `longshore doctor` tells it there)",
                asked(config)
            )
        })?;
        config.cuda.capability = info.capability;
    }
    Ok(())
}

/// Where a shard attends. Shards of a deployment that computes on GPUs may lie on machines without one: they say so, and attend on
/// the CPU. Replaces `auto` as [`resolve`] does, since what it means belongs to the deployment.
pub(crate) fn of_shard(config: &mut Config) -> Result<Choice> {
    let asked_for = choice(config);
    let Choice::Cuda(index) = asked_for else {
        resolve(config)?;
        return Ok(choice(config));
    };
    let found = CudaDevice::examine(index, &config.cuda.options()).map_err(anyhow::Error::from);
    match found.and_then(|info| agree(config, info.capability)) {
        Ok(()) => Ok(asked_for),
        // Without a GPU, or with another one than the deployment computes on.
        Err(error) => {
            of_others(config)?;
            console::note(format!(
                "warning: {}, but a shard attends on the CPU here: {error}",
                asked(config)
            ));
            Ok(Choice::Cpu)
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
    fn a_deployment_has_one_capability() {
        let mut config = Config::default();
        agree(&mut config, 90).unwrap();
        assert_eq!(config.cuda.capability, 90);
        agree(&mut config, 90).unwrap();
        let error = agree(&mut config, 80).unwrap_err().to_string();
        assert!(error.contains("`cuda.capability` is 90, the GPU has 80"), "{error}");
        config.compute.device = "cuda:0".to_owned();
        let hopper = config.arithmetic();
        config.cuda.wgmma = true;
        assert_ne!(config.arithmetic(), hopper, "warp groups add in another order");
        config.cuda.wgmma = false;
        config.cuda.capability = 80;
        assert_ne!(config.arithmetic(), hopper);
        config.compute.device = "cpu".to_owned();
        assert_eq!(config.arithmetic(), Config::default().arithmetic(), "nothing to the CPU");
        // A process that computes nothing needs no GPU where it is told.
        config.compute.device = "cuda:0".to_owned();
        of_others(&mut config).unwrap();
        assert_eq!(config.cuda.capability, 80);
    }

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
