//! Pages, decode, merges, selection and summaries on the emulator, against the CPU.
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

use longshore_cuda::selftest;

/// Runs the cases whose names begin with this.
#[track_caller]
fn check(beginning: &str) {
    let device = device::Emulator::device();
    let cases: Vec<_> =
        selftest::cases().into_iter().filter(|case| case.name.starts_with(beginning)).collect();
    assert!(!cases.is_empty(), "no case begins with `{beginning}`");
    let mut wrong = Vec::new();
    for case in &cases {
        match case.run(&device) {
            Ok(error) if error <= case.limit => {}
            Ok(error) => wrong.push(format!("{}: {error:e}, limit {:e}", case.name, case.limit)),
            Err(error) => wrong.push(format!("{}: {error}", case.name)),
        }
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn tiles_become_pages_and_tiles_again() {
    check("transcode");
}

#[test]
fn rows_become_the_pages_of_their_tiles() {
    check("rows to pages");
}

#[test]
fn pages_are_narrowed_as_on_the_cpu() {
    check("quantise");
}

#[test]
fn checksums_are_those_of_the_bytes() {
    check("checksum");
}

#[test]
fn summaries_have_the_bits_of_the_cpu() {
    check("means");
}

#[test]
fn decode_of_floats() {
    check("decode F32");
    check("decode F16");
    check("decode Bf16");
}

#[test]
fn decode_of_eight_bits() {
    check("decode Int8");
    check("decode E4m3");
}

#[test]
fn merges_have_the_bits_of_the_cpu() {
    check("merge");
}

#[test]
fn selectors_keep_what_the_rules_say() {
    check("select");
}

#[test]
fn energies_are_right() {
    check("score");
}

#[test]
fn plans_are_those_of_the_cpu() {
    check("plan");
}

#[test]
fn pages_are_chosen_by_their_scores() {
    check("pages");
}
