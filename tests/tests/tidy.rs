//! The house rules as tests: arrows between crates, owners of foreign APIs, lengths, names.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};
use longshore_tests::tree::{Source, root, sources};

/// Which crates of ours a crate may depend on (normal dependencies). Architecture, section 2.
const ARROWS: &[(&str, &[&str])] = &[
    ("longshore-compute", &[]),
    ("longshore-attention", &["longshore-compute"]),
    ("longshore-model", &["longshore-compute", "longshore-attention"]),
    ("longshore-cuda", &["longshore-compute", "longshore-attention", "longshore-model"]),
    ("longshore-blocks", &[]),
    ("longshore-routing", &["longshore-blocks"]),
    ("longshore-proto", &["longshore-blocks"]),
    ("longshore-cluster", &["longshore-blocks"]),
    ("longshore-fabric", &["longshore-proto", "longshore-attention", "longshore-blocks"]),
    ("longshore-chassis", &[]),
    (
        "longshore-engine",
        &[
            "longshore-compute",
            "longshore-attention",
            "longshore-blocks",
            "longshore-fabric",
            "longshore-model",
            "longshore-proto",
            "longshore-cluster",
            "longshore-routing",
        ],
    ),
];

const LIBRARIES: &[&str] = &[
    "longshore-compute",
    "longshore-attention",
    "longshore-model",
    "longshore-cuda",
    "longshore-blocks",
    "longshore-routing",
    "longshore-proto",
    "longshore-cluster",
    "longshore-fabric",
    "longshore-chassis",
    "longshore-engine",
];

const SERVICES: &[&str] = &["longshore-router", "longshore-prefill", "longshore-decode", "longshore-kvstore"];

/// Foreign crates and who may depend on them.
const OWNERS: &[(&str, &[&str])] = &[
    ("etcd-client", &["longshore-cluster"]),
    ("cudarc", &["longshore-cuda"]),
    (
        "tonic",
        &[
            "longshore-proto",
            "longshore-fabric",
            "longshore-router",
            "longshore-prefill",
            "longshore-decode",
            "longshore-kvstore",
        ],
    ),
    ("prost", &["longshore-proto", "longshore-fabric"]),
    ("clap", &["longshore"]),
    ("anyhow", &["longshore"]),
    ("tracing-subscriber", &["longshore-chassis"]),
    ("opentelemetry", &["longshore-chassis", "longshore-fabric"]),
    ("opentelemetry_sdk", &["longshore-chassis"]),
    ("axum", &["longshore-chassis", "longshore-router"]),
    ("reqwest", &["longshore"]),
    ("hf-hub", &["longshore"]),
];

/// Crates that may not even see an async runtime, a clock or the network.
const PURE: &[&str] = &[
    "longshore-compute",
    "longshore-attention",
    "longshore-model",
    "longshore-cuda",
    "longshore-blocks",
    "longshore-routing",
];
const IMPURE: &[&str] =
    &["tokio", "tokio-util", "tokio-stream", "futures", "tonic", "axum", "reqwest", "hyper", "async-trait"];

fn metadata() -> Metadata {
    MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo metadata runs")
}

fn normal_dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let normal = |kind| kind == DependencyKind::Normal;
    let of = |p: &cargo_metadata::Package| {
        p.dependencies.iter().filter(|d| normal(d.kind)).map(|d| d.name.clone()).collect::<BTreeSet<_>>()
    };
    metadata().packages.iter().map(|p| (p.name.to_string(), of(p))).collect()
}

fn allowed(package: &str) -> Option<BTreeSet<&'static str>> {
    if let Some((_, to)) = ARROWS.iter().find(|(from, _)| *from == package) {
        return Some(to.iter().copied().collect());
    }
    let services_see = LIBRARIES.iter().copied();
    match package {
        service if SERVICES.contains(&service) => Some(services_see.collect()),
        "longshore" | "longshore-tests" => Some(services_see.chain(SERVICES.iter().copied()).collect()),
        _ => None,
    }
}

