//! Prefill attention on the emulator, against the CPU's executor.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the whole file is test code, its helpers too"
)]

#[path = "emulator/compiler.rs"]
mod compiler;
#[path = "emulator/device.rs"]
mod device;

use std::sync::Arc;

use longshore_cuda::{Device, selftest};

use device::Emulator;

/// Cases of indices and shapes, in which f16 and bf16 do the same: here f16 alone, on a GPU both.
const SHAPES: [&str; 8] = [
    "one row after many",
    "small pages",
    "large pages",
    "many heads",
    "far apart",
    "lists of one head",
    "lists of seven heads",
    "means of many",
];

/// Runs the cases whose name contains a text, but for those with one of some others; there must be some.
fn run(cases: &[selftest::Case], part: &str, without: &[&str]) {
    let emulator = Emulator::new();
    let device: Arc<dyn Device> = emulator.clone();
    let all = || cases.iter().filter(|case| case.name.starts_with("prefill ") && case.name.contains(part));
    let is_left_out = |name: &str| without.iter().any(|other| name.contains(other));
    let cases: Vec<_> = all().filter(|case| !is_left_out(&case.name)).collect();
    assert!(!cases.is_empty() && cases.len() + without.len() == all().count(), "each of {without:?} is one");
    for case in cases {
        let error = case.run(&device).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        println!("{}: {error:.2e}", case.name);
        assert!(error <= case.limit, "{}: {error:e} above {:e}", case.name, case.limit);
    }
    assert_eq!(emulator.bank_conflicts(), 0, "no two rows of a matrix lie in the same banks");
}

#[test]
fn f32_attention_is_that_of_the_cpu() {
    run(&selftest::cases(), ", F32,", &[]);
}

#[test]
fn f16_attention_is_that_of_the_cpu() {
    run(&selftest::cases(), ", F16,", &[]);
}

#[test]
fn bf16_attention_is_that_of_the_cpu() {
    run(&selftest::cases(), ", Bf16,", &SHAPES);
}

#[test]
fn f16_attention_by_warp_groups_is_that_of_the_cpu() {
    run(&selftest::wgmma_cases(), ", F16,", &[]);
}

#[test]
fn bf16_attention_by_warp_groups_is_that_of_the_cpu() {
    run(&selftest::wgmma_cases(), ", Bf16,", &SHAPES);
}
