//! The program as a person types it: clients, tools and configuration, and the roles started by hand.
#![allow(clippy::unwrap_used, reason = "the whole file is test code, its helpers too")]

#[path = "cli/hands.rs"]
mod hands;
#[path = "cli/starting.rs"]
mod starting;

use std::{
    fs,
    io::Write,
    process::{Command, Output, Stdio},
};

use longshore_router::{DEFAULT_PREFILL_POLICY, Policies};
use longshore_tests::server::{Server, long_prompt, model, program};
use serde_json::{Value, json};

/// Runs the program to its end with `input` on standard input.
fn longshore(arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(program());
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    // A program that reads nothing may be gone already.
    let _ = child.stdin.take().expect("standard input is piped").write_all(input.as_bytes());
    child.wait_with_output().expect("a child can be waited for")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("results are UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("notes are UTF-8")
}

/// Standard output of a command that works.
fn works(arguments: &[&str], input: &str) -> String {
    let output = longshore(arguments, input);
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    stdout(&output)
}

/// Standard error of a command that is refused: an exit code, no panic, nothing on standard output.
fn refused(arguments: &[&str]) -> String {
    let output = longshore(arguments, "");
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
    assert_eq!(stdout(&output), "", "{arguments:?}: {said}");
    assert!(said.starts_with("longshore: ") && !said.contains("panicked"), "{arguments:?}: {said}");
    said
}

#[test]
fn clients_talk_with_a_running_house() {
    let server = Server::up(&["--shards", "2"]);
    generates(&server);
    asks_the_wrong_port(&server);
    shows_the_cache_and_the_shards(&server);
    chats(&server);
    chooses_a_policy(&server);
    measures(&server);
}

fn generates(server: &Server) {
    let prompt = "The capital of France is";
    let output = longshore(&["generate", "--url", &server.grpc, "-n", "12", prompt], "");
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains("Paris"), "{}", stdout(&output));
    let figures = Figures::read(&output);
    assert!(figures.ttft_seconds > 0.0 && figures.tokens_per_second > 0.0, "{figures:?}");
    assert!((5..10).contains(&figures.prompt_tokens), "{figures:?}");
    assert_eq!((figures.cached_tokens, figures.kv.as_str()), (0, "less than one block"), "{figures:?}");
    // Piped in instead of typed.
    assert_eq!(works(&["generate", "--url", &server.grpc, "-n", "12"], prompt), stdout(&output));
}

fn shows_the_cache_and_the_shards(server: &Server) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    fs::write(&file, long_prompt().chars().take(2000).collect::<String>()).unwrap();
    let arguments = ["generate", "--url", &server.grpc, "-n", "4", "--file", file.to_str().unwrap()];
    let (cold, cached) = (longshore(&arguments, ""), longshore(&arguments, ""));
    assert_eq!(stdout(&cold), stdout(&cached));
    let (cold, cached) = (Figures::read(&cold), Figures::read(&cached));
    assert_eq!(cold.cached_tokens, 0, "{cold:?}");
    assert_eq!(cached.cached_tokens, (cached.prompt_tokens - 1) / 64 * 64, "{cached:?}");
    for figures in [cold, cached] {
        assert!(figures.kv.starts_with("kv-") && figures.kv.ends_with("iB"), "{figures:?}");
    }
}

fn chats(server: &Server) {
    let output = longshore(
        &["chat", "--url", &server.grpc, "-n", "24"],
        "What is the capital of France?\n/new\n\nName its river.\n/help\n/quit\nnever read\n",
    );
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains("Paris"), "{}", stdout(&output));
    let closing = stderr(&output).matches("[TTFT ").count();
    assert_eq!(closing, 2, "two questions were asked: {}", stderr(&output));
    assert!(stderr(&output).contains("there is no `/help`"), "{}", stderr(&output));
}

/// A disk has no room for results and notes.
#[cfg(target_os = "linux")]
#[test]
fn what_cannot_be_written_is_no_success_and_no_panic() {
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = Command::new(program()).args(["up", "--print-config"]).stdout(full()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("results cannot be written: No space left"), "{}", stderr(&output));
    let output = Command::new(program()).args(["up", "--model", "nope"]).stderr(full()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "101 would be a panic");
}

