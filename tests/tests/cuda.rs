//! The program where no GPU can be used: every way to ask for one ends in an error with a remedy, or on the CPU with a warning.
//! GPUs that are there are hidden from it.

use std::process::{Command, Output};

use longshore_tests::server::program;
use serde_json::Value;

fn longshore(arguments: &[&str]) -> Output {
    // The driver honours the first; the second is where compiled kernels would be kept.
    let folder = tempfile::tempdir().expect("a folder for the cache");
    let mut command = Command::new(program());
    command.env("CUDA_VISIBLE_DEVICES", "").env("LONGSHORE_CUDA__CACHE_PATH", folder.path());
    command.args(arguments).output().expect("the program starts")
}

/// Standard error of a command that is refused.
fn refused(arguments: &[&str]) -> String {
    let output = longshore(arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
    assert!(output.stdout.is_empty(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stdout));
    assert!(
        said.starts_with("longshore: ") && said.contains("hint: ") && !said.contains("panicked"),
        "{said}"
    );
    said
}

#[test]
fn a_gpu_that_is_not_there_is_an_error_with_a_remedy() {
    for arguments in [
        &["up", "--device", "cuda:0"][..],
        &["up", "--device", "cuda", "--check-config"],
        &["up", "--processes", "--set", "compute.device=cuda:7", "--check-config"],
        &["bench", "compute", "--quick", "--device", "cuda:0"],
    ] {
        let said = refused(arguments);
        assert!(said.contains("`compute.device` is `cuda"), "{said}");
        assert!(said.contains("--device cpu"), "{said}");
    }
    let said = refused(&["cuda", "selftest", "--device", "cuda:0"]);
    assert!(said.contains("cannot use `cuda:0`"), "{said}");
    assert!(refused(&["bench", "cuda"]).contains("cannot use `cuda:0`"));
}

/// What cannot be measured is not left out in silence: the report says so, and why, beside what was measured.
#[test]
fn a_lane_without_gpus_is_reported_as_not_run() {
    let flags = ["--lanes", "grpc,nccl", "--ends", "slab", "--tile-bytes", "32768", "--concurrency", "1"];
    let short = ["--seconds", "0.02", "--without-lookups"];
    let run = |rest: &[&str]| {
        let output = longshore(&[&["bench", "store"][..], &flags, &short, rest].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    let said = run(&[]);
    for processes in [1, 2] {
        let sign = format!("NOT RUN: nccl, slab, {processes} processes, ");
        let line = said.lines().find(|line| line.starts_with(&sign)).expect(&said);
        assert!(line.contains("the clients have no such lane: cannot use `cuda:0`"), "{line}");
        assert!(said.contains(&format!("| grpc | slab | {processes} | put |")), "{said}");
    }
    let report: Value = serde_json::from_str(&run(&["--json", "-"])).expect("JSON");
    let lanes =
        |of: &str| report[of].as_array().expect(of).iter().map(|row| row["lane"].clone()).collect::<Vec<_>>();
    assert_eq!((lanes("not_run"), lanes("points")), (vec!["nccl".into(); 2], vec!["grpc".into(); 4]));
    assert!(report["not_run"][0]["why"].as_str().is_some_and(|why| why.contains("`cuda:0`")), "{report}");
}

#[test]
fn a_device_that_is_none_names_those_that_are() {
    let output = longshore(&["up", "--check-config", "--device", "gpu"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.code() == Some(1) && said.contains("`compute.device`") && said.contains("`cuda:N`"),
        "{said}"
    );
    let output = longshore(&["up", "--check-config", "--set", "cuda.library_path=[\"/no/such/folder\"]"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("`cuda.library_path`"), "{said}");
}

#[test]
fn without_a_gpu_auto_is_the_cpu_with_a_warning() {
    let output = longshore(&["up", "--device", "auto", "--check-config"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.starts_with("warning: computing on the CPU") && said.contains("hint: "), "{said}");
    let output = longshore(&["up", "--device", "cpu", "--check-config"]);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn those_who_do_not_compute_need_no_gpu() {
    let members =
        ["--member", "kvstore=kv-0@http://127.0.0.1:1", "--member", "prefill=prefill-0@http://127.0.0.1:2"];
    let decode = ["--member", "decode=decode-0@http://127.0.0.1:3"];
    let check = |role| [&[role, "--device", "cuda:0", "--check-config"][..], &members, &decode].concat();
    for (role, id) in [("router", "router-0"), ("kvstore", "kv-0")] {
        // What the deployment's KV depends on must be known.
        let said = refused(&[&check(role)[..], &["--id", id]].concat());
        assert!(said.contains("`cuda.capability`") && said.contains("90 for 9.0"), "{said}");
        let output = longshore(&[&check(role)[..], &["--id", id, "--set", "cuda.capability=90"]].concat());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{role}: {said}");
        assert_eq!(said.contains("a shard attends on the CPU"), role == "kvstore", "{said}");
    }
    let said = refused(&[&check("prefill")[..], &["--id", "prefill-0"]].concat());
    assert!(said.contains("`compute.device` is `cuda:0`"), "{said}");
}

#[test]
fn doctor_reports_the_gpu_half() {
    let output = longshore(&["doctor", "--json", "--threads", "1", "--device", "cuda:0"]);
    let report: Value = serde_json::from_slice(&output.stdout).expect("findings are JSON");
    for part in ["driver", "nvrtc", "cublaslt", "nccl"] {
        let told = report["gpu"][part].as_object().expect("found or missing");
        let text = told.values().next().and_then(Value::as_str).unwrap_or_default();
        assert!(told.len() == 1 && !text.is_empty(), "{part}: {report}");
        assert!(told.contains_key("found") || text.contains("hint: "), "{part}: {text}");
    }
    let problems = report["problems"].as_array().expect("a list of problems");
    let asked = problems.iter().find(|p| p["problem"].as_str().is_some_and(|p| p.contains("`cuda:0`")));
    let remedy = asked.expect("the GPU is missed")["remedy"].as_str().unwrap_or_default();
    assert!(remedy.contains("--device cpu"), "{report}");
}

#[test]
fn cases_of_the_selftest_can_be_listed_without_a_gpu() {
    let output = longshore(&["cuda", "selftest", "--list"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let cases = String::from_utf8_lossy(&output.stdout).into_owned();
    for part in ["copy", "recorded attention", "greedy tokens"] {
        assert!(cases.lines().any(|case| case.contains(part)), "{part}: {cases}");
    }
    let said = refused(&["cuda", "selftest", "--only", "no such case"]);
    assert!(said.contains("`--only no such case`"), "{said}");
    // What is asked for by name is missed, before a GPU is.
    let said = refused(&["cuda", "selftest", "--only", "greedy", "--model", "/no/such/model.gguf"]);
    assert!(said.contains("`--model /no/such/model.gguf`"), "{said}");
}
