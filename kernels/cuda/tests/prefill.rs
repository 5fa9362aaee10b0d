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

/// Runs the cases whose name contains a text; there must be some.
fn run(part: &str) {
    let emulator = Emulator::new();
    let device: Arc<dyn Device> = emulator.clone();
    let cases = selftest::cases();
    let cases: Vec<_> =
        cases.iter().filter(|case| case.name.starts_with("prefill ") && case.name.contains(part)).collect();
    assert!(!cases.is_empty());
    for case in cases {
        let error = case.run(&device).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        println!("{}: {error:.2e}", case.name);
        assert!(error <= case.limit, "{}: {error:e} above {:e}", case.name, case.limit);
    }
    assert_eq!(emulator.bank_conflicts(), 0, "no two rows of a matrix lie in the same banks");
}

#[test]
fn f32_attention_is_that_of_the_cpu() {
    run(", F32,");
}

#[test]
fn f16_attention_is_that_of_the_cpu() {
    run(", F16,");
}

#[test]
fn bf16_attention_is_that_of_the_cpu() {
    run(", Bf16,");
}