fn chooses_a_policy(server: &Server) {
    let ask = |policy: &str| {
        let arguments = [
            "generate",
            "--url",
            &server.grpc,
            "-n",
            "4",
            "--prefill-policy",
            policy,
            "The capital of France is",
        ];
        longshore(&arguments, "")
    };
    let (exact, balanced) = (ask("exact"), ask("balanced"));
    assert!(balanced.status.success(), "{}", stderr(&balanced));
    // The plan that is shipped for the default model says what it means.
    assert!(stderr(&balanced).contains(", prefill balanced (head plan "), "{}", stderr(&balanced));
    assert!(!stderr(&exact).contains(", prefill"), "{}", stderr(&exact));
    // Few tokens lie in one block, which streaming heads visit too.
    let streaming = stderr(&ask("streaming:min_positions=0"));
    let told = ", prefill streaming:min_positions=0, the answer visited 100.0 % of its blocks; KV: ";
    assert!(streaming.contains(told) && !stderr(&exact).contains("visited"), "{streaming}");
    // A prompt of a few tokens is exact whatever the policy.
    assert_eq!(stdout(&exact), stdout(&balanced));
    let refused = ask("sparsest");
    assert_eq!(refused.status.code(), Some(1));
    let said = stderr(&refused);
    assert!(said.contains("`prefill_policy`") && Policies::names().all(|name| said.contains(name)), "{said}");
}

fn measures(server: &Server) {
    let flags = ["--requests", "2", "--prompt-words", "100", "--max-tokens", "8", "--json"];
    let arguments = [&["bench", "serve", "--url", &server.openai][..], &flags].concat();
    let report: Value = serde_json::from_str(&works(&arguments, "")).expect("the report is JSON");
    let whole = |pointer: &str| report.pointer(pointer).and_then(Value::as_u64);
    let number = |pointer: &str| report.pointer(pointer).and_then(Value::as_f64).expect("a number");
    assert_eq!((whole("/requests"), whole("/failed")), (Some(2), Some(0)), "{report}");
    assert_eq!(whole("/completion_tokens"), Some(16), "{report}");
    assert!(whole("/prompt_tokens").is_some_and(|tokens| (200..1200).contains(&tokens)), "{report}");
    assert_eq!(whole("/ttft_ms/count"), Some(2), "{report}");
    assert!(whole("/inter_token_ms/count").is_some_and(|gaps| (1..=14).contains(&gaps)), "{report}");
    let milliseconds = number("/seconds") * 1e3;
    for what in ["ttft_ms", "inter_token_ms"] {
        let (p50, max) = (number(&format!("/{what}/p50")), number(&format!("/{what}/max")));
        assert!(0.0 < p50 && p50 <= max && max < milliseconds, "{what}: {report}");
    }
}

/// The closing line of a client.
#[derive(Debug)]
struct Figures {
    ttft_seconds: f64,
    tokens_per_second: f64,
    prompt_tokens: u64,
    cached_tokens: u64,
    kv: String,
}

impl Figures {
    /// `[TTFT 0.21 s, 33.0 tokens/s, 5 prompt tokens (0 cached), 12 generated, length; KV: …]`
    fn read(output: &Output) -> Self {
        let said = stderr(output);
        let line = said.lines().last().unwrap_or_default();
        let between = |before: &str, after: &str| {
            let found = line.split_once(before).and_then(|(_, rest)| rest.split_once(after));
            found.unwrap_or_else(|| panic!("no `{before}…{after}` in {said}")).0.replace(',', "")
        };
        Self {
            ttft_seconds: between("[TTFT ", " s,").parse().unwrap(),
            tokens_per_second: between(" s, ", " tokens/s").parse().unwrap(),
            prompt_tokens: between("tokens/s, ", " prompt tokens").parse().unwrap(),
            cached_tokens: between("prompt tokens (", " cached").parse().unwrap(),
            kv: between("KV: ", "]"),
        }
    }
}

