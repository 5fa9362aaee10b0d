//! The scripts of `tests/perf` still fit the program: no measurement, only that they run.

use std::process::{Command, Output};

use longshore_tests::{
    server::{model, program, python},
    tree::root,
};
use serde_json::Value;

fn compare(arguments: &[&str]) -> Output {
    let mut command = Command::new(python());
    command.arg(root().join("tests/perf/compare.py")).args(arguments);
    command.output().expect("Python starts: `tests/run` provisions it")
}

fn works(arguments: &[&str]) -> String {
    let output = compare(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("results are UTF-8")
}

#[test]
fn the_comparison_explains_itself() {
    let help = works(&["--help"]);
    for flag in ["--longshore", "--model", "--venv", "--points", "--rounds", "--settings", "--without-peer"] {
        assert!(help.contains(flag), "`{flag}` is missing in {help}");
    }
    let refused = compare(&["--points", "pp512,nonsense"]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("`nonsense` is no point"), "{refused:?}");
}

#[test]
fn the_comparison_plans_both_sides() {
    let plan = works(&["--dry-run", "--points", "pp16,tg8,first", "--longshore", "LONGSHORE"]);
    let (ours, theirs): (Vec<_>, Vec<_>) = plan.lines().partition(|line| line.starts_with("LONGSHORE "));
    assert_eq!(ours.len(), 3, "{plan}");
    // Three element types of the weights, with flash attention and without.
    assert_eq!(theirs.len(), 3 * 6, "{plan}");
    assert!(theirs.iter().all(|line| line.contains("llama_point.py point ")), "{plan}");
}

#[test]
fn our_side_of_the_comparison_is_measured() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("report.json");
    let (program, model) = (program().display().to_string(), model().display().to_string());
    let mut arguments = vec!["--without-peer", "--longshore", &program, "--model", &model];
    arguments.extend(["--points", "pp16,tg64", "--rounds", "1", "--steps", "2"]);
    arguments.extend(["--json", file.to_str().expect("a temporary folder has a plain name")]);
    let table = works(&arguments);
    assert!(table.contains("| pp16 | ") && table.contains("| tg64 | "), "{table}");
    let report = std::fs::read_to_string(&file).expect("the report was written");
    let report: Value = serde_json::from_str(&report).expect("the report is JSON");
    for row in report["rows"].as_array().expect("rows") {
        assert!(row["longshore"].as_f64().is_some_and(|rate| rate > 0.0), "{row}");
        assert_eq!(row["longshore_samples"][0].as_array().map(Vec::len), Some(3), "{row}");
    }
    assert!(report["conditions"]["peaks"]["gflops"].as_f64().is_some_and(|peak| peak > 0.0), "{report}");
}
