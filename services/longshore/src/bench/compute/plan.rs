//! Which points are measured.

use super::linear;
use crate::{
    cli::{BenchComputeArgs, ComputePart},
    machine::Machine,
};

/// Points by part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    parts: Vec<ComputePart>,
    quick: bool,
    /// Prompt lengths of the attention kernel.
    pub(super) attention_lengths: Vec<usize>,
    /// Keys of an attention decode step.
    pub(super) attention_keys: Vec<usize>,
    /// Row counts of the linear layers.
    pub(super) rows: Vec<usize>,
    /// Prompt lengths of the whole model.
    pub(super) lengths: Vec<usize>,
    /// Depths of decode with the whole model.
    pub(super) depths: Vec<usize>,
    /// Decode steps of one sample.
    pub(super) steps: usize,
}

/// Head shapes and KV types that attention is measured with.
pub(super) const ATTENTION_CASES: usize = 2 * 4;

impl Plan {
    /// What the flags ask for.
    pub(super) fn of(args: &BenchComputeArgs) -> Self {
        use ComputePart::{Attention, Decode, Linear, Prefill};
        let choose = |quick: &[usize], usual: &[usize], full: &[usize]| match (args.quick, args.full) {
            (true, _) => quick.to_vec(),
            (_, true) => [usual, full].concat(),
            _ => usual.to_vec(),
        };
        let or = |given: &[u32], usual: Vec<usize>| match given {
            [] => usual,
            given => given.iter().map(|&tokens| tokens as usize).collect(),
        };
        Self {
            parts: match args.only.as_slice() {
                [] => vec![Attention, Linear, Prefill, Decode],
                only => only.to_vec(),
            },
            quick: args.quick,
            attention_lengths: choose(&[2048, 8192], &[2048, 8192], &[32_768]),
            attention_keys: choose(&[8192, 32_768], &[8192, 32_768, 131_072], &[]),
            rows: vec![1, 4, 16, 64, 512],
            lengths: or(&args.lengths, choose(&[512, 2048], &[512, 2048, 8192], &[16_384, 32_768])),
            depths: or(&args.depths, choose(&[0, 8192], &[0, 8192], &[16_384, 32_768])),
            steps: args.steps as usize,
        }
    }

    /// Whether a part is wanted.
    pub(super) fn has(&self, part: ComputePart) -> bool {
        self.parts.contains(&part)
    }

    /// Points in all, for the progress bar.
    pub(super) fn points(&self) -> usize {
        let count = |part: &ComputePart| match part {
            ComputePart::Attention => {
                ATTENTION_CASES * (self.attention_lengths.len() + self.attention_keys.len())
            }
            ComputePart::Linear => linear::KINDS.len() * self.rows.len(),
            ComputePart::Prefill => self.lengths.len(),
            ComputePart::Decode => self.depths.len(),
            ComputePart::FirstToken => 1,
        };
        self.parts.iter().map(count).sum()
    }

    /// Bytes of the arrays that memory traffic is measured with: far more than caches hold.
    pub(super) fn array_bytes(&self, machine: &Machine) -> u64 {
        let wanted = (machine.last_cache_bytes() * 8).clamp(256 << 20, 4 << 30);
        match machine.memory_available_bytes / 4 {
            0 => wanted,
            most => wanted.min(most),
        }
    }

    /// Measurements of each peak, of which the best counts.
    pub(super) fn bursts(&self) -> usize {
        if self.quick { 10 } else { 20 }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{BenchCommand, Cli, Command};

    fn plan(flags: &[&str]) -> Plan {
        let line = ["longshore", "bench", "compute"].iter().chain(flags);
        match Cli::try_parse_from(line).unwrap().command {
            Command::Bench { command: BenchCommand::Compute(args) } => Plan::of(&args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_choose_the_points() {
        assert_eq!(plan(&["--full"]).lengths, [512, 2048, 8192, 16_384, 32_768]);
        assert_eq!(plan(&["--quick"]).lengths, [512, 2048]);
        let one = plan(&["--only", "decode", "--depths", "0,64", "--steps", "4"]);
        assert!(one.has(ComputePart::Decode) && !one.has(ComputePart::Attention));
        assert_eq!((one.depths.as_slice(), one.steps, one.points()), ([0, 64].as_slice(), 4, 2));
        assert!(!plan(&[]).has(ComputePart::FirstToken));
    }
}
