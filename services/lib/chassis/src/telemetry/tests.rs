//! Filters, counters, and the one setup of a process.

use tracing_subscriber::layer::SubscriberExt as _;

use super::*;
use crate::Kind;

#[test]
fn filters_are_checked() {
    for (filter, good) in [
        ("info", true),
        ("warn,longshore_router=debug", true),
        ("off", true),
        ("", false),
        ("  ", false),
        ("DEBUG", true),
        ("loud", false),
        ("info,longshore", false),
        ("a=loud", false),
        ("info,[", false),
    ] {
        let mut faults = Vec::new();
        TelemetryConfig { filter: filter.into(), ..Default::default() }.faults("log", &mut faults);
        assert_eq!(faults.is_empty(), good, "{filter}: {faults:?}");
        assert!(faults.iter().all(|fault| fault.key == "log.filter" && fault.problem.contains("hint:")));
    }
}

#[test]
fn warnings_and_errors_are_counted() {
    let counters = LogCounters::default();
    tracing::subscriber::with_default(tracing_subscriber::registry().with(counters.clone()), || {
        tracing::warn!("one");
        tracing::warn!("two");
        tracing::error!("three");
        tracing::info!("four");
    });
    assert_eq!((counters.warnings(), counters.errors()), (2, 1));
    let metrics = Metrics::new();
    counters.register(&metrics);
    let text = metrics.encode();
    assert!(
        text.contains("longshore_log_warnings_total 2\n") && text.contains("longshore_log_errors_total 1\n"),
        "{text}"
    );
}

/// The only test that sets up the process.
#[test]
fn logging_is_set_up_once() {
    let broken = TelemetryConfig { filter: "a=loud".into(), format: LogFormat::Json };
    assert_eq!(telemetry(&broken).unwrap_err().kind(), Kind::Setup);
    let counters = telemetry(&TelemetryConfig { filter: "off".into(), format: LogFormat::Json }).unwrap();
    let error = telemetry(&TelemetryConfig::default()).unwrap_err();
    assert!(error.to_string().contains("set up already"), "{error}");
    assert_eq!(counters.errors(), 0);
}