#[test]
fn a_client_without_a_house_is_told_what_to_start() {
    let said = refused(&["generate", "--url", "http://127.0.0.1:1", "Hello"]);
    assert!(said.contains("Unavailable") && said.contains("hint: is `longshore up` running"), "{said}");
}

#[test]
fn models_are_listed_and_shown() {
    let path = model();
    let list = works(&["model", "list"], "");
    let row = list.lines().find(|line| line.starts_with("smollm2-135m-instruct "));
    assert!(row.is_some_and(|row| row.contains("llama 30 layers, Q4_1")), "{list}");
    // 30 layers of keys and values of 3 heads of 64 numbers of 2 bytes.
    let per_token: u64 = 30 * 2 * 3 * 64 * 2;
    assert!(row.is_some_and(|row| row.contains("KV 22.5 KiB/token (f16)")), "{list}");
    let shown: Value = serde_json::from_str(&works(&["model", "show", "--json"], "")).unwrap();
    assert_eq!(shown["path"], json!(path.display().to_string()));
    assert_eq!(shown["kv_bytes_per_token_f16"], json!(per_token));
    assert_eq!(shown["kv_bytes_per_token_f32"], json!(2 * per_token));
    let shape = ["layers", "hidden", "query_heads", "kv_heads", "head_dim", "vocabulary", "context_tokens"];
    let shape = shape.map(|field| shown[field].as_u64().unwrap());
    assert_eq!(shape, [30, 576, 9, 3, 64, 49_152, 8192]);
    let text = works(&["model", "show", path.to_str().unwrap()], "");
    let line = text.lines().find(|line| line.starts_with("kv_bytes_per_token_f16 "));
    assert!(line.is_some_and(|line| line.ends_with(" 23,040")), "{text}");
}

#[test]
fn a_reader_that_goes_away_is_no_fault() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(program()).args(["model", "show"]).stdout(writer).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
}

#[test]
fn a_printed_configuration_is_accepted_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("longshore.toml");
    let arguments = ["up", "--print-config", "--set", "prefill.chunk_tokens=192", "--http", "127.0.0.1:8123"];
    let printed = works(&arguments, "");
    assert!(printed.contains("chunk_tokens = 192") && printed.contains("127.0.0.1:8123"), "{printed}");
    fs::write(&file, &printed).unwrap();
    let file = file.to_str().unwrap();
    assert_eq!(works(&["up", "--config", file, "--print-config"], ""), printed);
    assert!(works(&["up", "--config", file, "--check-config"], "").contains("is valid"));
    // What is typed wins over the file.
    let over = works(&["up", "--config", file, "--set", "prefill.chunk_tokens=256", "--print-config"], "");
    assert_eq!(over, printed.replace("chunk_tokens = 192", "chunk_tokens = 256"));
}

#[test]
fn every_fault_of_a_configuration_is_told_at_once() {
    let faults = [
        ("prefill.chunk_tokens=1", "`prefill.chunk_tokens` (--set) is 1, must be from 16 to"),
        ("model.kv_dtype=f8", "`model.kv_dtype` (--set) is `f8`, must be `f32`, `f16`, `bf16` or `int8`"),
        ("listen.http=nonsense", "`listen.http` (--set) is `nonsense`"),
        ("prefill.nope=3", "`prefill.nope` (--set) is not a known key"),
    ];
    let mut arguments = vec!["up", "--check-config"];
    arguments.extend(faults.iter().flat_map(|(set, _)| ["--set", set]));
    let said = refused(&arguments);
    assert!(said.contains("4 faults"), "{said}");
    for (_, told) in faults {
        assert!(said.contains(told), "`{told}` is missing in {said}");
    }
}

