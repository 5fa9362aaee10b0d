//! Files of head plans: what they mean, and what is refused.

use longshore_attention::{Error, GatesCut, HeadPattern, HeadPlan};

use HeadPattern::{BlockSparse, Dense, Streaming, VerticalSlash};

const DEFAULT: HeadPattern = VerticalSlash { vertical: 1000, slash: 6096 };

fn read(text: &str) -> Result<HeadPlan, Error> {
    HeadPlan::from_minference_json(text, 2, 4, 2)
}

#[test]
fn minference_files() {
    let text = r#"[
        {"0": ["vertical_and_slash", 30, 800, 0.98], "2": ["stream_llm", 100, 800, 1], "3": ["block_sparse", 1000, 6096, 1.0]},
        {"1": ["dense", 0, 0, 1]}
    ]"#;
    let plan = read(text).unwrap();
    assert_eq!((plan.layers(), plan.heads()), (2, 4));
    let first = [
        VerticalSlash { vertical: 30, slash: 800 },
        DEFAULT,
        Streaming { sink: 100, recent: 800 },
        BlockSparse { top: 100 },
    ];
    assert_eq!(plan.layer(0), first);
    assert_eq!(plan.layer(1), [DEFAULT, Dense, DEFAULT, DEFAULT]);
    let written = plan.to_minference_json();
    assert_eq!(read(&written).unwrap(), plan, "{written}");
    assert_eq!(read(&written).unwrap().digest(), plan.digest());
}

#[track_caller]
fn refused(plan: Result<HeadPlan, Error>, says: &str) {
    match plan {
        Err(Error::Invalid { problem, .. }) => {
            assert!(problem.contains(says), "{problem} does not say {says}");
            assert!(problem.len() < 500, "{} bytes", problem.len());
        }
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn hostile_minference_files() {
    let head = |entry: &str| format!(r#"[{{"0": {entry}}}, {{}}]"#);
    refused(read(""), "no list of layers");
    refused(read("{}"), "no list of layers");
    refused(read("[{}]"), "has 1 layers, the model has 2");
    refused(read("[{}, {}, {}]"), "has 3 layers");
    refused(read("[{}, 7]"), "no list of layers");
    refused(read(r#"[{"4": ["dense", 0, 0, 1]}, {}]"#), "valid are 0 to 3");
    refused(read(r#"[{"-1": ["dense", 0, 0, 1]}, {}]"#), "valid are 0 to 3");
    refused(read(r#"[{"+1": ["dense", 0, 0, 1]}, {}]"#), "valid are 0 to 3");
    refused(read(r#"[{"one": ["dense", 0, 0, 1]}, {}]"#), "valid are 0 to 3");
    refused(read(r#"[{"1": ["dense", 0, 0, 1], "1": ["dense", 0, 0, 1]}, {}]"#), "twice");
    refused(read(r#"[{"1": ["dense", 0, 0, 1], "01": ["dense", 0, 0, 1]}, {}]"#), "twice");
    refused(read(&head(r#"["flash", 1, 1, 1]"#)), "vertical_and_slash, stream_llm, block_sparse, dense");
    refused(read(&head(r#"["vertical_and_slash", 1, 1]"#)), "[type, first, second, score]");
    refused(read(&head(r#"["vertical_and_slash", 1, 1, 1, 1]"#)), "[type, first, second, score]");
    refused(read(&head("7")), "[type, first, second, score]");
    for budget in ["-1", "1.5", "1e30", "16777217", "\"7\"", "null", "[[[[]]]]"] {
        let entry = format!(r#"["vertical_and_slash", {budget}, 1, 1]"#);
        refused(read(&head(&entry)), "whole number from 0 to 16777216");
    }
    refused(read(&"[".repeat(1 << 20)), "no list of layers");
    refused(read(&"\u{0}z".repeat(1 << 19)), "no list of layers");
    refused(read(&" ".repeat((16 << 20) + 1)), "limit");
    refused(read(&head(&format!(r#"["{}", 1, 1, 1]"#, "x".repeat(1 << 20)))), "must be one of");
    refused(HeadPlan::from_minference_json("[]", 0, 4, 2), "0 layers");
    refused(HeadPlan::from_minference_json("[{}]", 1, 5, 2), "5 query");
}

#[test]
fn plans_put_together() {
    refused(HeadPlan::new(Vec::new()), "layers");
    refused(HeadPlan::new(vec![Vec::new()]), "at least one");
    refused(HeadPlan::new(vec![vec![Dense], vec![Dense; 2]]), "same number");
    refused(HeadPlan::new(vec![vec![BlockSparse { top: 1 << 25 }]]), "limit");
}

const GATES: &str = "0.1\t0.9\n0.5\t0.5\n1\t0\n";

fn duo(text: &str, cut: GatesCut) -> Result<HeadPlan, Error> {
    HeadPlan::from_duo_tsv(text, cut, 64, 256, 3, 2)
}

/// Which heads are dense.
fn dense(cut: GatesCut) -> [bool; 6] {
    let plan = duo(GATES, cut).unwrap();
    let heads: Vec<bool> = (0..3)
        .flat_map(|layer| plan.layer(layer).to_vec())
        .map(|pattern| match pattern {
            Dense => true,
            pattern => {
                assert_eq!(pattern, Streaming { sink: 64, recent: 256 });
                false
            }
        })
        .collect();
    heads.try_into().unwrap()
}

#[test]
fn duo_files() {
    assert_eq!(dense(GatesCut::Threshold(0.5)), [false, true, true, true, true, false]);
    assert_eq!(dense(GatesCut::Threshold(0.0)), [true; 6]);
    assert_eq!(dense(GatesCut::Threshold(1.0)), [false, false, false, false, true, false]);
    // Sorted 0, 0.1, 0.5, 0.5, 0.9, 1: the quantile at 0.7 is 0.7, at 0.5 is 0.5.
    assert_eq!(dense(GatesCut::Sparsity(0.7)), [false, true, false, false, true, false]);
    assert_eq!(dense(GatesCut::Sparsity(0.5)), [false, true, true, true, true, false]);
    assert_eq!(dense(GatesCut::Sparsity(0.0)), [true; 6]);
    assert_eq!(dense(GatesCut::Sparsity(1.0)), [false; 6]);
}

#[test]
fn hostile_duo_files() {
    let cut = GatesCut::Sparsity(0.5);
    refused(duo("", cut), "has 0 lines, the model has 3 layers");
    refused(duo("0.1\t0.9\n", cut), "has 1 lines");
    refused(duo("0.1\t0.9\n0.5\n1\t0\n", cut), "has 1 columns in line 1");
    refused(duo("0.1\t0.9\n0.5\t1\t1\n1\t0\n", cut), "has 3 columns in line 1");
    for value in ["x", "nan", "inf", "-0.1", "1.01"] {
        refused(duo(&GATES.replace("0.9", value), cut), "number from 0 to 1");
    }
    refused(duo(&"garbage ".repeat(1 << 17), cut), "lines");
    for cut in [GatesCut::Sparsity(-0.1), GatesCut::Threshold(1.5), GatesCut::Threshold(f64::NAN)] {
        refused(duo(GATES, cut), "from 0 to 1");
    }
    refused(HeadPlan::from_duo_tsv(GATES, GatesCut::Sparsity(0.5), 1 << 30, 256, 3, 2), "budget");
}
