//! Layers, their faults, and the round trip through `render`.

use std::collections::BTreeMap;

use proptest::prelude::*;
use schemars::JsonSchema;
use serde::Deserialize;

use super::*;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Server {
    listen: String,
    limit_bytes: u64,
    port: u16,
    ratio: f32,
    verbose: bool,
    kind: Flavour,
    token: Secret<String>,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:1".into(),
            limit_bytes: 7,
            port: 80,
            ratio: 0.1,
            verbose: false,
            kind: Flavour::Plain,
            token: Secret::new("from-default".into()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Flavour {
    Plain,
    Fancy,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Tls {
    cert: String,
    days: u32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Config {
    name: String,
    alias: Option<String>,
    seed: Option<u64>,
    members: Vec<String>,
    labels: BTreeMap<String, i64>,
    tls: Option<Tls>,
    server: Server,
    backup: Server,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: "x".into(),
            alias: None,
            seed: None,
            members: vec![],
            labels: BTreeMap::new(),
            tls: None,
            server: Server::default(),
            // Differs from the default of its type, so that a lost outer default shows.
            backup: Server { port: 81, listen: "backup:1".into(), ..Server::default() },
        }
    }
}

impl Validate for Server {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        check_range(faults, path, "limit_bytes", self.limit_bytes, 1..=1000);
        if self.listen.is_empty() {
            faults.push(Fault::new(path, "listen", "is empty"));
        }
    }
}

impl Validate for Config {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        self.server.faults(&join(path, "server"), faults);
        self.backup.faults(&join(path, "backup"), faults);
        for (index, _) in self.members.iter().enumerate().filter(|(_, member)| member.is_empty()) {
            faults.push(Fault::new(path, &format!("members[{index}]"), "is empty"));
        }
    }
}

fn sources(
    file: Option<&str>,
    env: &[(&str, &str)],
    sets: &[&str],
) -> (Sources, Option<tempfile::NamedTempFile>) {
    let held = file.map(|text| {
        let held = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(held.path(), text).unwrap();
        held
    });
    let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let sets = sets.iter().map(|set| Setting::from((*set).to_owned())).collect();
    (Sources::new(held.as_ref().map(|held| held.path().to_owned()), env, sets), held)
}

fn check(file: Option<&str>, env: &[(&str, &str)], sets: &[&str]) -> Result<Config, ConfigError> {
    let (sources, _held) = sources(file, env, sets);
    load(&sources)
}

/// Loads what must fail and returns its faults as text.
fn faults(file: Option<&str>, env: &[(&str, &str)], sets: &[&str]) -> Vec<String> {
    check(file, env, sets).unwrap_err().faults().iter().map(ToString::to_string).collect()
}

#[test]
fn defaults_alone_are_the_default() {
    assert_eq!(load::<Config>(&Sources::default()).unwrap(), Config::default());
    assert_eq!(check(Some(""), &[], &[]).unwrap(), Config::default());
}

#[test]
fn later_layers_win_key_by_key() {
    let file =
        "name = 'file'\n[server]\nport = 1\nlimit_bytes = 11\nlisten = 'file:1'\n[backup]\nverbose = true\n";
    let env = [("LONGSHORE_SERVER__PORT", "2"), ("LONGSHORE_SERVER__LISTEN", "127.0.0.1:9000")];
    let config = check(Some(file), &env, &["server.port=3", "server.port = 4"]).unwrap();
    assert_eq!(config.name, "file");
    assert_eq!((config.server.port, config.server.limit_bytes), (4, 11));
    assert_eq!(config.server.listen, "127.0.0.1:9000");
    assert_eq!((config.backup.verbose, config.backup.port), (true, 81));
    assert_eq!(config.backup.listen, "backup:1", "the rest of a section keeps the outer default");
}