#[test]
fn copies_that_cannot_be_are_refused_before_anything_starts() {
    for arguments in [&["up", "--copies", "2"][..], &["up", "--processes", "--copies", "3", "--shards", "2"]]
    {
        for check in [&[][..], &["--check-config"]] {
            let said = refused(&[arguments, check].concat());
            assert!(said.contains("`store.copies` is ") && said.contains("hint: start more"), "{said}");
        }
    }
    assert!(works(&["up", "--check-config", "--copies", "2", "--shards", "2"], "").contains("is valid"));
    let members = [
        "--member",
        "kvstore=kv-0@http://127.0.0.1:1;host=a",
        "--member",
        "kvstore=kv-1@http://127.0.0.1:2;host=a",
    ];
    let said =
        refused(&[&["kvstore", "--id", "kv-0", "--copies", "2", "--check-config"][..], &members].concat());
    assert!(said.contains("`store.copies` is 2") && said.contains("shards on 1 host"), "{said}");
}

#[test]
fn bytes_may_have_units() {
    let printed = works(&["up", "--disk", "/nowhere", "--disk-bytes", "1.5GiB", "--print-config"], "");
    assert!(printed.contains("capacity_bytes = 1610612736"), "{printed}");
    let output = longshore(&["up", "--disk", "/nowhere", "--disk-bytes", "1 gigabyte"], "");
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("`32GiB`"), "{}", stderr(&output));
}

#[test]
fn the_default_policy_is_a_flag_of_what_has_a_router() {
    let names = Policies::names().collect::<Vec<_>>().join(", ");
    for command in ["up", "router", "generate", "chat"] {
        // Help is wrapped to a width.
        let help = works(&[command, "--help"], "").split_whitespace().collect::<Vec<_>>().join(" ");
        let (_, told) = help.split_once("--prefill-policy <POLICY> ").expect("the flag is listed");
        let default =
            if ["up", "router"].contains(&command) { DEFAULT_PREFILL_POLICY } else { "the router's" };
        let (said, _) = told.split_once(']').expect("the default is told");
        assert!(said.ends_with(&format!("{names} [default: {default}")), "{command}: {said}");
    }
    for other in ["kvstore", "prefill", "decode"] {
        let output = longshore(&[other, "--prefill-policy", "exact"], "");
        assert_eq!(output.status.code(), Some(2), "{other}: {}", stderr(&output));
    }
    let printed = |arguments: &[&str]| works(&[arguments, &["--print-config"]].concat(), "");
    assert!(printed(&["up"]).contains(&format!("prefill_policy = {DEFAULT_PREFILL_POLICY:?}")));
    // A flag wins over what is set.
    let set = ["--set", "router.prefill_policy=exact"];
    for role in ["up", "router"] {
        let flags = [&[role, "--prefill-policy", "balanced"], &set[..]].concat();
        assert!(printed(&flags).contains("prefill_policy = \"balanced\""), "{role}");
    }
    let mut command = Command::new(program());
    command.args(["up", "--print-config"]).env("LONGSHORE_ROUTER__PREFILL_POLICY", "balanced");
    assert!(stdout(&command.output().unwrap()).contains("prefill_policy = \"balanced\""));
}

/// A port that speaks HTTP and no gRPC.
fn asks_the_wrong_port(server: &Server) {
    let http = server.openai.trim_end_matches("/v1").trim_end_matches('/');
    let said = refused(&["generate", "--url", http, "Hi"]);
    assert!(said.contains("`--url`") && said.contains("OpenAI HTTP API"), "{said}");
}

#[test]
fn usage_errors_do_not_show_what_the_environment_says_as_if_it_were_typed() {
    for (arguments, usage) in [
        (&["generate", "--nonsense"][..], "longshore generate [OPTIONS] [PROMPT]"),
        (&["chat", "--nonsense"], "longshore chat [OPTIONS]"),
        (&["store", "stat", "--nonsense"], "longshore store stat [OPTIONS]"),
    ] {
        let said = |url: Option<&str>| {
            let mut command = Command::new(program());
            command.args(arguments).env_remove("LONGSHORE_URL");
            if let Some(url) = url {
                command.env("LONGSHORE_URL", url);
            }
            let output = command.output().expect("the program starts");
            assert_eq!(output.status.code(), Some(2), "{arguments:?}");
            stderr(&output)
        };
        let plain = said(None);
        assert!(plain.contains(&format!("Usage: {usage}\n")), "{plain}");
        assert_eq!(said(Some("http://127.0.0.1:9000")), plain);
    }
}

