//! What the exposition looks like.

use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};

use super::*;

#[test]
fn families_of_two_instances_appear_once() {
    let metrics = Metrics::new();
    let counts: Vec<Counter> = ["kv-0", "kv-1"]
        .iter()
        .map(|id| {
            let counter = Counter::default();
            let scoped = metrics.labelled("id", id).sub("longshore").sub("kvstore");
            scoped.register("blocks", "Blocks stored", counter.clone());
            scoped.with(|registry| registry.register("pause_seconds", "Pauses", Histogram::new([0.1])));
            counter
        })
        .collect();
    counts[1].inc_by(3);
    let text = metrics.encode();
    assert_eq!(text.matches("# TYPE longshore_kvstore_blocks counter").count(), 1, "{text}");
    assert_eq!(text.matches("# HELP longshore_kvstore_blocks ").count(), 1, "{text}");
    assert!(
        text.contains(
            "longshore_kvstore_blocks_total{id=\"kv-0\"} 0\nlongshore_kvstore_blocks_total{id=\"kv-1\"} 3\n"
        ),
        "{text}"
    );
    assert!(text.contains("longshore_kvstore_pause_seconds_bucket{id=\"kv-1\",le=\"0.1\"} 0"), "{text}");
    assert!(text.ends_with("# EOF\n") && text.matches("# EOF").count() == 1);
}

#[test]
fn values_and_builds_are_shown() {
    let metrics = Metrics::new();
    assert_eq!(metrics.encode(), "# EOF\n");
    metrics.register_build("0.1.0");
    let gauge: Gauge = Gauge::default();
    metrics.register("longshore_test_depth", "Depth", gauge.clone());
    gauge.set(-4);
    let text = metrics.encode();
    assert!(text.contains("longshore_build_info{version=\"0.1.0\"} 1"), "{text}");
    assert!(
        text.contains("# HELP longshore_test_depth Depth.\n") && text.contains("longshore_test_depth -4\n"),
        "{text}"
    );
}

#[test]
fn label_values_may_hold_anything() {
    let metrics = Metrics::new();
    let gauge: Gauge = Gauge::default();
    metrics.labelled("id", "a\"b\\c # d\n# EOF").register("longshore_test_odd", "Odd", gauge);
    let text = metrics.encode();
    assert_eq!(text.lines().count(), 4, "{text}");
}
