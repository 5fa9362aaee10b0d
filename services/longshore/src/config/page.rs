//! `docs/configuration.md`: every setting with its default and what its comment says, made from the code so that it stays true.

use std::fmt::Write as _;

use longshore_chassis::config::Descriptions;
use serde_json::{Map, Value};

use super::Config;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/configuration.md");
/// Set, the page is written instead of compared.
const WRITE: &str = "WRITE_PAGES";

const HEAD: &str = "# Configuration

Every setting, its default, and what it does. Where values come from and which wins is told in [operations](operations.md#configuration). In a file a \
section is a TOML table (`[kvstore.disk]`), in the environment `kvstore.disk.path` is `LONGSHORE_KVSTORE__DISK__PATH`. Keys with the word `bytes` take units of 1,024, \
as `\"32GiB\"`, `\"32Gi\"` or `\"32g\"`.

This page is made from the source: `WRITE_PAGES=1 cargo test -p longshore settings_have_a_page` writes it anew, and the same test without the variable \
fails when it is not as it should be. `longshore up --print-config` prints the same as TOML, with the values that hold.
";

fn page() -> String {
    let descriptions = Descriptions::of::<Config>();
    let Ok(Value::Object(tree)) = serde_json::to_value(Config::default()) else {
        panic!("a configuration is a table");
    };
    let mut page = HEAD.to_owned();
    section(&tree, "", &descriptions, &mut page);
    page
}

fn section(table: &Map<String, Value>, path: &str, descriptions: &Descriptions, page: &mut String) {
    let key = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    let said = |key: &str| descriptions.get(key).unwrap_or_else(|| panic!("nothing is said of `{key}`"));
    let values: Vec<_> = table.iter().filter(|(_, value)| !value.is_object()).collect();
    if !path.is_empty() {
        write!(page, "\n## `{path}`\n\n{}\n", said(path)).unwrap();
    }
    if !values.is_empty() {
        page.push_str("\n| setting | default | what |\n| --- | --- | --- |\n");
    }
    for (name, value) in values {
        let key = key(name);
        writeln!(page, "| `{key}` | `{value}` | {} |", said(&key).replace('|', "\\|")).unwrap();
    }
    for (name, value) in table {
        if let Value::Object(table) = value {
            section(table, &key(name), descriptions, page);
        }
    }
}

#[test]
fn settings_have_a_page() {
    let made = page();
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(PAGE, &made).expect("the page can be written");
    }
    let found = std::fs::read_to_string(PAGE).expect("the page can be read");
    let other = made.lines().zip(found.lines()).find(|(made, found)| made != found);
    assert_eq!(other, None, "made and found differ; {WRITE}=1 writes the page anew");
    assert_eq!(made, found, "{WRITE}=1 writes the page anew");
}
