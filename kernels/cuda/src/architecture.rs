//! What code is compiled for.

use std::fmt;

use crate::Error;

/// Compute capability that kernels need at least, as 10 × major + minor: `cp.async` and `mma.sync` with bf16.
pub const CAPABILITY_MIN: u32 = 80;

/// A target of the compiler, as 10 × major + minor of the compute capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Architecture(u32);

impl Architecture {
    /// Those that the tests compile every kernel for.
    pub const CHECKED: [Self; 3] = [Self(80), Self(90), Self(100)];

    /// The one whose code runs on a device of this compute capability. Code for X.0 runs on every X.y, so there is one for each
    /// major number.
    pub fn of(capability: u32) -> Result<Self, Error> {
        match capability {
            CAPABILITY_MIN.. => Ok(Self(capability / 10 * 10)),
            old => Err(Error::DeviceTooOld {
                found: capability_name(old),
                needed: capability_name(CAPABILITY_MIN),
            }),
        }
    }

    /// The capability that it is for.
    pub fn capability(self) -> u32 {
        self.0
    }
}

/// Most bytes of shared memory that a thread block of a device of this capability may ask for (CUDA C++ Programming Guide, technical
/// specifications by compute capability).
pub(crate) fn shared_bytes_limit(capability: u32) -> usize {
    match capability {
        80 | 87 => 163 << 10,
        86 | 89 | 120.. => 99 << 10,
        _ => 227 << 10,
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What only Hopper has (`wgmma`, register reallocation) is in its architecture-specific target, which no other device runs.
        let specific = if self.0 == 90 { "a" } else { "" };
        write!(f, "sm_{}{specific}", self.0)
    }
}

/// `90` as `9.0`.
pub fn capability_name(capability: u32) -> String {
    format!("{}.{}", capability / 10, capability % 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    #[test]
    fn devices_get_the_code_that_they_run() {
        let name = |capability| Architecture::of(capability).unwrap().to_string();
        let names = [80, 86, 89, 90, 100, 103, 120].map(name);
        assert_eq!(names, ["sm_80", "sm_80", "sm_80", "sm_90a", "sm_100", "sm_100", "sm_120"]);
        assert_eq!(Architecture::CHECKED.map(|a| a.to_string()), ["sm_80", "sm_90a", "sm_100"]);
    }

    #[test]
    fn old_devices_are_refused() {
        for capability in [0, 61, 75, 79] {
            let error = Architecture::of(capability).unwrap_err();
            assert!(error.kind() == Kind::Unavailable && error.to_string().contains("8.0"), "{error}");
        }
    }
}
