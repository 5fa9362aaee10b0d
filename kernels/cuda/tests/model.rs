//! The forward pass on the emulator: the comparisons that the self-test makes on a GPU, refusals, and what the host waits for.

#[path = "emulator/compiler.rs"]
mod compiler;
#[path = "emulator/device.rs"]
mod device;
#[path = "model/refusals.rs"]
mod refusals;
#[path = "model/watched.rs"]
mod watched;

use longshore_cuda::model_checks::checks;

use device::Emulator;

/// Runs the comparisons whose names begin with one of `prefixes`; there must be `count`.
fn compare(prefixes: &[&str], count: usize) {
    let emulator = Emulator::device();
    let chosen = checks().into_iter().filter(|check| prefixes.iter().any(|prefix| check.name.starts_with(prefix)));
    let chosen: Vec<_> = chosen.collect();
    assert_eq!(chosen.len(), count, "{prefixes:?}: {chosen:?}");
    for check in chosen {
        let distance = check.distance(&emulator).unwrap_or_else(|error| panic!("{}: {error}", check.name));
        println!("{}: {distance:.1e} of {:.0e}", check.name, check.bound);
        assert!(distance <= check.bound, "{}: {distance:e} is over {:e}", check.name, check.bound);
    }
}

#[test]
fn every_comparison_belongs_to_a_test() {
    assert_eq!(checks().len(), 5 + 12 + 4 + 4 + 9 + 3 + 6);
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
    compare(&["append"], 4);
}

#[test]
fn likeliest_tokens_are_the_samplers() {
    compare(&["likeliest", "logits"], 4);
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
