//! The instruction sets that kernels are written for.

use std::{fmt, sync::OnceLock};

/// What a kernel may use. Every one gives the same bits; they differ in speed only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum InstructionSet {
    /// Plain Rust, as the compiler's target allows.
    Portable,
    /// AArch64 with its vector unit.
    Neon,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// The former and AVX-512 F, BW, CD, DQ, VL and VNNI.
    Avx512,
}

impl InstructionSet {
    /// The best that this machine has.
    pub fn detect() -> Self {
        static BEST: OnceLock<InstructionSet> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().pop().expect("the portable one is always there"))
    }

    /// All that this machine has, the best last.
    pub fn available() -> Vec<Self> {
        #[cfg_attr(
            not(any(target_arch = "x86_64", target_arch = "aarch64")),
            expect(unused_mut, reason = "other processors have the portable one only")
        )]
        let mut found = vec![Self::Portable];
        #[cfg(target_arch = "aarch64")]
        found.push(Self::Neon);
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512cd")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            found.extend(avx2.then_some(Self::Avx2));
            found.extend(avx512.then_some(Self::Avx512));
        }
        found
    }

    /// Name, as `longshore doctor` prints it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }
}

impl fmt::Display for InstructionSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::InstructionSet;

    #[test]
    fn the_best_comes_last() {
        let all = InstructionSet::available();
        assert_eq!(all[0], InstructionSet::Portable);
        assert!(all.is_sorted());
        assert_eq!(all.last(), Some(&InstructionSet::detect()));
    }
}
