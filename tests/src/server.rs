//! The real program as a child process: `longshore up …` on free ports, its ready lines read, ended with its children.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, sync_channel},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

/// A running `longshore up`.
#[derive(Debug)]
pub struct Server {
    child: Child,
    lines: Receiver<String>,
    /// Base of the OpenAI API, `http://…/v1`.
    pub openai: String,
    /// gRPC address, `http://…`.
    pub grpc: String,
}

/// Loading and packing a model in a test build on a busy machine takes its time.
const READY_WITHIN: Duration = Duration::from_secs(180);

/// The program under test, built by `cargo build --workspace`.
pub fn program() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a file");
    let folder = test.ancestors().nth(2).expect("tests lie in target/PROFILE/deps");
    let program = folder.join("longshore");
    assert!(program.is_file(), "{} is missing: run `cargo build --workspace` first", program.display());
    program
}

/// The default model's file; the test fails with the remedy when it was never pulled.
pub fn model() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let root = set("LONGSHORE_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|p| p.join("longshore")))
        .or_else(|| set("HOME").map(|p| p.join(".cache/longshore")))
        .expect("LONGSHORE_CACHE, XDG_CACHE_HOME or HOME is set");
    let file = root.join("models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(file.is_file(), "{} is missing: run `longshore model pull` first", file.display());
    file
}

/// Python with the packages of tests/requirements.txt.
pub fn python() -> String {
    let set = std::env::var_os("LONGSHORE_TEST_PYTHON").and_then(|value| value.into_string().ok());
    set.unwrap_or_else(|| {
        let local = crate::tree::root().join(".venv/bin/python");
        if local.is_file() { local.display().to_string() } else { "python3".to_owned() }
    })
}

impl Server {
    /// Starts `longshore up ARGS` on free ports and waits until it is ready.
    pub fn up(args: &[&str]) -> Self {
        model();
        let mut command = Command::new(program());
        command.args(["up", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]).args(args);
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("the program starts");
        let stdout = child.stdout.take().expect("stdout is piped");
        let (send, lines) = sync_channel(1024);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        let mut server = Self { child, lines, openai: String::new(), grpc: String::new() };
        server.await_ready();
        server
    }

    fn await_ready(&mut self) {
        let began = Instant::now();
        let mut seen = String::new();
        loop {
            let left = READY_WITHIN.saturating_sub(began.elapsed());
            let line = match self.lines.recv_timeout(left) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("not ready within {READY_WITHIN:?}; it said:\n{seen}")
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("it ended before it was ready; it said:\n{seen}")
                }
            };
            let words: Vec<_> = line.split_whitespace().collect();
            match words.as_slice() {
                ["gRPC", url] => self.grpc = (*url).to_owned(),
                ["OpenAI", "HTTP", url] => self.openai = (*url).to_owned(),
                ["ready;", ..] => return,
                _ => {}
            }
            seen.push_str(&line);
            seen.push('\n');
        }
    }

    /// Process id of `longshore up` itself.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Process id of the child with `--id ID`; `None` when it is not running.
    pub fn process(&self, id: &str) -> Option<u32> {
        let ours = |pid: &u32| parent(*pid) == Some(self.child.id());
        let named = |pid: &u32| argument(*pid, "--id").as_deref() == Some(id);
        processes().into_iter().filter(ours).find(named)
    }

    /// gRPC address of a child by `--id`, `http://…`; it keeps it when it is restarted.
    pub fn address(&self, id: &str) -> String {
        let pid = self.process(id).unwrap_or_else(|| panic!("{id} is not running"));
        let listen = argument(pid, "--listen").unwrap_or_else(|| panic!("{id} was told no address"));
        format!("http://{listen}")
    }

    /// Admin address of a child by `--id`, `http://…`.
    pub fn admin(&self, id: &str) -> String {
        let pid = self.process(id).unwrap_or_else(|| panic!("{id} is not running"));
        format!("http://{}", argument(pid, "--admin").unwrap_or_else(|| panic!("{id} has no admin address")))
    }

    /// Processor time that a child took since its start, in clock ticks (10 ms); 0 when it is not running.
    pub fn ticks(&self, id: &str) -> u64 {
        let stat = self.process(id).and_then(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok());
        let stat = stat.unwrap_or_default();
        // The name in parentheses may hold spaces; user and system time are fields 14 and 15.
        let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        rest.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
    }

    /// `kill -SIGNAL` for a child by `--id`.
    pub fn kill(&self, id: &str, signal: &str) {
        let pid = self.process(id).unwrap_or_else(|| panic!("{id} is not running"));
        assert!(send_signal(pid, signal), "{id} could not be sent {signal}");
    }

    /// Waits for the end; returns whether it ended cleanly and how long it took.
    pub fn wait(&mut self, within: Duration) -> (bool, Duration) {
        let began = Instant::now();
        while began.elapsed() < within {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return (status.success(), began.elapsed());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        (false, began.elapsed())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SIGTERM lets it end its own children; SIGKILL after that, for it alone: children notice that it is gone.
        send_signal(self.child.id(), "-TERM");
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(15) {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("these tests run on Linux").flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// What a process was told after `flag`.
fn argument(pid: u32, flag: &str) -> Option<String> {
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words: Vec<_> = arguments.split(|byte| *byte == 0).collect();
    let pair = words.windows(2).find(|pair| pair[0] == flag.as_bytes())?;
    Some(String::from_utf8_lossy(pair[1]).into_owned())
}

fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// `kill -SIGNAL` for any process; whether it could be sent.
pub fn send_signal(pid: u32, signal: &str) -> bool {
    Command::new("kill").args([signal, &pid.to_string()]).status().is_ok_and(|status| status.success())
}

/// Posts JSON and returns status and body.
pub async fn post(url: &str, body: &Value) -> (u16, Value) {
    let answer = reqwest::Client::new().post(url).json(body).send().await.expect("the server answers");
    let status = answer.status().as_u16();
    (status, answer.json().await.unwrap_or(Value::Null))
}

/// A greedy completion: text and usage.
pub async fn complete(server: &Server, prompt: &Value, max_tokens: u32) -> (String, Value) {
    let body = json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true, "model": ""});
    let (status, answer) = post(&format!("{}/completions", server.openai), &body).await;
    assert_eq!(status, 200, "{answer}");
    let text =
        answer.pointer("/choices/0/text").and_then(Value::as_str).expect("an answer has text").to_owned();
    (text, answer["usage"].clone())
}

/// A prompt of a little over 3,000 tokens.
pub fn long_prompt() -> String {
    let path = crate::tree::root().join("tests/data/long_prompt.txt");
    fs::read_to_string(path).expect("the repository holds the long prompt")
}
