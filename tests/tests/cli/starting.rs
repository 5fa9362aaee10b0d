//! What becomes of a cluster that is started: ports, processes that cannot start, roles started by hand.

use std::{
    fs,
    net::TcpListener,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use longshore_proto::types::GenerateEvent;
use longshore_tests::{
    client::{await_start, generate},
    server::{Server, long_prompt, model, post, program, send_signal},
};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::{
    hands::{Hands, free_ports},
    longshore, refused, stderr, stdout,
};

#[test]
fn taken_and_repeated_ports_are_refused_before_anything_starts() {
    model();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let taken = listener.local_addr().unwrap().to_string();
    let free = "127.0.0.1:0";
    for (field, [http, grpc, admin]) in [
        ("`listen.http`", [&taken[..], free, free]),
        ("`listen.grpc`", [free, &taken, free]),
        ("`listen.admin`", [free, free, &taken]),
    ] {
        for more in [&[][..], &["--processes"]] {
            let up = ["up", "--http", http, "--grpc", grpc, "--admin", admin];
            let said = refused(&[&up[..], more].concat());
            assert!(said.contains(field), "{more:?}: {said}");
            assert!(said.contains(&taken) && said.contains("hint: another process has the port"), "{said}");
        }
    }
    let said = refused(&["up", "--http", "127.0.0.1:8123", "--grpc", "127.0.0.1:8123"]);
    assert!(
        said.contains("`listen.http` is `127.0.0.1:8123`, which is taken by `listen.grpc`, `127.0.0.1:8123`"),
        "{said}"
    );
}

#[test]
fn a_process_that_cannot_start_ends_the_others() {
    model();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("no folder");
    fs::write(&file, "").unwrap();
    let up = ["up", "--processes", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--disk"];
    let said = longshore(&[&up[..], &[file.to_str().unwrap()]].concat(), "");
    assert_eq!((said.status.code(), stdout(&said)), (Some(1), String::new()), "{}", stderr(&said));
    let said = stderr(&said);
    assert!(said.contains("`kvstore.disk.path`") && said.contains("kv-0 ended before it served"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_started_by_hand_answer_together() {
    // Fails here, with the remedy, when the model was never pulled.
    model();
    let ports: [_; 6] = free_ports();
    let url = |index: usize| format!("http://{}", ports[index].address());
    let roles =
        [("kvstore", "kv-0"), ("kvstore", "kv-1;weight=2"), ("prefill", "prefill-0"), ("decode", "decode-0")];
    let members: Vec<String> = (roles.iter().enumerate())
        .flat_map(|(index, (role, id))| {
            let (id, weight) = id.split_at(id.find(';').unwrap_or(id.len()));
            ["--member".to_owned(), format!("{role}={id}@{}{weight}", url(index))]
        })
        .collect();
    let mut hands = Hands::default();
    for (role, id) in roles {
        hands.start(role, id.split(';').next().unwrap(), &members, &[]);
    }
    let (grpc, http) = (ports[4].address().to_string(), ports[5].address().to_string());
    hands.start("router", "router-0", &members, &["--listen", &grpc, "--http", &http]);
    for index in 0..5 {
        let describe = await_start(&url(index), None, Duration::from_secs(180)).await;
        assert!(describe.members.len() >= 4, "{describe:?}");
    }
    let prompt = format!("{} The capital of France is", long_prompt().chars().take(800).collect::<String>());
    let body = json!({"prompt": prompt, "max_tokens": 8, "temperature": 0});
    let began = Instant::now();
    // gRPC answers a moment before HTTP listens.
    let answer = loop {
        match reqwest::get(format!("http://{http}/v1/models")).await {
            Ok(_) => break post(&format!("http://{http}/v1/completions"), &body).await,
            Err(error) => assert!(began.elapsed() < Duration::from_secs(60), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let (status, answer) = answer;
    assert_eq!(status, 200, "{answer}");
    assert!(answer.pointer("/usage/completion_tokens").and_then(Value::as_u64) > Some(0), "{answer}");
    assert!(answer["choices"][0]["text"].as_str().is_some_and(|text| !text.is_empty()), "{answer}");
    hands.end();
}

/// Whether a process has a handler for SIGTERM yet.
fn handles_sigterm(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or("0");
    u64::from_str_radix(caught.trim(), 16).is_ok_and(|caught| caught & (1 << 14) != 0)
}

#[test]
fn a_signal_ends_what_still_loads() {
    let folder = tempfile::tempdir().unwrap();
    // Nobody ever writes into it, so opening it takes for ever.
    let model = folder.path().join("endless.gguf");
    assert!(Command::new("mkfifo").arg(&model).status().unwrap().success());
    let [port] = free_ports();
    let member = &format!("kvstore=kv-0@http://{}", port.address())[..];
    for arguments in [
        &["up", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"][..],
        &["up", "--processes", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"],
        &["kvstore", "--id", "kv-0", "--member", member],
    ] {
        let mut command = Command::new(program());
        command.args(arguments).arg("--model").arg(&model);
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let began = Instant::now();
        while !handles_sigterm(child.id()) {
            assert!(began.elapsed() < Duration::from_secs(60), "{arguments:?} does not begin");
            std::thread::sleep(Duration::from_millis(20));
        }
        // Children of `--processes` are under way too then.
        std::thread::sleep(Duration::from_secs(1));
        assert!(send_signal(child.id(), "-TERM"));
        let output = child.wait_with_output().unwrap();
        let said = stderr(&output);
        assert!(output.status.success(), "{arguments:?}: {}: {said}", output.status);
        assert!(!said.contains("killing it") && !said.contains("panicked"), "{arguments:?}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_see_the_drain() {
    let [admin] = free_ports();
    let address = admin.address().to_string();
    // The answer may take as long as it likes on a busy machine; by default it would be cut off after 15 s.
    let patient = ["--set", "router.drain_ms=300000", "--set", "drain.deadline_ms=300000"];
    let server = Server::up(&[&["--admin", &address[..]][..], &patient].concat());
    let probe = format!("http://{address}/readyz");
    assert_eq!(reqwest::get(&probe).await.unwrap().status(), 200);
    let (url, pid) = (server.grpc.clone(), server.id());
    let mut told = false;
    // The answer goes on for as long as the drain takes.
    let mut answers = JoinSet::new();
    answers.spawn(async move {
        generate(&url, "Once upon a time", 400, |event| {
            if matches!(event, GenerateEvent::Tokens(_)) && !std::mem::replace(&mut told, true) {
                assert!(send_signal(pid, "-TERM"));
            }
        })
        .await
    });
    loop {
        let answer = reqwest::get(&probe).await.expect("probes are answered until the drain is over");
        if answer.status() == 503 {
            assert!(answer.text().await.unwrap().contains("process"), "the reason is told");
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let answer = answers.join_next().await.expect("one answer").unwrap();
    let (tokens, _) = answer.expect("a drain lets answers finish");
    assert_eq!(tokens.len(), 400);
}
