//! Every crate that is built in comes from a registry under a licence that deny.toml allows. Works without cargo-deny.

use std::collections::BTreeSet;

use cargo_metadata::MetadataCommand;
use longshore_tests::tree::root;

/// The `allow` list of deny.toml.
fn allowed() -> BTreeSet<String> {
    let text = std::fs::read_to_string(root().join("deny.toml")).expect("deny.toml is there");
    let line = text.lines().find(|line| line.starts_with("allow = [")).expect("deny.toml allows licences");
    line.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Whether an SPDX expression can be satisfied by allowed licences.
fn satisfied(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let part = |text: &str| allowed.contains(text.trim().trim_matches(['(', ')']).trim());
    let either = |text: &str| text.replace('/', " OR ").split(" OR ").any(part);
    if expression.contains('(') {
        // The only brackets in use stand around ORs inside an AND.
        return expression.split(" AND ").all(either);
    }
    expression.replace('/', " OR ").split(" OR ").any(|alternative| alternative.split(" AND ").all(part))
}

#[test]
fn dependencies_are_licensed_and_come_from_a_registry() {
    let metadata =
        MetadataCommand::new().manifest_path(root().join("Cargo.toml")).exec().expect("cargo metadata runs");
    let allowed = allowed();
    assert!(allowed.len() > 3 && metadata.packages.len() > 100, "nothing was read");
    let mut faults = Vec::new();
    for package in metadata.packages.iter().filter(|package| package.source.is_some()) {
        let licence = package.license.clone().unwrap_or_default();
        if !satisfied(&licence, &allowed) {
            faults.push(format!("{} {}: licence `{licence}` is not allowed", package.name, package.version));
        }
        let source = package.source.as_ref().map(|source| source.repr.clone()).unwrap_or_default();
        if !source.starts_with("registry+") {
            faults.push(format!("{} {} comes from {source}", package.name, package.version));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn expressions_are_read_as_spdx_means_them() {
    let allowed = BTreeSet::from(["MIT".to_owned(), "Apache-2.0".to_owned()]);
    assert!(satisfied("MIT", &allowed));
    assert!(satisfied("GPL-3.0 OR MIT", &allowed));
    assert!(satisfied("MIT/Apache-2.0", &allowed));
    assert!(!satisfied("MIT AND GPL-3.0", &allowed));
    assert!(satisfied("(MIT OR GPL-3.0) AND Apache-2.0", &allowed));
    assert!(!satisfied("(MIT OR Apache-2.0) AND GPL-3.0", &allowed));
    assert!(!satisfied("GPL-3.0", &allowed));
    assert!(!satisfied("", &allowed));
}