#[test]
fn text_is_toml_or_else_a_string() {
    let config = check(
        None,
        &[
            ("LONGSHORE_NAME", "123"),
            ("LONGSHORE_MEMBERS", "['a', 'b=c']"),
            ("LONGSHORE_SERVER__VERBOSE", "true"),
        ],
        &[
            "alias=1.50",
            "seed=9",
            "server.ratio=2",
            "server.kind=fancy",
            "labels.a=1",
            "labels.b=-2",
            "backup.listen=a=b",
        ],
    )
    .unwrap();
    assert_eq!((config.name.as_str(), config.alias.as_deref(), config.seed), ("123", Some("1.50"), Some(9)));
    assert_eq!(config.members, ["a", "b=c"]);
    assert_eq!((config.server.ratio, config.server.kind), (2.0, Flavour::Fancy));
    assert_eq!(config.labels, BTreeMap::from([("a".into(), 1), ("b".into(), -2)]));
    assert_eq!(config.backup.listen, "a=b");
    for (text, expected) in
        [("\"quoted\"", "quoted"), ("nan", "nan"), ("1\nname = 2", "1\nname = 2"), ("[1", "[1"), ("", "")]
    {
        assert_eq!(check(None, &[("LONGSHORE_NAME", text)], &[]).unwrap().name, expected);
    }
    let config = check(None, &[], &["server={port=5, verbose=true}", "tls.days=3", "tls.cert=c"]).unwrap();
    assert_eq!((config.server.port, config.server.verbose), (5, true));
    assert_eq!(config.tls, Some(Tls { cert: "c".into(), days: 3 }));
}

#[test]
fn all_faults_of_all_layers_are_told_at_once() {
    let file = "nam = 'a'\n[server]\nport = 'x'\nlimit_bytes = 0\n";
    let env = [("LONGSHORE_SERVER__LISTE", "a"), ("LONGSHORE_BACKUP__PORT", "70000")];
    let (sources, held) =
        sources(Some(file), &env, &["backup.verbose=perhaps", "oops", "members=['']", "server.kind=odd"]);
    let error = load::<Config>(&sources).unwrap_err();
    let file_origin = Origin::File(held.unwrap().path().to_owned());
    let env_origin = |name: &str| Origin::Environment(name.to_owned());
    let got: Vec<(&Origin, &str)> =
        error.faults().iter().map(|fault| (&fault.origin, fault.key.as_str())).collect();
    let expected = [
        (&file_origin, "nam"),
        (&env_origin("LONGSHORE_SERVER__LISTE"), "server.liste"),
        (&Origin::Set, ""),
        (&file_origin, "server.port"),
        (&env_origin("LONGSHORE_BACKUP__PORT"), "backup.port"),
        (&Origin::Set, "backup.verbose"),
        (&Origin::Set, "server.kind"),
        (&file_origin, "server.limit_bytes"),
        (&Origin::Set, "members[0]"),
    ];
    assert_eq!(got, expected, "{error}");
    let text = error.to_string();
    assert!(text.starts_with("the configuration has 9 faults:"), "{text}");
    assert!(
        text.contains("hint: did you mean `name`?") && text.contains("hint: did you mean `server.listen`?"),
        "{text}"
    );
    assert!(
        text.contains("(environment LONGSHORE_BACKUP__PORT) cannot be read: invalid value: integer `70000`"),
        "{text}"
    );
    assert!(text.contains("is 0, must be from 1 to 1000"), "{text}");
}

#[test]
fn hints_find_slips_and_moved_keys() {
    let hint = |set: &str| faults(None, &[], &[set]).remove(0);
    assert!(hint("server.prot=1").contains("`server.port`"));
    assert!(hint("tls_cert=1").contains("--print-config"));
    assert!(hint("verbose=1").contains("`backup.verbose`") || hint("verbose=1").contains("`server.verbose`"));
    assert!(hint("zzzzzzzzzzzz=1").contains("--print-config"));
    assert!(hint("server=1").contains("is a section"));
    assert!(hint("server.port.x=1").contains("is a single value"));
    assert!(hint("tls.dayz=1").contains("unknown field `dayz`"));
}

