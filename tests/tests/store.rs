//! `longshore store` as an operator types it, against a cluster of real processes.
#![allow(clippy::unwrap_used, reason = "the whole file is test code, its helpers too")]

use std::{
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use longshore_tests::server::{Server, complete, long_prompt, program};
use serde_json::{Value, json};

/// Runs `longshore store ARGUMENTS` against `server`.
fn store(server: &Server, arguments: &[&str]) -> Output {
    let mut command = Command::new(program());
    let (subcommand, rest) = arguments.split_first().unwrap();
    command.args(["store", subcommand, "--endpoint", &server.grpc]).args(rest);
    command.stdin(Stdio::null()).output().expect("the program starts")
}

/// What a command that works says.
fn works(server: &Server, arguments: &[&str]) -> String {
    let output = store(server, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What a command that fails says.
fn fails(server: &Server, arguments: &[&str]) -> String {
    let output = store(server, arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr).unwrap()
}

/// How long things may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the shards say, and all of their blocks, once two copies of each are there: those of generated blocks come behind the answer, so
/// that one may come between the two.
async fn settled(server: &Server) -> (Value, Vec<Value>) {
    let began = Instant::now();
    loop {
        let stat: Value = serde_json::from_str(&works(server, &["stat", "--json"])).unwrap();
        let lines = works(server, &["ls", "--json", "--limit", "0"]);
        let blocks: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let total = &stat["total"];
        let are_all = total["blocks"].as_u64() == Some(blocks.len() as u64 * 2);
        let are_copied = !blocks.is_empty() && blocks.iter().all(|block| block["copies"] == 2);
        if are_all && are_copied && total["open_blocks"] == 0 && total["writers"] == 0 {
            return (stat, blocks);
        }
        assert!(began.elapsed() < PATIENCE, "{stat} {lines}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_looks_checks_moves_and_drains() {
    let flags = ["--processes", "--shards", "3", "--copies", "2", "--write-acks", "2"];
    let sets = [
        "--set",
        "model.stripe_blocks=1",
        "--set",
        "kvstore.repair.retry_ms=200",
        "--set",
        "kvstore.repair.drain_settle_ms=7000",
    ];
    let server = Server::up(&[&flags[..], &sets].concat());
    let prompt: String = long_prompt().chars().take(2400).collect();
    let (answer, _) = complete(&server, &json!(prompt), 16).await;

    let (stat, blocks) = settled(&server).await;
    let copies = stat["total"]["blocks"].as_u64().unwrap();
    assert!(copies >= 8, "{stat}");
    assert_eq!(stat["shards"].as_array().map(Vec::len), Some(3));
    let table = works(&server, &["stat"]);
    assert!(table.contains("kv-2") && table.contains("total") && table.contains("SHORT"), "{table}");

    let (key, folder) = (blocks[0]["key"].as_str().unwrap(), tempfile::tempdir().unwrap());
    let file = folder.path().join("block.lsb").display().to_string();
    works(&server, &["get", key, "--out", &file]);
    assert!(works(&server, &["put", &file]).contains("held it already"));
    std::fs::write(&file, b"nonsense").unwrap();
    assert!(fails(&server, &["put", &file]).contains("`header`"));
    assert!(fails(&server, &["get", "zz", "--out", &file]).contains("hexadecimal"));

    let verified = works(&server, &["verify", "--all"]);
    assert!(verified.contains("0 damaged") && verified.contains("0 blocks short"), "{verified}");
    let scrubbed = works(&server, &["scrub", "--bytes-per-second", "1000000000"]);
    assert_eq!(scrubbed.matches(" 0 damaged").count(), 3, "{scrubbed}");

    let drained = works(&server, &["drain", "kv-1", "--timeout", "120"]);
    assert!(drained.contains("kv-1: drained"), "{drained}");
    let second = fails(&server, &["drain", "kv-2", "--timeout", "120"]);
    assert!(second.contains("was not asked to drain") && second.contains("drain kv-1 --cancel"), "{second}");
    let heads = works(&server, &["get", key, "--heads", "0..1", "--out", &file]);
    assert!(heads.contains("KV heads 0 to 0 of 3"), "{heads}");
    // At once: sooner than its supervisor asks whether it was drained.
    server.kill("kv-1", "-TERM");
    let (again, usage) = complete(&server, &json!(prompt), 16).await;
    assert_eq!(again, answer, "no token is lost with it");
    assert!(usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0) > 0, "{usage}");
    let began = Instant::now();
    while server.process("kv-1").is_some() {
        assert!(began.elapsed() < PATIENCE, "it does not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Its supervisor would have started it again after half a second.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(server.process("kv-1"), None, "a shard that was drained stays away");
}

#[test]
fn errors_tell_what_to_do() {
    let output = Command::new(program())
        .args(["store", "stat", "--endpoint", "http://127.0.0.1:1"])
        .output()
        .expect("the program starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.starts_with("longshore: ") && said.contains("is the cluster running?"), "{said}");
}
