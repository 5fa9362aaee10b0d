//! The forward pass on the emulator: the comparisons that the self-test makes on a GPU, refusals, and what the host waits for.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test's functions may fail and report like its body"
)]

#[path = "model/candidates.rs"]
mod candidates;
#[path = "emulator/compiler.rs"]
mod compiler;
#[path = "emulator/counted.rs"]
mod counted;
#[path = "emulator/device.rs"]
mod device;
#[path = "model/refusals.rs"]
mod refusals;
#[path = "model/watched.rs"]
mod watched;

use longshore_cuda::selftest::{Case, cases};

use device::Emulator;

/// What names of the forward pass's comparisons begin with.
const PREFIXES: [&str; 7] =
    ["linear ", "append to ", "likeliest of ", "logits that ", "f32 pass", "f16 pass", "bf16 pass"];

/// The comparisons whose names begin with one of `prefixes`.
fn chosen(prefixes: &[&str]) -> Vec<Case> {
    let of = |case: &Case| prefixes.iter().any(|prefix| case.name.starts_with(prefix));
    cases().into_iter().filter(of).collect()
}

/// Runs these comparisons; there must be `count`.
fn compare(prefixes: &[&str], count: usize) {
    let (emulator, chosen) = (Emulator::device(), chosen(prefixes));
    assert_eq!(chosen.len(), count, "{prefixes:?}: {chosen:?}");
    for case in chosen {
        let distance = case.run(&emulator).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        println!("{}: {distance:.1e} of {:.0e}", case.name, case.limit);
        assert!(distance <= case.limit, "{}: {distance:e} is over {:e}", case.name, case.limit);
    }
}

#[test]
fn every_comparison_belongs_to_a_test() {
    assert_eq!(chosen(&PREFIXES).len(), 8 + 9 + 4 + 4 + 9 + 5 + 4);
}

#[test]
fn linear_layers_of_floats_agree_with_sums_in_f64_whatever_the_rows() {
    compare(&["linear f32", "linear f16 F", "linear bf16 BF16", "linear bf16 F32"], 8);
}

#[test]
fn linear_layers_of_quants_agree_with_sums_in_f64_whatever_the_rows() {
    compare(&["linear f16 Q", "linear bf16 Q"], 9);
}

#[test]
fn pages_are_the_tiles_of_the_cpu() {
    compare(&["append to "], 4);
}

#[test]
fn likeliest_tokens_are_the_samplers() {
    compare(&["likeliest of ", "logits that "], 4);
}

#[test]
fn passes_in_f32_give_the_cpus_logits_and_tokens() {
    compare(&["f32 pass"], 9);
}

#[test]
fn passes_in_f16_give_the_cpus_logits() {
    compare(&["f16 pass"], 5);
}

#[test]
fn passes_in_bf16_give_the_cpus_logits() {
    compare(&["bf16 pass"], 4);
}