#[test]
fn hostile_text_is_refused_or_taken_as_it_is() {
    for set in ["", "=", "=1", ".=1", "a..b=1", "server.=1", &format!("{}=1", vec!["a"; 100].join("."))] {
        assert_eq!(faults(None, &[], &[set]).len(), 1, "{set}");
    }
    for variable in ["LONGSHORE_", "LONGSHORE___NAME", "LONGSHORE_SERVER__", "LONGSHORE_SERVER____PORT"] {
        assert_eq!(faults(None, &[(variable, "1")], &[]).len(), 1, "{variable}");
    }
    for file in
        ["x", "[server", "name = 1979", "server = 3", "[server.port]\nx = 1", "[[server]]\nport = 1", "\u{0}"]
    {
        assert_eq!(faults(Some(file), &[], &[]).len(), 1, "{file}");
    }
    assert_eq!(faults(Some("labels = { a = inf }"), &[], &[]).len(), 1);
    assert!(faults(Some("name = 'a'\nsecret = = hunter2"), &[], &[])[0].contains("line 2"));
    assert!(!faults(Some("name = 'a'\nsecret = = hunter2"), &[], &[])[0].contains("hunter2"));
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let missing = Sources { file: Some("/nonexistent/longshore.toml".into()), ..Sources::default() };
    let text = load::<Config>(&missing).unwrap_err().to_string();
    assert!(text.contains("file /nonexistent/longshore.toml: cannot be read"), "{text}");
    assert!(faults(Some(&"#\n".repeat(1 << 20)), &[], &[])[0].contains("at most 1048576"));
    let held = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(held.path(), [b'a', 0xff]).unwrap();
    let latin = Sources { file: Some(held.path().to_owned()), ..Sources::default() };
    assert_eq!(load::<Config>(&latin).unwrap_err().faults().len(), 1);
}

