//! `docs/metrics.md`: every metric that a cluster serves, made from what its processes say of themselves so that it stays true.
#![allow(clippy::unwrap_used, reason = "the whole file is test code, its helpers too")]

use std::{collections::BTreeMap, fmt::Write as _, fs};

use longshore_tests::{server::Server, tree};

/// Set, the page is written instead of compared.
const WRITE: &str = "WRITE_PAGES";

const HEAD: &str = "# Metrics

What each process serves at `/metrics` of its admin listener (`--admin`, [operations](operations.md)), in the text format of OpenMetrics. A process has the metrics of \
its role and those of all roles; `longshore up` has them all. Metrics of GPUs (`longshore_cuda_…`) are served where one is used and are described in [GPUs](cuda.md).

This page is made from running processes: `WRITE_PAGES=1 cargo nextest run --workspace -E 'binary(metrics)'` writes it anew, and the same test without the \
variable fails when it is not as it should be.
";

/// A process of each role.
const ROLES: [(&str, &str); 4] =
    [("router-0", "router"), ("prefill-0", "prefill"), ("decode-0", "decode"), ("kv-0", "kvstore")];

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

#[tokio::test(flavor = "multi_thread")]
async fn metrics_have_a_page() {
    let server = Server::up(&["--processes", "--admin", "127.0.0.1:0"]);
    let mut metrics = BTreeMap::new();
    for (id, role) in ROLES {
        let answer = reqwest::get(format!("{}/metrics", server.admin(id))).await.expect("it answers");
        assert!(answer.status().is_success(), "{id}: {}", answer.status());
        collect(&answer.text().await.unwrap(), role, &mut metrics);
    }
    for (name, metric) in &metrics {
        assert!(name.starts_with("longshore_"), "{name} is named as if it were somebody else's");
        assert!(!metric.kind.is_empty() && metric.help.len() > 8, "{name} says too little: {metric:?}");
    }
    let (made, path) = (page(&metrics), tree::root().join("docs/metrics.md"));
    if std::env::var_os(WRITE).is_some() {
        fs::write(&path, &made).expect("the page can be written");
    }
    let found = fs::read_to_string(&path).expect("the page can be read");
    let other = made.lines().zip(found.lines()).find(|(made, found)| made != found);
    assert_eq!(other, None, "made and found differ; {WRITE}=1 writes the page anew");
    assert_eq!(made, found, "{WRITE}=1 writes the page anew");
}