#[test]
fn arrows_between_crates_hold() {
    let mut faults = Vec::new();
    for (package, dependencies) in normal_dependencies() {
        let Some(allowed) = allowed(&package) else {
            faults.push(format!(
                "{package} is not in the architecture: add it to tidy and docs/architecture.md"
            ));
            continue;
        };
        let ours = dependencies.iter().filter(|d| d.starts_with("longshore"));
        faults.extend(
            ours.filter(|d| !allowed.contains(d.as_str()))
                .map(|d| format!("{package} may not depend on {d}")),
        );
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn foreign_apis_have_one_owner() {
    let mut faults = Vec::new();
    for (package, dependencies) in normal_dependencies() {
        for (foreign, owners) in OWNERS {
            if dependencies.contains(*foreign)
                && !owners.contains(&package.as_str())
                && package != "longshore-tests"
            {
                faults.push(format!("{package} may not depend on {foreign}: only {owners:?}"));
            }
        }
        if PURE.contains(&package.as_str()) {
            let impure = IMPURE.iter().filter(|i| dependencies.contains(**i));
            faults.extend(
                impure.map(|i| format!("{package} decides and does no I/O: it may not depend on {i}")),
            );
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn services_touch_tonic_only_in_their_grpc_module() {
    let offends = |s: &&Source| {
        let service = ["services/router/", "services/prefill/", "services/decode/", "services/kvstore/"];
        service.iter().any(|folder| s.path.starts_with(folder))
            && !s.path.contains("/grpc")
            && s.product_lines().iter().any(|l| l.contains("tonic::") || l.contains("prost::"))
    };
    let faults: Vec<_> =
        sources().into_iter().filter(|s| s.is_product()).filter(|s| offends(&s)).map(|s| s.path).collect();
    assert!(faults.is_empty(), "tonic outside grpc.rs: {faults:?}");
}

#[test]
fn every_service_has_the_same_files() {
    let mut faults = Vec::new();
    for service in ["router", "prefill", "decode", "kvstore"] {
        for file in ["lib.rs", "config.rs", "grpc.rs", "service.rs", "error.rs", "metrics.rs"] {
            if !root().join("services").join(service).join("src").join(file).is_file() {
                faults.push(format!("services/{service}/src/{file} is missing"));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// Text that may stand only below some folders, with the reason.
const BANNED: &[(&str, &[&str], &str)] = &[
    (
        "unsafe {",
        &["kernels/", "services/lib/fabric/src/shm/"],
        "unsafe lives in kernels/ and the lanes that need it",
    ),
    (
        "std::env::",
        // The self-test's models lie in temporary files.
        &["services/lib/chassis/", "services/longshore/", "kernels/cuda/src/model/checks/"],
        "environment is read by chassis and the binary",
    ),
    // OpenAI answers carry the time of day; nothing is decided by it.
    (
        "SystemTime::now",
        &["services/lib/chassis/", "services/longshore/", "services/router/src/http.rs"],
        "time is passed in",
    ),
    ("unbounded_channel", &[], "every queue has a bound"),
    ("todo!(", &[], "no stubs"),
    ("unimplemented!(", &[], "no stubs"),
    (
        "println!",
        &["services/longshore/src/console.rs", "services/longshore/src/console/"],
        "the binary's console module prints",
    ),
    ("thread::sleep", &["services/longshore/"], "waiting is the caller's business"),
];

#[test]
fn banned_text_stays_out() {
    let mut faults = Vec::new();
    for source in sources().iter().filter(|s| s.is_product()) {
        for (text, allowed, reason) in BANNED {
            if allowed.iter().any(|folder| source.path.starts_with(folder)) {
                continue;
            }
            for (at, line) in source.product_lines().iter().enumerate() {
                if line.contains(text) {
                    faults.push(format!("{}:{}: `{text}`: {reason}", source.path, at + 1));
                }
            }
        }
        if source.path.starts_with("kernels/")
            && source.product_lines().iter().any(|l| l.contains("Instant::now"))
        {
            faults.push(format!("{}: kernels know no clock", source.path));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn names_say_what_they_hold() {
    let mut faults = Vec::new();
    for source in sources() {
        let stem =
            source.path.rsplit('/').next().and_then(|f| f.strip_suffix(".rs")).unwrap_or_default().to_owned();
        let folder_named = |name: &str| source.path.contains(&format!("/{name}/"));
        for banned in ["utils", "util", "common", "helpers", "misc"] {
            if stem == banned || folder_named(banned) {
                faults.push(format!("{}: no module is called {banned}", source.path));
            }
        }
        if stem == "mod" {
            faults.push(format!("{}: write foo.rs beside foo/", source.path));
        }
        if source.is_product() && !source.text.starts_with("//!") {
            faults.push(format!("{}: a file begins with `//!` and what it owns", source.path));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut pages = vec![root().join("README.md")];
    for folder in ["docs", "docs/adr"] {
        let entries = std::fs::read_dir(root().join(folder)).expect("the documents are there").flatten();
        pages.extend(
            entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "md")),
        );
    }
    let mut faults = Vec::new();
    for page in &pages {
        let text = std::fs::read_to_string(page).expect("a page is UTF-8");
        let folder = page.parent().expect("a page lies in a folder");
        for target in text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next()) {
            if !target.is_empty() && !target.contains("://") && !folder.join(target).exists() {
                faults.push(format!("{}: {target} does not exist", page.display()));
            }
        }
    }
    assert!(pages.len() > 5 && faults.is_empty(), "{}", faults.join("\n"));
}

const FILE_LINES_MAX: usize = 800;
const FILE_LINES_REVIEW: usize = 500;
const FUNCTION_LINES_MAX: usize = 70;

/// What is too long today. It may shrink and disappear, never grow: mend the code rather than this list.
const RATCHET: &[(&str, usize)] = &[];

#[test]
fn files_stay_short() {
    let mut faults = Vec::new();
    for source in sources() {
        let lines = source.text.lines().count();
        let limit =
            RATCHET.iter().find(|(path, _)| *path == source.path).map_or(FILE_LINES_REVIEW, |(_, n)| *n);
        if lines > limit || lines > FILE_LINES_MAX {
            faults.push(format!("{}: {lines} lines, limit {limit}", source.path));
        }
    }
    let gone = RATCHET.iter().filter(|(path, _)| !root().join(path).is_file());
    faults.extend(gone.map(|(path, _)| format!("{path} is gone: take it off the ratchet")));
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn functions_stay_short() {
    let mut faults = Vec::new();
    for source in sources().iter().filter(|s| s.is_product()) {
        for (line, name, lines) in source.functions() {
            if lines > FUNCTION_LINES_MAX {
                faults.push(format!(
                    "{}:{line}: fn {name} has {lines} lines, limit {FUNCTION_LINES_MAX}",
                    source.path
                ));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn the_function_ruler_measures() {
    let text = "fn short() {}\n\npub(crate) async fn long(\n    a: u8,\n) -> u8 {\n    a\n}\n".to_owned();
    let source = Source { path: "x.rs".into(), text };
    assert_eq!(source.functions(), vec![(3, "long".to_owned(), 5)]);
}