#[test]
fn other_variables_are_passed_over() {
    let env = [
        ("PATH", "/bin"),
        ("LONGSHORE_CACHE", "/tmp"),
        ("LONGSHORE_CONFIG", "a.toml"),
        ("LONGSHORE_ROUTER_SERVICE_HOST", "10.0.0.1"),
        ("LONGSHORE_ROUTER_SERVICE_PORT_HTTP", "80"),
        ("LONGSHORE_ROUTER_PORT", "tcp://10.0.0.1:80"),
        ("LONGSHORE_ROUTER_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("LONGSHORE_SERVICE_HOST", "10.0.0.1"),
        ("LONGSHORE_SERVICE_PORT", "9000"),
        ("LONGSHORE_PORT", "tcp://10.0.0.1:9000"),
        ("LONGSHORE_PORT_9000_TCP", "tcp://10.0.0.1:9000"),
        ("LONGSHORE_PORT_9000_TCP_PROTO", "tcp"),
    ];
    assert_eq!(check(None, &env, &[]).unwrap(), Config::default());
    let sources = Sources::new(None, [("LONGSHORE_OTHER".to_owned(), "1".to_owned())], vec![]);
    assert!(load::<Config>(&sources).is_err());
    assert!(load::<Config>(&sources.reserve("LONGSHORE_OTHER")).is_ok());
}

#[test]
fn flags_are_named_as_they_were_typed() {
    let typed = Setting { text: "server.port=x".to_owned(), flag: Some("--port") };
    let error = load::<Config>(&Sources::new(None, [], vec![typed])).unwrap_err();
    let told = error.to_string();
    assert!(told.contains("`server.port` (--port) cannot be read"), "{told}");
    assert!(told.contains("expected a whole number from 0 to 65535"), "{told}");
}

#[test]
fn numbers_of_bytes_may_have_units_in_every_layer() {
    let config = check(Some("[server]\nlimit_bytes = '500 B'\n"), &[], &[]).unwrap();
    assert_eq!(config.server.limit_bytes, 500);
    let config = check(None, &[("LONGSHORE_SERVER__LIMIT_BYTES", "0.5KiB")], &[]).unwrap();
    assert_eq!(config.server.limit_bytes, 512);
    assert_eq!(check(None, &[], &["server.limit_bytes=9b"]).unwrap().server.limit_bytes, 9);
    for wrong in ["4 parsecs", "''", "1.5"] {
        let told = faults(None, &[], &[&format!("server.limit_bytes={wrong}")]);
        assert!(told[0].starts_with("`server.limit_bytes` (--set) "), "{told:?}");
    }
    let told = faults(None, &[], &["server.limit_bytes=4GB"]);
    assert!(
        told[0].contains("is `4GB`, must be a number of bytes") && told[0].contains("`32GiB`"),
        "{told:?}"
    );
}

#[test]
fn secrets_are_read_and_never_shown() {
    let config = check(None, &[("LONGSHORE_SERVER__TOKEN", "12345")], &[]).unwrap();
    assert_eq!(config.server.token.expose(), "12345");
    assert_eq!(config.backup.token.expose(), "from-default");
    for text in [render(&config), format!("{config:?}"), serde_json::to_string(&config).unwrap()] {
        assert!(!text.contains("12345") && text.contains(REDACTED), "{text}");
    }
    let printed = faults(Some("[server]\ntoken = '<redacted>'"), &[], &[]);
    assert!(printed[0].contains("hint: write the secret itself"), "{printed:?}");
}

#[test]
fn rendering_shows_every_key() {
    let text = render(&Config::default());
    for line in [
        "# alias = (not set)",
        "# tls = (not set)",
        "name = \"x\"",
        "[server]",
        "port = 80",
        "ratio = 0.1",
        "kind = \"plain\"",
    ] {
        assert!(text.lines().any(|shown| shown == line), "{line} in\n{text}");
    }
    let top = BTreeMap::from([("a key", u64::MAX)]);
    assert_eq!(render(&top), "# \"a key\" = 18446744073709551615 (more than TOML can say)\n");
}

#[test]
fn what_comments_say_is_rendered_in_lines() {
    /// A part.
    #[derive(Default, Serialize, JsonSchema)]
    struct Part {
        /// Said of `b`
        /// on two lines.
        b: u8,
    }
    /// The whole.
    #[derive(Default, Serialize, JsonSchema)]
    struct Whole {
        /// A long sentence that has exactly as many words as it takes to need several lines of a comment, which are cut between words and never within one, however long it goes on and wherever its last word ends.
        a: u8,
        /// Something with parts.
        part: Part,
        silent: u8,
    }
    let text = render_described(&Whole::default(), &Descriptions::of::<Whole>());
    let comment: Vec<_> = text.lines().take_while(|line| line.starts_with('#')).collect();
    assert!(
        comment.len() == 2 && comment.iter().all(|line| line.starts_with("# ") && line.len() <= 120),
        "{text}"
    );
    let words = comment.join(" ").replace("# ", "");
    assert!(words.starts_with("A long sentence") && words.ends_with("its last word ends."), "{text}");
    assert!(
        text.ends_with(
            "\na = 0\nsilent = 0\n\n# Something with parts.\n[part]\n# Said of `b` on two lines.\nb = 0\n"
        ),
        "{text}"
    );
}

proptest! {
    #[test]
    fn what_is_rendered_loads_again(
        name in "(?s).{0,12}", alias in prop::option::of("(?s).{0,12}"), seed in prop::option::of(0..=i64::MAX as u64),
        members in prop::collection::vec("(?s).{1,8}", 0..4), labels in prop::collection::btree_map("(?s).{0,6}", any::<i64>(), 0..4),
        port in any::<u16>(), ratio in -1e9f32..1e9, verbose in any::<bool>(), limit_bytes in 1u64..=1000,
        days in prop::option::of(any::<u32>()),
    ) {
        let tls = days.map(|days| Tls { cert: name.clone(), days });
        let server = Server { port, ratio, verbose, limit_bytes, kind: Flavour::Fancy, ..Server::default() };
        let config = Config { name, alias, seed, members, labels, tls, server, ..Config::default() };
        let text = render(&config).replace("token = \"<redacted>\"\n", "");
        prop_assert_eq!(check(Some(&text), &[], &[]).unwrap(), config);
    }

    #[test]
    fn no_text_panics(file in "[a-z.=\\[\\]'\" \n{}0-9]{0,40}", variable in "LONGSHORE_[A-Z_]{0,20}", text in ".{0,20}", set in ".{0,20}") {
        drop(check(Some(&file), &[(&variable, &text)], &[&set]));
    }
}
