//! One request: sends the prompt in chunks, shows the prefill's progress, streams the answer, closes with the figures.

use std::time::Instant;

use anyhow::{Context, Result};
use futures::StreamExt;
use longshore_attention::PrefillPolicy;
use longshore_blocks::EXACT_PREFILL;
use longshore_fabric::{CallContext, Code, Connector, Error, GrpcConnector, GrpcOptions};
use longshore_proto::types::{FinishReason, Finished, GenerateEvent, GenerateStart, PromptChunk, Sampling};
use tokio::sync::mpsc;

use crate::{cli::SamplingArgs, console};

/// What one request brought back.
#[derive(Debug)]
pub(super) struct Answer {
    /// The whole text.
    pub(super) text: String,
}

/// Text of one chunk; well under the 4 MiB message limit.
const CHUNK_BYTES: usize = 256 << 10;

/// A text as prompt chunks, cut between characters.
pub(super) fn text_chunks(text: &str) -> Vec<PromptChunk> {
    let mut chunks = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let cut = rest.floor_char_boundary(CHUNK_BYTES);
        let (head, tail) = rest.split_at(cut);
        chunks.push(PromptChunk::Text(head.to_owned()));
        rest = tail;
    }
    chunks
}

/// Parameters from flags.
pub(super) fn start(args: &SamplingArgs) -> GenerateStart {
    let defaults = Sampling::default();
    let sampling = Sampling {
        temperature: args.temperature,
        top_k: args.top_k.unwrap_or(defaults.top_k),
        top_p: args.top_p.unwrap_or(defaults.top_p),
        min_p: args.min_p.unwrap_or(defaults.min_p),
        repetition_penalty: args.repetition_penalty.unwrap_or(defaults.repetition_penalty),
        presence_penalty: args.presence_penalty.unwrap_or(defaults.presence_penalty),
        frequency_penalty: args.frequency_penalty.unwrap_or(defaults.frequency_penalty),
        seed: args.seed,
        max_tokens: args.max_tokens,
        ..defaults
    };
    GenerateStart {
        model: args.model_name.clone().unwrap_or_default(),
        sampling,
        stop: args.stop.clone(),
        cache_salt: args.cache_salt.clone().unwrap_or_default().into_bytes(),
        prefill_policy: args.prefill_policy.clone().unwrap_or_default(),
        progress: true,
        ..GenerateStart::default()
    }
}

/// Runs one request against the gRPC address `url` and prints it as it comes.
pub(super) async fn run(
    url: &str,
    start: GenerateStart,
    prompt: Vec<PromptChunk>,
    ctx: &CallContext,
) -> Result<Answer> {
    let client = GrpcConnector::new(GrpcOptions::default())
        .inference(url)
        .map_err(|error| anyhow::anyhow!("`--url` (or LONGSHORE_URL) is no gRPC address: {error}"))?;
    let asked = start.prefill_policy.clone();
    let (send, receive) = mpsc::channel(4);
    let feed = async move {
        for chunk in prompt {
            // A closed channel means that the router refused the prompt; the answer stream says why.
            if send.send(chunk).await.is_err() {
                break;
            }
        }
    };
    let show = async {
        let failed = || format!("cannot generate at {url}");
        let stream = client.generate(ctx, start, receive).await.map_err(told);
        let mut events = stream.with_context(failed)?;
        let mut shown = Shown::new(asked);
        while let Some(event) = events.next().await {
            shown.event(event.map_err(told).with_context(failed)?);
        }
        Ok(shown.close())
    };
    tokio::join!(feed, show).1
}

/// An error with a hint where nobody that speaks gRPC answered.
fn told(error: Error) -> anyhow::Error {
    // What a server of plain HTTP makes a gRPC client say.
    let no_grpc = error.message.contains("grpc-status header missing");
    let hint = match error.code {
        Code::Unavailable if !error.message.contains("hint:") => WRONG_PORT,
        _ if no_grpc => WRONG_PORT,
        _ => "",
    };
    anyhow::anyhow!("{:?}: {}{hint}", error.code, error.message)
}

const WRONG_PORT: &str = "; hint: is `longshore up` running there? `--url` (or LONGSHORE_URL) names the gRPC port of a router, 9000 \
                          unless it was set; the port of the OpenAI HTTP API is another one";

struct Shown {
    began: Instant,
    first_token: Option<Instant>,
    bar: Option<indicatif::ProgressBar>,
    /// The policy that was asked for; empty: the router's.
    asked: String,
    /// The canonical text of the one that was used.
    policy: String,
    text: String,
    tokens: u64,
    finished: Option<Finished>,
}

impl Shown {
    fn new(asked: String) -> Self {
        Self {
            began: Instant::now(),
            first_token: None,
            bar: None,
            asked,
            policy: String::new(),
            text: String::new(),
            tokens: 0,
            finished: None,
        }
    }

