//! Policies as text: presets, fingerprints, and what is refused.

use longshore_attention::{Error, HeadPattern, HeadPlan, PrefillPolicy};

use crate::case::policy;
use crate::cuts::policies;

fn plan(first: HeadPattern) -> HeadPlan {
    HeadPlan::new(vec![vec![first, HeadPattern::Dense]; 2]).unwrap()
}

#[test]
fn every_name_makes_a_policy() {
    let plan = plan(HeadPattern::Dense);
    for (name, about) in PrefillPolicy::names() {
        let policy = PrefillPolicy::parse(name, Some(&plan)).unwrap();
        assert_eq!(policy.is_exact(), *name == "exact");
        assert!(!about.is_empty());
    }
    assert_eq!(policy("exact"), PrefillPolicy::exact());
}

#[test]
fn presets_are_values_of_blocks() {
    let text = "blocks:scorer=row-normalised,selector=mass,gamma=0.9,max_blocks=64,correction=on,sink=2,local=4,escape=off,peak=0.25,\
                dense_layers=0,min_positions=4096,last_tiles=4,skip=off";
    assert_eq!(policy("balanced").fingerprint(), text);
    assert_eq!(policy("fast"), policy("blocks:alpha=0.1,dense_layers=0,skip=12"));
    assert_eq!(policy("balanced:peak=off").fingerprint(), text.replace(",peak=0.25", ""));
    assert_eq!(policy("balanced:max_blocks=off").fingerprint(), text.replace(",max_blocks=64", ""));
    assert_ne!(policy("balanced"), policy("faithful"));
    assert_eq!(policy("faithful").last_tiles(), 8);
    assert_eq!(policy("fast:skip=7.5").skip_below(), Some(7.5));
    assert_eq!(
        policy(" fast : alpha = 0.2 , skip=off".replace(" :", ":").trim()),
        policy("fast:alpha=0.2,skip=off")
    );
    assert_eq!(policy("exact").fingerprint(), "exact");
    assert_eq!(policy("balanced:levels=1").fingerprint(), text, "one level says nothing");
    assert_eq!(policy("balanced:levels=2").fingerprint(), text.replace("peak=0.25", "peak=0.25,levels=2"));
    let told = PrefillPolicy::parse("xattention:levels=2", None).unwrap_err().to_string();
    assert!(told.contains("`levels`"), "antidiagonal sums have no mean keys to bound: {told}");
}

#[test]
fn fingerprints_read_back() {
    let mut all = policies();
    let texts = ["exact", "faithful", "fast", "xattention", "flexprefill", "minference", "streaming"];
    all.extend(texts.map(policy));
    all.extend(
        [
            "fast:levels=2",
            "balanced:levels=2",
            "balanced:max_blocks=12",
            "fast:max_blocks=12",
            "fast:alpha=0.30000001",
            "fast:alpha=0",
            "fast:alpha=-0",
            "balanced:escape=-0.5",
            "balanced:peak=1",
        ]
        .map(policy),
    );
    for one in &all {
        let text = one.fingerprint();
        assert_eq!(text, one.to_string());
        if !text.contains("plan=") {
            assert_eq!(&policy(&text), one, "{text}");
        }
        for other in &all {
            assert_eq!(one == other, text == other.fingerprint(), "{text} and {other}");
        }
    }
}

#[test]
fn a_head_plan_is_part_of_the_fingerprint() {
    let (one, other) = (plan(HeadPattern::Dense), plan(HeadPattern::BlockSparse { top: 7 }));
    let policy = PrefillPolicy::parse("heads", Some(&one)).unwrap();
    assert_ne!(policy.fingerprint(), PrefillPolicy::parse("heads", Some(&other)).unwrap().fingerprint());
    assert_eq!(PrefillPolicy::parse(&policy.fingerprint(), Some(&one)).unwrap(), policy);
    assert!(policy.fingerprint().contains(&one.digest()));
    let wrong = PrefillPolicy::parse(&policy.fingerprint(), Some(&other));
    assert!(matches!(wrong, Err(Error::Invalid { field: "plan", .. })), "{wrong:?}");
    assert_eq!(PrefillPolicy::parse("minference", Some(&one)).unwrap(), policy);
}