#[test]
fn generate_against_a_wrong_port_names_the_flag_and_the_right_port() {
    let nobody = refused(&["generate", "--url", "http://127.0.0.1:1", "Hi"]);
    assert!(nobody.contains("`--url`") && nobody.contains("OpenAI HTTP API"), "{nobody}");
    let no_address = refused(&["generate", "--url", "127.0.0.1:9000", "Hi"]);
    assert!(no_address.contains("`--url` (or LONGSHORE_URL) is no gRPC address"), "{no_address}");
}

#[test]
fn bad_policies_and_head_plans_are_faults_of_the_configuration() {
    // A plan that might be needed is no reason to read the model first.
    let plan = ["--head-plan", "/nowhere/plan.json"];
    for mistyped in ["headsy", "heads2:level=a", "balancd"] {
        for more in [&[][..], &plan] {
            let said = refused(&[&["up", "--check-config", "--prefill-policy", mistyped][..], more].concat());
            let named = "`router.prefill_policy` (--prefill-policy) cannot be used: ";
            assert!(said.contains(named), "{mistyped}: {said}");
        }
    }
    for flag in [["--prefill-policy", "sparsest"], ["--set", "router.prefill_policy="]] {
        let said = refused(&["up", "--check-config", flag[0], flag[1]]);
        let named = if flag[0] == "--set" { "--set" } else { "--prefill-policy" };
        assert!(said.contains(&format!("`router.prefill_policy` ({named}) cannot be used: ")), "{said}");
        assert!(Policies::names().all(|name| said.contains(name)), "{said}");
    }
    model();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("plan of heads");
    let path = file.to_str().unwrap();
    let up = ["up", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--head-plan", path];
    let said = refused(&up);
    assert!(said.contains("`model.head_plan` is `") && said.contains("cannot be read"), "{said}");
    for bad in ["[{\"0\": ", "[]", "{\"0\": 1}", "0.5\thalf\n", ""] {
        fs::write(&file, bad).unwrap();
        for more in [&[][..], &["--processes"]] {
            let said = refused(&[&up[..], more].concat());
            assert!(
                said.contains("`model.head_plan` is `") && said.contains("no plan for this model: "),
                "{bad}: {said}"
            );
        }
    }
}

#[test]
fn unknown_keys_are_refused_wherever_they_stand() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("longshore.toml");
    fs::write(&file, "[prefill]\nchunk_token = 192\n").unwrap();
    let said = refused(&["up", "--check-config", "--config", file.to_str().unwrap()]);
    assert!(said.contains("`prefill.chunk_token` (file "), "{said}");
    assert!(said.contains("did you mean `prefill.chunk_tokens`?"), "{said}");
    let mut command = Command::new(program());
    command.args(["up", "--check-config"]).env("LONGSHORE_PREFILL__NOPE", "1");
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("`prefill.nope` (environment LONGSHORE_PREFILL__NOPE)"));
}

#[test]
fn a_damaged_or_missing_model_is_refused_by_name() {
    let whole = fs::read(model()).expect("the model can be read");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("damaged.gguf");
    let path = file.to_str().unwrap();
    let arguments = ["up", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--model", path];
    let cases: [(&str, &[u8], &str); 4] = [
        ("within the vocabulary", &whole[..100_000], "`tokenizer.ggml.tokens`"),
        ("within the weights", &whole[..whole.len() / 2], ".weight`"),
        ("within the header", &whole[..12], "`tensor_count`"),
        ("another kind of file", b"PK\x03\x04 this is no model, it is something else", "`magic`"),
    ];
    for (what, bytes, field) in cases {
        fs::write(&file, bytes).unwrap();
        let said = refused(&arguments);
        assert!(said.contains("cannot read the model: ") && said.contains(path), "{what}: {said}");
        assert!(said.contains(field), "{what}: {said}");
    }
    fs::remove_file(&file).unwrap();
    let said = refused(&arguments);
    assert!(said.contains(path) && said.contains("does not exist; hint: give the path of a GGUF"), "{said}");
}