    fn event(&mut self, event: GenerateEvent) {
        match event {
            GenerateEvent::Accepted { prompt_tokens, cached_tokens, prefill_policy, .. } => {
                self.policy = prefill_policy;
                let bar = console::token_bar("prefill", prompt_tokens);
                bar.set_position(cached_tokens);
                bar.reset_eta();
                self.bar = Some(bar);
            }
            GenerateEvent::Progress { done_tokens, .. } => {
                if let Some(bar) = &self.bar {
                    bar.set_position(done_tokens);
                }
            }
            GenerateEvent::Tokens(tokens) => {
                if self.first_token.is_none() {
                    self.first_token = Some(Instant::now());
                    self.clear_bar();
                }
                self.tokens += tokens.token_ids.len() as u64;
                console::piece(&tokens.text);
                self.text.push_str(&tokens.text);
            }
            GenerateEvent::Finished(finished) => self.finished = Some(finished),
        }
    }

    fn clear_bar(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn close(mut self) -> Answer {
        self.clear_bar();
        console::piece("\n");
        match &self.finished {
            Some(finished) => console::note(self.closing_line(finished)),
            None => console::note("the stream ended without a closing message"),
        }
        Answer { text: self.text }
    }

    /// TTFT, rate, cache and where the KV lies.
    fn closing_line(&self, finished: &Finished) -> String {
        let ttft = self.first_token.map_or(0.0, |at| at.duration_since(self.began).as_secs_f64());
        let generating = self.first_token.map_or(0.0, |at| at.elapsed().as_secs_f64());
        let rate = if generating > 0.0 { self.tokens.saturating_sub(1) as f64 / generating } else { 0.0 };
        let reason = match finished.reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        };
        let place = |shard: &longshore_proto::types::ShardBytes| {
            format!("{} {}", shard.shard_id, console::bytes(shard.kv_bytes))
        };
        let holders = finished.placement.iter().filter(|shard| shard.kv_bytes > 0);
        let placement: Vec<_> = holders.map(place).collect();
        format!(
            "[TTFT {ttft:.2} s, {rate:.1} tokens/s, {} prompt tokens ({} cached), {} generated, {reason}{}{}; KV: {}]",
            console::grouped(finished.prompt_tokens),
            console::grouped(finished.cached_tokens),
            console::grouped(finished.completion_tokens),
            if finished.resumed > 0 {
                format!(", resumed {} times", finished.resumed)
            } else {
                String::new()
            },
            policy(&self.asked, &self.policy).map(|policy| format!(", prefill {policy}")).unwrap_or_default(),
            if placement.is_empty() { "less than one block".to_owned() } else { placement.join(", ") },
        )
    }
}

/// What to say of a policy: as it was asked for, else the name that means it, else its canonical text; and beside it the digest of the
/// head plan that it stands for. Nothing for exact attention, and where the router knows no policies.
fn policy(asked: &str, fingerprint: &str) -> Option<String> {
    if ["", EXACT_PREFILL].contains(&fingerprint) {
        return None;
    }
    let named = |name: &&str| {
        PrefillPolicy::parse(name, None).is_ok_and(|policy| policy.fingerprint() == fingerprint)
    };
    let name = match asked.trim() {
        "" => longshore_router::Policies::names().find(named).unwrap_or(fingerprint),
        asked => asked,
    };
    let digest = fingerprint.strip_prefix("heads:plan=").and_then(|rest| rest.split(',').next());
    Some(match digest.filter(|digest| !name.contains(digest)) {
        Some(digest) => format!("{name} (head plan {digest})"),
        None => name.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_told_as_they_were_asked_for_with_their_plan() {
        let uniform = PrefillPolicy::parse("balanced", None).unwrap().fingerprint();
        let planned = "heads:plan=0011,dense_layers=0,min_positions=4096,last_tiles=4,skip=off";
        let told = |asked: &str, fingerprint: &str| policy(asked, fingerprint).unwrap_or_default();
        assert_eq!(told("balanced", planned), "balanced (head plan 0011)");
        assert_eq!(told("balanced:plan=off", &uniform), "balanced:plan=off");
        assert_eq!(told("heads:level=t10", planned), "heads:level=t10 (head plan 0011)");
        assert_eq!(told(planned, planned), planned);
        // The router's default.
        assert_eq!(told("", planned), planned);
        assert_eq!(told("", &uniform), "balanced");
        assert_eq!((policy("", ""), policy("exact", "exact")), (None, None));
    }

    #[test]
    fn errors_of_the_wrong_port_say_which_is_right() {
        let refused = Error::new(Code::Unavailable, "tcp connect error");
        let html =
            Error::new(Code::Unimplemented, "grpc-status header missing, mapped from HTTP status code 404");
        for error in [refused, html] {
            let told = told(error).to_string();
            assert!(told.contains("`--url`") && told.contains("OpenAI HTTP API"), "{told}");
        }
        let other = told(Error::new(Code::Unavailable, "no worker; hint: start one")).to_string();
        assert!(!other.contains("--url"), "{other}");
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let text = "ä".repeat(CHUNK_BYTES);
        let chunks = text_chunks(&text);
        assert!(chunks.len() >= 2);
        let joined: String = chunks
            .iter()
            .map(|chunk| match chunk {
                PromptChunk::Text(piece) => piece.as_str(),
                other => panic!("{other:?} is no text"),
            })
            .collect();
        assert_eq!(joined, text);
        assert!(text_chunks("").is_empty());
    }
}
