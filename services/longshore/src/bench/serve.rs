//! `longshore bench serve`: time to first token and inter-token latency of any OpenAI endpoint, over streamed completions.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use futures::StreamExt;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::statistics::Summary;
use crate::{cli::BenchServeArgs, console};

/// What one request showed.
#[derive(Debug, Default)]
struct Sample {
    ttft_ms: f64,
    gaps_ms: Vec<f64>,
    prompt_tokens: u64,
    cached_tokens: u64,
    completion_tokens: u64,
}

/// What all requests showed.
#[derive(Debug, Serialize)]
struct Report {
    url: String,
    model: String,
    requests: u32,
    failed: u32,
    concurrency: u32,
    seconds: f64,
    prompt_tokens: u64,
    cached_tokens: u64,
    completion_tokens: u64,
    ttft_ms: Summary,
    inter_token_ms: Summary,
}

/// Runs the command.
pub(crate) async fn serve(args: BenchServeArgs) -> Result<()> {
    let target = Arc::new(Target::new(&args).await?);
    let bar = console::token_bar("requests", args.requests.into());
    let next = Arc::new(AtomicU32::new(0));
    let args = Arc::new(args);
    let began = Instant::now();
    let mut clients = JoinSet::new();
    for _ in 0..args.concurrency.min(args.requests) {
        clients.spawn(client(target.clone(), args.clone(), next.clone(), bar.clone()));
    }
    let mut samples = Vec::new();
    let mut failures = Vec::new();
    while let Some(done) = clients.join_next().await {
        let (mut ok, mut bad) = done.context("a client task panicked")?;
        samples.append(&mut ok);
        failures.append(&mut bad);
    }
    bar.finish_and_clear();
    let report = report(&args, &target, samples, failures.len() as u32, began.elapsed().as_secs_f64());
    print(&args, &report)?;
    match failures.into_iter().next() {
        Some(first) => {
            Err(first.context(format!("{} of {} requests failed, the first", report.failed, report.requests)))
        }
        None => Ok(()),
    }
}

type Outcomes = (Vec<Sample>, Vec<anyhow::Error>);

async fn client(
    target: Arc<Target>,
    args: Arc<BenchServeArgs>,
    next: Arc<AtomicU32>,
    bar: indicatif::ProgressBar,
) -> Outcomes {
    let (mut samples, mut failures) = Outcomes::default();
    loop {
        let index = next.fetch_add(1, Ordering::Relaxed);
        if index >= args.requests {
            return (samples, failures);
        }
        match target.request(&args, index).await {
            Ok(sample) => samples.push(sample),
            Err(error) => failures.push(error),
        }
        bar.inc(1);
    }
}

/// Where requests go.
#[derive(Debug)]
struct Target {
    http: reqwest::Client,
    base: String,
    model: String,
    api_key: Option<String>,
}

impl Target {
    async fn new(args: &BenchServeArgs) -> Result<Self> {
        let base = args.url.trim_end_matches('/').trim_end_matches("/v1").to_owned() + "/v1";
        let http = reqwest::Client::builder().build().context("cannot set up the HTTP client")?;
        let mut target = Self { http, base, model: String::new(), api_key: args.api_key.clone() };
        target.model = match &args.model {
            Some(model) => model.clone(),
            None => target.first_model().await?,
        };
        Ok(target)
    }

    async fn first_model(&self) -> Result<String> {
        let url = format!("{}/models", self.base);
        let answer = self.authorized(self.http.get(&url)).send().await;
        let answer =
            answer.with_context(|| format!("cannot reach {url}; hint: is `longshore up` running?"))?;
        let body: Value = answer.json().await.with_context(|| format!("{url} does not answer JSON"))?;
        let id = body.pointer("/data/0/id").and_then(Value::as_str);
        Ok(id.with_context(|| format!("{url} lists no model; hint: pass --model"))?.to_owned())
    }

