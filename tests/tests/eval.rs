//! `longshore eval` and `longshore model make-recall` as a person types them, with a recall model made on the spot.
#![allow(clippy::unwrap_used, reason = "the whole file is test code, its helpers too")]

use std::{fs, path::Path, process::Command};

use longshore_tests::server::program;
use serde_json::Value;

/// Runs the program; standard output when it works, else standard error.
fn longshore(arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program()).args(arguments).output().expect("the program starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("what is said is UTF-8");
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

/// A recall model of four layers, of which `balanced` leaves the first two exact.
fn recall_model(folder: &Path) -> String {
    let path = folder.join("recall").to_str().unwrap().to_owned();
    let flags = ["--keys", "256", "--values", "100", "--fillers", "16", "--group", "1"];
    let said = longshore(&[&["model", "make-recall", &path][..], &flags].concat()).unwrap();
    assert_eq!(said.trim(), path);
    path
}

/// The Markdown and the JSON of an evaluation.
fn eval(what: &str, model: &str, folder: &Path, flags: &[&str]) -> (String, Value) {
    let (json, out) = (folder.join("report.json"), folder.join("pictures"));
    let (json, out) = (json.to_str().unwrap(), out.to_str().unwrap());
    let usual = ["eval", what, "--model", model, "--json", json, "--out", out];
    let said = longshore(&[&usual[..], flags].concat()).unwrap();
    let report = serde_json::from_str(&fs::read_to_string(json).unwrap()).expect("the report is JSON");
    (said, report)
}

fn pictures(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder.join("pictures")).unwrap().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.retain(|name| name.ends_with(".svg"));
    names.sort();
    for name in &names {
        let svg = fs::read_to_string(folder.join("pictures").join(name)).unwrap();
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{name}");
    }
    names
}

#[test]
fn exact_attention_and_the_default_policy_recall_every_key() {
    let folder = tempfile::tempdir().unwrap();
    let model = recall_model(folder.path());
    let flags = ["--lengths", "4096,8192", "--asked", "16", "--asked-midway", "16"];
    let (said, report) = eval("recall", &model, folder.path(), &flags);
    assert!(said.contains("| 8,192 |") && said.contains("| balanced |"), "{said}");
    let points = report["results"].as_array().unwrap();
    assert_eq!(points.len(), 4, "two lengths, two policies");
    for point in points {
        let outcomes = point["outcomes"].as_array().unwrap();
        assert_eq!(outcomes.len(), 32);
        let wrong: Vec<_> = outcomes.iter().filter(|outcome| outcome["right"] != true).collect();
        assert!(wrong.is_empty(), "{} at {}: {wrong:?}", point["policy"], point["tokens"]);
        assert!(point["density"].as_f64().is_some_and(|density| density > 0.0 && density <= 1.0));
    }
    // Rows before the position 4,096 are exact, and so are the first two of the four layers.
    let density = |index: usize| points[index]["density"].as_f64().unwrap();
    assert_eq!((density(0), density(1)), (1.0, 1.0), "{report}");
    assert!(density(2) == 1.0 && density(3) < 0.9, "{report}");
    assert_eq!(pictures(folder.path()), ["recall-balanced.svg", "recall-exact.svg"]);
}

#[test]
fn fidelity_and_perplexity_compare_with_exact_attention() {
    let folder = tempfile::tempdir().unwrap();
    let model = recall_model(folder.path());
    let policy = "balanced:min_positions=0,dense_layers=0";
    let flags = ["--tokens", "2048", "--policy", policy, "--rows", "16", "--draw", "1.0"];
    let (said, report) = eval("fidelity", &model, folder.path(), &flags);
    assert!(said.contains("| layer |"), "{said}");
    let result = &report["results"][0];
    let number = |pointer: &str| result.pointer(pointer).and_then(Value::as_f64).expect(pointer);
    assert!((0.0..=1.0).contains(&number("/drift/top1_agreement")), "{result}");
    assert!(number("/density") < 1.0 && number("/mass/mean") <= 1.0 + 1e-6, "{result}");
    assert!(number("/output/median") <= number("/output/p95"), "{result}");
    assert_eq!(result["heads"].as_array().unwrap().len(), 4, "a KV head in each layer");
    assert!(pictures(folder.path()).len() == 2, "{:?}", pictures(folder.path()));
    let flags = ["--tokens", "1024", "--policy", "balanced"];
    let (_, report) = eval("ppl", &model, folder.path(), &flags);
    let perplexity = |index: usize| report["results"][index]["perplexity"].as_f64().unwrap();
    assert!(perplexity(0) > 1.0 && (perplexity(0) - perplexity(1)).abs() < 1e-9, "short prompts are exact");
}

#[test]
fn text_tasks_are_asked_of_any_model() {
    let folder = tempfile::tempdir().unwrap();
    let model = recall_model(folder.path());
    let (said, report) =
        eval("needle", &model, folder.path(), &["--lengths", "1024", "--depths", "2", "--samples", "1"]);
    assert!(said.contains("| needle | 1,024 | exact |"), "{said}");
    let answers = report["results"].as_array().unwrap();
    assert_eq!(answers.len(), 4, "two depths, two policies");
    for pair in answers.chunks(2) {
        assert_eq!(pair[0]["answer"], pair[1]["answer"], "short prompts are exact");
        assert!(pair[0]["prompt_tokens"].as_u64().is_some_and(|tokens| tokens <= 1024 - 32));
    }
    let flags =
        ["--lengths", "2048", "--samples", "1", "--only", "vt,ancestry,many-shot", "--policy", "exact"];
    let (said, _) = eval("ruler", &model, folder.path(), &flags);
    assert!(
        said.contains("| vt | 2,048 |") && said.contains("| ancestry |") && said.contains("| many_shot |"),
        "{said}"
    );
}

#[test]
fn what_cannot_be_evaluated_is_refused_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let model = recall_model(folder.path());
    let refused =
        |flags: &[&str]| longshore(&[&["eval"][..], flags, &["--model", &model]].concat()).unwrap_err();
    for (flags, says) in [
        (&["recall", "--policy", "quick"][..], "balanced"),
        (&["recall", "--asked", "300"], "`--asked`"),
        (&["recall", "--lengths", "64"], "`--lengths`"),
        (&["recall", "--rope-scaling", "yarn:0.5"], "rope_scaling"),
        (&["ppl", "--tokens", "1000000"], "`--text`"),
        (&["fidelity", "--draw", "9.0"], "`--draw`"),
        (&["needle", "--lengths", "4000000"], "`--max-context-tokens"),
    ] {
        let said = refused(flags);
        assert!(said.contains(says) && !said.contains("panicked"), "{flags:?}: {said}");
    }
    let said = longshore(&["model", "make-recall", &model, "--head-size", "80"]).unwrap_err();
    assert!(said.contains("`--head-size` is 80"), "{said}");
}
