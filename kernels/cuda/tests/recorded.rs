//! Recorded vectors and greedy tokens of a whole model, on the emulator; and how they are recorded.
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

use std::path::Path;
use std::sync::Arc;

use longshore_compute::ComputePool;
use longshore_cuda::selftest::{self, Case, Greedy};
use longshore_model::LoadedModel;
use longshore_model::testing::{TinyOptions, write_tiny_gguf};

use device::Emulator;

/// All files together.
const BYTES_MAX: usize = 1 << 20;

/// Runs these comparisons; what is wrong.
fn wrong(cases: impl IntoIterator<Item = Case>) -> Vec<String> {
    let device = Emulator::device();
    let check = |case: Case| match case.run(&device) {
        Ok(error) => {
            println!("{}: {error:.2e} of {:.0e}", case.name, case.limit);
            (error.is_nan() || error > case.limit)
                .then(|| format!("{}: {error:e} above {:e}", case.name, case.limit))
        }
        Err(error) => Some(format!("{}: {error}", case.name)),
    };
    cases.into_iter().filter_map(check).collect()
}

fn of_cpu(case: &Case) -> bool {
    case.name.ends_with("CPU")
}

/// When this fails, a CPU twin gives other bits than the version that recorded. If that is meant, `--run-ignored only record` writes the
/// files anew, and the reason belongs into the commit.
#[test]
fn the_cpu_still_gives_what_was_recorded() {
    let cases: Vec<Case> = selftest::recorded_cases().into_iter().filter(of_cpu).collect();
    assert_eq!(cases.len(), selftest::recorded().len());
    let wrong = wrong(cases);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let (made, there) = (selftest::record().unwrap(), selftest::recorded());
    for ((name, made), (_, there)) in made.iter().zip(&there) {
        assert!(made == there, "{name}: its inputs are not those that are made now");
    }
    assert!(there.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() <= BYTES_MAX);
}

#[test]
fn the_device_gives_what_was_recorded() {
    let wrong = wrong(selftest::recorded_cases().into_iter().filter(|case| !of_cpu(case)));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A file with the last bytes of its results changed, and a digest that is right again.
fn changed(bytes: &[u8], at: usize) -> &'static [u8] {
    let mut content = bytes[..bytes.len() - 32].to_vec();
    let at = content.len() - at;
    content[at] ^= 0x40;
    let digest = blake3::hash(&content);
    content.extend(digest.as_bytes());
    content.leak()
}

#[test]
fn other_results_are_found() {
    for (name, bytes) in selftest::recorded() {
        // The upper byte of a word of the array that comes last: of a sum, a logit or a token.
        let cases = selftest::recorded_cases_of(&name, changed(bytes, 1)).unwrap();
        let cases: Vec<Case> = cases
            .into_iter()
            .filter(|case| of_cpu(case) || name != "forward-f16.bin" && name != "forward-bf16.bin")
            .collect();
        let all = cases.len();
        assert_eq!(wrong(cases).len(), all, "{name}");
        // Without a digest that is right: a damaged file.
        let mut damaged = bytes.to_vec();
        *damaged.last_mut().unwrap() ^= 1;
        let wrong = wrong(selftest::recorded_cases_of(&name, damaged.leak()).unwrap());
        assert!(wrong.len() == 2 && wrong.iter().all(|text| text.contains("is damaged")), "{wrong:?}");
    }
    assert!(selftest::recorded_cases_of("none.bin", &[]).is_none());
}

#[test]
#[ignore = "writes the files of `recorded` anew"]
fn record() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recorded");
    for (name, bytes) in selftest::record().unwrap() {
        println!("{name}: {} bytes", bytes.len());
        std::fs::write(folder.join(name), bytes).unwrap();
    }
}

#[test]
fn greedy_tokens_of_a_tiny_model_are_the_cpus() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    write_tiny_gguf(
        &path,
        &TinyOptions { head_dim: 64, query_heads: 2, kv_heads: 1, ..TinyOptions::default() },
    )
    .unwrap();
    let model = Arc::new(LoadedModel::open(&path, &|_| ()).unwrap());
    // A unit test of the crate sees that its tokens change.
    let greedy = Greedy { model, prompt: (3..40).collect(), count: 64, pool: ComputePool::serial() };
    let wrong = wrong(greedy.cases());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
