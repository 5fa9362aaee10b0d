//! `docs/metrics.md`: every metric that a cluster serves, made from what its processes say of themselves so that it stays true.
#![allow(clippy::unwrap_used, reason = "the whole file is test code, its helpers too")]

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    time::{Duration, Instant},
};

use longshore_tests::{
    server::{Server, complete},
    tree,
};
use serde_json::json;

/// Set, the page is written instead of compared.
const WRITE: &str = "WRITE_PAGES";

const HEAD: &str = "# Metrics

What each process serves at `/metrics` of its admin listener (`--admin`, [operations](operations.md)), in the text format of OpenMetrics. A process has the metrics of \
its role and those of all roles; `longshore up` in one process has those of all roles but what listeners of shards count (`…_tile_…`, `…_lane_…`, streams and connections that nobody reads). Metrics of the disk tier are there with `kvstore.disk.path`, others from their first use on. Metrics of GPUs (`longshore_cuda_…`) are served where one is used and are described in [GPUs](cuda.md).

This page is made from running processes: `WRITE_PAGES=1 cargo nextest run --workspace -E 'binary(metrics)'` writes it anew, and the same test without the \
variable fails when it is not as it should be.
";

/// A process of each role, and a metric that it serves once something happened to it: the end of a request is counted behind its answer,
/// and a shard has metrics that begin when somebody asks for its state, as its supervisor does now and then.
const ROLES: [(&str, &str, Option<&str>); 4] = [
    ("router-0", "router", Some("longshore_router_requests")),
    ("prefill-0", "prefill", None),
    ("decode-0", "decode", None),
    ("kv-0", "kvstore", Some("longshore_kvstore_stalled_streams")),
];

/// Type and help of a metric, and who serves it.
#[derive(Debug, Default)]
struct Metric {
    kind: String,
    help: String,
    roles: Vec<&'static str>,
}

fn collect(text: &str, role: &'static str, into: &mut BTreeMap<String, Metric>) {
    for line in text.lines() {
        let mut words = line.splitn(4, ' ');
        let (Some("#"), Some(what), Some(name), Some(rest)) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            continue;
        };
        let metric = into.entry(name.to_owned()).or_default();
        match what {
            "HELP" => metric.help = rest.to_owned(),
            "TYPE" => metric.kind = rest.to_owned(),
            _ => {}
        }
        if !metric.roles.contains(&role) {
            metric.roles.push(role);
        }
    }
}

fn page(metrics: &BTreeMap<String, Metric>) -> String {
    let mut page = HEAD.to_owned();
    let mut sections: BTreeMap<String, Vec<(&String, &Metric)>> = BTreeMap::new();
    for (name, metric) in metrics {
        let all = metric.roles.len() == ROLES.len();
        let section = if all { "all roles".to_owned() } else { metric.roles.join(" and ") };
        sections.entry(section).or_default().push((name, metric));
    }
    for (section, metrics) in sections {
        write!(page, "\n## {section}\n\n| metric | type | what |\n| --- | --- | --- |\n").unwrap();
        for (name, metric) in metrics {
            let suffix = match metric.kind.as_str() {
                "counter" => "_total",
                "info" => "_info",
                _ => "",
            };
            writeln!(page, "| `{name}{suffix}` | {} | {} |", metric.kind, metric.help.replace('|', "\\|"))
                .unwrap();
        }
    }
    page
}

/// Names of metrics in other documents that are none. Those of GPUs are served where there is one; `…` stands for what is left out.
fn named_elsewhere(metrics: &BTreeMap<String, Metric>) -> Vec<String> {
    let is_known = |name: &str| {
        let known = |(metric, kind): (&String, &Metric)| match kind.kind.as_str() {
            "counter" => name == format!("{metric}_total"),
            "info" => name == format!("{metric}_info"),
            "histogram" => {
                name == metric
                    || name
                        .strip_prefix(metric.as_str())
                        .is_some_and(|end| ["_sum", "_count", "_bucket"].contains(&end))
            }
            _ => name == metric,
        };
        metrics.iter().any(known)
    };
    let mut unknown = Vec::new();
    for entry in
        fs::read_dir(tree::root().join("docs")).unwrap().flatten().filter(|entry| entry.path().is_file())
    {
        let text = fs::read_to_string(entry.path()).unwrap();
        for (at, _) in text.match_indices("`longshore_") {
            let rest = &text[at + 1..];
            let end = rest
                .find(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'))
                .unwrap_or(rest.len());
            let (name, after) = rest.split_at(end);
            let is_other = name.starts_with("longshore_cuda")
                || ["…", "::", "*"].iter().any(|sign| after.starts_with(sign));
            if !is_other && !is_known(name) {
                unknown.push(format!("{name} in {}", entry.file_name().to_string_lossy()));
            }
        }
    }
    unknown
}

/// What a process serves, once `last` is among it.
async fn served(server: &Server, id: &str, last: Option<&str>) -> String {
    let began = Instant::now();
    loop {
        let answer = reqwest::get(format!("{}/metrics", server.admin(id))).await.expect("it answers");
        assert!(answer.status().is_success(), "{id}: {}", answer.status());
        let text = answer.text().await.unwrap();
        if last.is_none_or(|last| text.contains(&format!("# TYPE {last} "))) {
            return text;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{id} serves no {last:?}: {text}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_have_a_page() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().to_str().unwrap();
    let server = Server::up(&["--processes", "--admin", "127.0.0.1:0", "--disk", disk]);
    // Some metrics are there from the first request on.
    complete(&server, &json!("The capital of France is"), 2).await;
    let mut metrics = BTreeMap::new();
    for (id, role, last) in ROLES {
        collect(&served(&server, id, last).await, role, &mut metrics);
    }
    for (name, metric) in &metrics {
        assert!(name.starts_with("longshore_"), "{name} is named as if it were somebody else's");
        assert!(!metric.kind.is_empty() && metric.help.len() > 8, "{name} says too little: {metric:?}");
    }
    let unknown = named_elsewhere(&metrics);
    assert!(unknown.is_empty(), "documents name metrics that nobody serves: {unknown:?}");
    let (made, path) = (page(&metrics), tree::root().join("docs/metrics.md"));
    if std::env::var_os(WRITE).is_some() {
        fs::write(&path, &made).expect("the page can be written");
    }
    let found = fs::read_to_string(&path).expect("the page can be read");
    let other = made.lines().zip(found.lines()).find(|(made, found)| made != found);
    assert_eq!(other, None, "made and found differ; {WRITE}=1 writes the page anew");
    assert_eq!(made, found, "{WRITE}=1 writes the page anew");
}