#[test]
fn chunks_are_multiples() {
    for (text, multiple) in
        [("exact", 64), ("balanced", 64), ("streaming", 64), ("minference", 512), ("flexprefill", 512)]
    {
        assert_eq!(policy(text).chunk_multiple(), multiple, "{text}");
    }
    let slashes = plan(HeadPattern::VerticalSlash { vertical: 1, slash: 1 });
    assert_eq!(PrefillPolicy::parse("heads", Some(&slashes)).unwrap().chunk_multiple(), 512);
    assert_eq!(PrefillPolicy::parse("heads", Some(&plan(HeadPattern::Dense))).unwrap().chunk_multiple(), 64);
}

#[track_caller]
fn refused(text: &str, field: &str, lists: &str) {
    match PrefillPolicy::parse(text, None) {
        Err(Error::Invalid { field: found, problem }) => {
            assert_eq!(found, field, "{text}: {problem}");
            assert!(problem.contains(lists), "{problem} does not say {lists}");
            assert!(problem.len() < 500, "{} bytes", problem.len());
        }
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn hostile_texts() {
    refused("", "policy", "exact, faithful, balanced");
    refused(":", "policy", "exact, faithful, balanced");
    refused("Balanced", "policy", "balanced");
    refused("balanced:alpha", "policy", "key=value");
    refused("balanced:,", "policy", "key=value");
    refused("fast:alpha=0.1,alpha=0.1", "policy", "twice");
    refused("fast:beta=1", "policy", "it has: plan, scorer, selector, alpha");
    refused("fast:peak=0.5", "policy", "escape");
    refused("balanced:peak=0", "peak", "off");
    refused("fast:gamma=0.5", "policy", "alpha");
    refused("balanced:stride=8", "policy", "scorer");
    refused("exact:alpha=1", "policy", "");
    refused(
        "blocks:scorer=best",
        "scorer",
        "pooled, row-normalised, second-order, pooled-query, antidiagonal",
    );
    refused("blocks:selector=best", "selector", "alpha, mass, top-k");
    refused("blocks:scorer=antidiagonal,stride=12", "stride", "8, 16");
    refused("balanced:correction=yes", "correction", "on, off");
    for alpha in ["-0.1", "1.1", "nan", "inf", "", "x", "1e-1x"] {
        refused(&format!("fast:alpha={alpha}"), "alpha", "from 0 to 1");
    }
    refused("balanced:escape=2", "escape", "off");
    for most in ["0", "-1", "1.5", "16777217", "none"] {
        refused(&format!("balanced:max_blocks={most}"), "max_blocks", "from 1 to 16777216, or off");
    }
    refused("balanced:skip=0", "skip", "off");
    refused("blocks:selector=top-k,k=-1", "k", "from 0 to");
    refused("blocks:selector=mass,gamma=1.5", "gamma", "from 0 to 1");
    refused("balanced:last_tiles=99999999999", "last_tiles", "from 0 to 16777216");
    refused("balanced:min_positions=1.5", "min_positions", "from 0 to");
    refused("flexprefill:tau=-0.1", "tau", "from 0 to 1");
    refused("flexprefill:gamma=NaN", "gamma", "from 0 to 1");
    refused("flexprefill:alpha=0.1", "policy", "gamma, tau, budget");
    refused("balanced:plan=on", "plan", "`off`");
    refused("streaming:recent=0", "recent", "from 1 to");
    refused("minference:vertical=-3", "vertical", "from 0 to");
    refused("heads", "plan", "needs a head plan");
    refused(&"g".repeat(1 << 20), "policy", "limit 4096");
    refused(&"balanced:".repeat(400), "policy", "key=value");
    refused("fast:alpha=\u{1b}[2J", "alpha", "\\u{1b}");
}