    fn authorized(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    async fn request(&self, args: &BenchServeArgs, index: u32) -> Result<Sample> {
        let body = json!({
            "model": self.model,
            "prompt": prompt(args, index),
            "max_tokens": args.max_tokens,
            "temperature": 0,
            "ignore_eos": true,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        let request = self.authorized(self.http.post(format!("{}/completions", self.base))).json(&body);
        let began = Instant::now();
        let answer = request.send().await.context("the request was not answered")?;
        if !answer.status().is_success() {
            let status = answer.status();
            bail!("{status}: {}", answer.text().await.unwrap_or_default());
        }
        read_events(answer, began).await
    }
}

/// Reads server-sent events; a line may be split over any number of network reads.
async fn read_events(answer: reqwest::Response, began: Instant) -> Result<Sample> {
    let mut sample = Sample::default();
    let mut last: Option<Instant> = None;
    let mut buffer = Vec::new();
    let mut chunks = answer.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        buffer.extend_from_slice(&chunk.context("the answer broke off")?);
        ensure!(buffer.len() < 16 << 20, "an event is longer than 16 MiB");
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            let Some(data) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) else { continue };
            if data == b"[DONE]" {
                ensure!(last.is_some(), "the answer has no token");
                return Ok(sample);
            }
            let event: Value = serde_json::from_slice(data).context("an event is no JSON")?;
            sample.read(&event, began, &mut last)?;
        }
    }
    bail!("the answer ended without [DONE]")
}

impl Sample {
    fn read(&mut self, event: &Value, began: Instant, last: &mut Option<Instant>) -> Result<()> {
        if let Some(error) = event.get("error") {
            bail!("the endpoint reports {error}");
        }
        if let Some(usage) = event.get("usage").filter(|usage| !usage.is_null()) {
            let count = |pointer: &str| usage.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
            self.prompt_tokens = count("/prompt_tokens");
            self.completion_tokens = count("/completion_tokens");
            self.cached_tokens = count("/prompt_tokens_details/cached_tokens");
        }
        // Text may be held back for a character or a stop string; only events that carry some are tokens for a reader.
        let text = event.pointer("/choices/0/text").and_then(Value::as_str).unwrap_or_default();
        if !text.is_empty() {
            let now = Instant::now();
            match last.replace(now) {
                None => self.ttft_ms = now.duration_since(began).as_secs_f64() * 1e3,
                Some(before) => self.gaps_ms.push(now.duration_since(before).as_secs_f64() * 1e3),
            }
        }
        Ok(())
    }
}

/// Words that follow from (seed, index, place), after words that all prompts share.
fn prompt(args: &BenchServeArgs, index: u32) -> String {
    const WORDS: [&str; 16] = [
        "harbour", "crane", "ledger", "signal", "anchor", "cargo", "tide", "lantern", "rope", "berth",
        "compass", "granary", "mast", "quay", "pilot", "winch",
    ];
    let word = |place: u32| {
        let own = if place < args.shared_words { 0 } else { u64::from(index) + 1 };
        let mut x = args.seed
            ^ own.wrapping_mul(0x9E37_79B9_7F4A_7C15)
            ^ u64::from(place).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x ^= x >> 31;
        x = x.wrapping_mul(0x94D0_49BB_1331_11EB);
        WORDS[(x >> 60) as usize]
    };
    (0..args.prompt_words).map(word).collect::<Vec<_>>().join(" ")
}

fn report(args: &BenchServeArgs, target: &Target, samples: Vec<Sample>, failed: u32, seconds: f64) -> Report {
    let sum = |of: fn(&Sample) -> u64| samples.iter().map(of).sum();
    Report {
        url: target.base.clone(),
        model: target.model.clone(),
        requests: args.requests,
        failed,
        concurrency: args.concurrency,
        seconds,
        prompt_tokens: sum(|s| s.prompt_tokens),
        cached_tokens: sum(|s| s.cached_tokens),
        completion_tokens: sum(|s| s.completion_tokens),
        ttft_ms: Summary::of(samples.iter().map(|s| s.ttft_ms).collect()),
        inter_token_ms: Summary::of(samples.iter().flat_map(|s| s.gaps_ms.iter().copied()).collect()),
    }
}

fn print(args: &BenchServeArgs, report: &Report) -> Result<()> {
    if args.json {
        console::say(serde_json::to_string_pretty(report).context("a report is JSON")?);
        return Ok(());
    }
    console::say(format!(
        "{} at {}: {} requests, {} at a time, {:.1} s",
        report.model, report.url, report.requests, report.concurrency, report.seconds
    ));
    console::say(format!(
        "tokens: {} prompt ({} cached), {} generated, {:.1} generated tokens/s",
        console::grouped(report.prompt_tokens),
        console::grouped(report.cached_tokens),
        console::grouped(report.completion_tokens),
        report.completion_tokens as f64 / report.seconds.max(1e-9),
    ));
    console::say("\n|  | mean | p50 | p90 | p99 | max |\n| --- | --- | --- | --- | --- | --- |");
    for (name, s) in [("TTFT, ms", report.ttft_ms), ("inter-token, ms", report.inter_token_ms)] {
        console::say(format!(
            "| {name} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} |",
            s.mean, s.p50, s.p90, s.p99, s.max
        ));
    }
    Ok(())
}
