//! Where a process computes: the device, and threads of the processor, how many and on which cores.

use longshore_chassis::{Fault, Validate, config::check_range};
use longshore_compute::PoolOptions;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{device::Choice, machine};

/// Where a process computes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ComputeConfig {
    /// Device of the forward pass and of attention: `cpu`, `cuda` (the first GPU), `cuda:N`, or `auto`, which is the first GPU where
    /// one can be used, else the CPU with a warning.
    pub(crate) device: String,
    /// Compute threads of this process; 0: one per core, or one per core of `pin`.
    pub(crate) threads: usize,
    /// Cores that compute threads are bound to, as `0-3,6`; empty: wherever the system puts them.
    pub(crate) pin: String,
}

impl Default for ComputeConfig {
    fn default() -> Self {
        Self { device: "cpu".to_owned(), threads: 0, pin: String::new() }
    }
}

impl ComputeConfig {
    /// The device.
    pub(crate) fn choice(&self) -> Option<Choice> {
        Choice::parse(&self.device)
    }

    /// What the compute pool is made with. `pin` must be valid, which configuration checks.
    pub(crate) fn pool_options(&self) -> PoolOptions {
        let pin = machine::parse_cores(&self.pin).unwrap_or_default();
        let threads = if self.threads == 0 { pin.len() } else { self.threads };
        PoolOptions { threads, pin }
    }

    /// The part of process `index` of `count` that do the same work on this machine of `cores` cores, so that together
    /// they have as many threads as there are cores. Threads that were asked for are left as they are.
    pub(crate) fn share(&self, index: usize, count: usize, cores: usize) -> Self {
        let all = machine::parse_cores(&self.pin).unwrap_or_default();
        let own = match all.len() {
            0 => &[],
            len if len < count => &all[index % len..=index % len],
            len => &all[index * len / count..(index + 1) * len / count],
        };
        let threads = match (self.threads, own.len()) {
            (0, 0) => (cores / count).max(1),
            (0, pinned) => pinned,
            (asked, _) => asked,
        };
        let pin: Vec<String> = own.iter().map(usize::to_string).collect();
        Self { device: self.device.clone(), threads, pin: pin.join(",") }
    }
}

impl Validate for ComputeConfig {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        if self.choice().is_none() {
            let problem = format!("is `{}`, must be `cpu`, `cuda`, `cuda:N` or `auto`", self.device);
            faults.push(Fault::new(path, "device", problem));
        }
        check_range(faults, path, "threads", self.threads, 0..=1024);
        let usable = machine::usable_cores();
        let problem = match machine::parse_cores(&self.pin) {
            Err(problem) => Some(problem),
            Ok(cores) => cores.iter().find(|core| !usable.is_empty() && !usable.contains(core)).map(|core| {
                format!("names core {core}, this process may use {}", machine::describe_cores(&usable))
            }),
        };
        if let Some(problem) = problem {
            faults.push(Fault::new(path, "pin", format!("is `{}`: {problem}", self.pin)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(threads: usize, pin: &str) -> ComputeConfig {
        ComputeConfig { threads, pin: pin.to_owned(), ..ComputeConfig::default() }
    }

    #[test]
    fn processes_of_a_role_share_the_cores() {
        let share =
            |of: &ComputeConfig, count| (0..count).map(|index| of.share(index, count, 8)).collect::<Vec<_>>();
        assert_eq!(share(&config(0, ""), 3), vec![config(2, ""); 3]);
        assert_eq!(share(&config(0, ""), 9)[8], config(1, ""));
        assert_eq!(share(&config(5, ""), 2), vec![config(5, ""); 2]);
        assert_eq!(share(&config(0, "0-3,6"), 2), vec![config(2, "0,1"), config(3, "2,3,6")]);
        assert_eq!(share(&config(0, "4,5"), 3), vec![config(1, "4"), config(1, "5"), config(1, "4")]);
    }

    #[test]
    fn threads_follow_the_pinned_cores() {
        assert_eq!(config(0, "0-2").pool_options(), PoolOptions { threads: 3, pin: vec![0, 1, 2] });
        assert_eq!(config(2, "0-2").pool_options().threads, 2);
        assert_eq!(config(0, "").pool_options(), PoolOptions::default());
    }

    #[test]
    fn devices_that_are_none_are_refused() {
        for device in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:99999999999", "CPU", "cuda:0 "] {
            let config = ComputeConfig { device: device.to_owned(), ..ComputeConfig::default() };
            let mut faults = Vec::new();
            config.faults("compute", &mut faults);
            assert_eq!(faults.len(), 1, "{device}");
            assert!(
                faults[0].key == "compute.device" && faults[0].problem.contains("`cuda:N`"),
                "{faults:?}"
            );
        }
    }

    #[test]
    fn cores_that_are_no_list_are_refused() {
        for (pin, problem) in [("0-", "`0-`"), ("3-1", "`3-1`"), ("x", "`x`"), ("99999", "99999")] {
            let mut faults = Vec::new();
            config(0, pin).faults("compute", &mut faults);
            assert_eq!(faults.len(), 1, "{pin}");
            assert!(faults[0].key == "compute.pin" && faults[0].problem.contains(problem), "{faults:?}");
        }
        let mut faults = Vec::new();
        config(0, "").faults("compute", &mut faults);
        assert_eq!(faults, Vec::new());
    }
}
