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
        .map_err(told)
        .context("`--url` is no gRPC address")?;
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
        let stream = client.generate(ctx, start, receive).await.map_err(told);
        let mut events = stream.with_context(|| format!("cannot generate at {url}"))?;
        let mut shown = Shown::new();
        while let Some(event) = events.next().await {
            shown.event(event.map_err(told)?);
        }
        Ok(shown.close())
    };
    tokio::join!(feed, show).1
}

fn told(error: Error) -> anyhow::Error {
    let hint = match error.code {
        Code::Unavailable if !error.message.contains("hint:") => "; hint: is `longshore up` running there?",
        _ => "",
    };
    anyhow::anyhow!("{:?}: {}{hint}", error.code, error.message)
}

struct Shown {
    began: Instant,
    first_token: Option<Instant>,
    bar: Option<indicatif::ProgressBar>,
    policy: String,
    text: String,
    tokens: u64,
    finished: Option<Finished>,
}

impl Shown {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            first_token: None,
            bar: None,
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
            // Routers that know no policies say nothing.
            if ["", EXACT_PREFILL].contains(&self.policy.as_str()) {
                String::new()
            } else {
                format!(", prefill {}", short(&self.policy))
            },
            if placement.is_empty() { "less than one block".to_owned() } else { placement.join(", ") },
        )
    }
}

/// The name of a policy that is meant by its name alone, else its canonical text.
fn short(fingerprint: &str) -> &str {
    let named = |name: &&str| {
        PrefillPolicy::parse(name, None).is_ok_and(|policy| policy.fingerprint() == fingerprint)
    };
    longshore_router::Policies::names().find(named).unwrap_or(fingerprint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_told_by_the_name_that_they_were_asked_for() {
        for name in ["exact", "balanced"] {
            assert_eq!(short(&PrefillPolicy::parse(name, None).unwrap().fingerprint()), name);
        }
        assert_eq!(short("heads:plan=0011"), "heads:plan=0011");
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
