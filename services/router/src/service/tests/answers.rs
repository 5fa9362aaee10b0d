//! What a client gets when all goes well.

use std::{collections::HashSet, sync::atomic::Ordering};

use longshore_attention::PrefillPolicy;
use longshore_fabric::{CallContext, Code, Describer as _, Inference as _};
use longshore_proto::types::{ChatMessage, FinishReason, GenerateStart, PrefillStart, PromptChunk, Sampling};

use crate::fixture::{CONTEXT_TOKENS, Fixture, MODEL, Options, Script, encode, generated, model, prompt_ids};
use crate::{Config, PolicyLabel};

fn max_tokens(count: u32) -> GenerateStart {
    GenerateStart {
        sampling: Sampling { max_tokens: Some(count), ..Sampling::default() },
        ..GenerateStart::default()
    }
}

#[tokio::test]
async fn streams_the_answer_of_a_prompt() {
    let fixture = Fixture::new(Options::default());
    let answer = fixture.generate_ids(max_tokens(20), 200).await.unwrap();
    let expected = generated(&prompt_ids(200), 20);
    assert_eq!(answer.ids, expected);
    assert_eq!(answer.text, model().tokenizer.decode(&expected));
    let finished = answer.finished();
    assert_eq!(
        (finished.reason, finished.prompt_tokens, finished.completion_tokens),
        (FinishReason::Length, 200, 20)
    );
    assert_eq!((finished.cached_tokens, finished.resumed), (0, 0));
    assert!(finished.time_to_first_token_ms > 0.0);
    // 219 tokens have KV: 3 full blocks of 2 layers, each K and V of 64 positions, 2 heads, 16 elements of 2 bytes.
    let bytes: u64 = finished.placement.iter().map(|shard| shard.kv_bytes).sum();
    assert_eq!(bytes, 3 * 2 * 2 * 64 * 2 * 16 * 2);
}

#[tokio::test]
async fn a_short_prompt_needs_no_prefill() {
    let fixture = Fixture::new(Options::default());
    fixture.generate_ids(max_tokens(3), 64).await.unwrap();
    assert_eq!(fixture.prefillers[0].calls(), 0);
}

#[tokio::test]
async fn the_second_time_the_prefix_is_cached() {
    let fixture = Fixture::new(Options { shards: 4, ..Options::default() });
    let first = fixture.generate_ids(max_tokens(5), 300).await.unwrap();
    let second = fixture.generate_ids(max_tokens(5), 300).await.unwrap();
    assert_eq!((first.cached_tokens, second.cached_tokens), (0, 256));
    assert_eq!(first.ids, second.ids);
    assert_eq!(fixture.prefillers[0].calls(), 1);
    let longer = fixture.generate_ids(max_tokens(5), 400).await.unwrap();
    assert_eq!(longer.cached_tokens, 256);
    let calls = fixture.prefillers[0].calls.lock().unwrap().clone();
    assert_eq!(calls.iter().map(|call| call.cached_blocks).collect::<Vec<_>>(), [0, 4]);
}

#[tokio::test]
async fn tenants_share_nothing() {
    let fixture = Fixture::new(Options::default());
    let salted = |salt: &str| GenerateStart { cache_salt: salt.into(), ..max_tokens(2) };
    fixture.generate_ids(salted("a"), 300).await.unwrap();
    assert_eq!(fixture.generate_ids(salted("b"), 300).await.unwrap().cached_tokens, 0);
    assert_eq!(fixture.generate_ids(max_tokens(2), 300).await.unwrap().cached_tokens, 0);
    assert_eq!(fixture.generate_ids(salted("a"), 300).await.unwrap().cached_tokens, 256);
}

fn by(policy: &str) -> GenerateStart {
    GenerateStart { prefill_policy: policy.to_owned(), ..max_tokens(2) }
}

#[tokio::test]
async fn policies_share_nothing() {
    let fixture = Fixture::new(Options::default());
    let salted = |policy: &str| GenerateStart { cache_salt: b"a".to_vec(), ..by(policy) };
    for start in [by("exact"), by("balanced"), salted("exact"), salted("balanced")] {
        assert_eq!(fixture.generate_ids(start, 300).await.unwrap().cached_tokens, 0);
    }
    for start in [by("exact"), by("balanced"), salted("exact"), salted("balanced")] {
        assert_eq!(fixture.generate_ids(start, 300).await.unwrap().cached_tokens, 256);
    }
    let namespaces =
        |calls: &[PrefillStart]| calls.iter().map(|call| call.identity.namespace).collect::<Vec<_>>();
    let prefills = namespaces(&fixture.prefillers[0].calls.lock().unwrap());
    assert_eq!(prefills.iter().collect::<HashSet<_>>().len(), 4);
    // The decode worker looks where the prefill worker wrote.
    let decodes: Vec<_> = fixture.decoders[0].calls().iter().map(|call| call.identity.namespace).collect();
    assert_eq!(decodes, [prefills.clone(), prefills].concat());
}

#[tokio::test]
async fn requests_that_name_no_policy_get_the_default() {
    for default in ["exact", "balanced"] {
        let config = Config { prefill_policy: default.to_owned(), ..Config::default() };
        let fixture = Fixture::new(Options { config, ..Options::default() });
        let canonical = fixture.generate_ids(by(default), 300).await.unwrap().prefill_policy;
        let unnamed = fixture.generate_ids(max_tokens(2), 300).await.unwrap();
        assert_eq!((unnamed.prefill_policy, unnamed.cached_tokens), (canonical, 256));
    }
}

#[tokio::test]
async fn prefill_workers_are_told_the_policy_and_where_rows_are_exact() {
    let fixture = Fixture::new(Options::default());
    let mut told = Vec::new();
    for policy in ["exact", "balanced"] {
        told.push(fixture.generate_ids(by(policy), 1_500).await.unwrap().prefill_policy);
    }
    let balanced = PrefillPolicy::parse("balanced", None).unwrap();
    let dense_from = (1_500 - u64::from(balanced.last_tiles()) * 32) / 32 * 32;
    assert_eq!(told, ["exact".to_owned(), balanced.fingerprint()]);
    let calls = fixture.prefillers[0].calls.lock().unwrap().clone();
    let calls: Vec<_> = calls.into_iter().map(|call| (call.prefill_policy, call.dense_from)).collect();
    assert_eq!(calls, [("exact".to_owned(), 0), (balanced.fingerprint(), dense_from)]);
    for (policy, count) in [("exact", 1), ("balanced", 1), ("other", 0)] {
        let label = PolicyLabel { policy: policy.to_owned() };
        assert_eq!(fixture.metrics.prefill_policy.get_or_create(&label).get(), count, "{policy}");
    }
}

#[tokio::test]
async fn progress_comes_when_asked_for() {
    let fixture = Fixture::new(Options::default());
    let start = GenerateStart { progress: true, ..max_tokens(1) };
    assert_eq!(fixture.generate_ids(start, 300).await.unwrap().progress, [64, 128, 192, 256]);
    let fixture = Fixture::new(Options::default());
    assert!(fixture.generate_ids(max_tokens(1), 300).await.unwrap().progress.is_empty());
}

#[tokio::test]
async fn stop_strings_end_the_answer_and_the_decode() {
    let fixture = Fixture::new(Options::default());
    fixture.decoders[0].say(encode("say hello there and more"));
    let start = GenerateStart { stop: vec!["lo the".to_owned()], ..max_tokens(200) };
    let answer = fixture.generate_ids(start, 10).await.unwrap();
    assert_eq!(answer.text, "say hel");
    assert_eq!(answer.finished().reason, FinishReason::Stop);
    Fixture::eventually("the end of the decode", || fixture.decoders[0].dropped.load(Ordering::SeqCst) == 1)
        .await;
}

#[tokio::test]
async fn text_held_for_a_stop_string_is_not_lost() {
    let fixture = Fixture::new(Options::default());
    fixture.decoders[0].say(encode("say hel"));
    let start = GenerateStart { stop: vec!["hello".to_owned()], ..max_tokens(200) };
    let answer = fixture.generate_ids(start, 10).await.unwrap();
    assert_eq!((answer.text.as_str(), answer.finished().reason), ("say hel", FinishReason::Stop));
}

#[tokio::test]
async fn characters_that_span_tokens_stay_whole() {
    let fixture = Fixture::new(Options::default());
    let text = "naïve 漢字 🙂";
    let ids = encode(text);
    assert!(ids.len() > text.chars().count(), "characters span tokens");
    fixture.decoders[0].say(ids);
    let answer = fixture.generate_ids(max_tokens(200), 10).await.unwrap();
    assert_eq!(answer.text, text);
}

#[tokio::test]
async fn a_cut_off_character_comes_as_a_replacement() {
    let fixture = Fixture::new(Options::default());
    let ids = encode("a🙂");
    fixture.decoders[0].say(ids[..ids.len() - 1].to_vec());
    assert_eq!(fixture.generate_ids(max_tokens(200), 10).await.unwrap().text, "a\u{fffd}");
}

#[tokio::test]
async fn lengths_are_bounded_by_default_and_by_the_context() {
    let fixture = Fixture::new(Options::default());
    let answer = fixture.generate_ids(GenerateStart::default(), 10).await.unwrap();
    assert_eq!(answer.finished().completion_tokens, 256);
    for start in [GenerateStart::default(), max_tokens(100)] {
        let answer = fixture.generate_ids(start, CONTEXT_TOKENS as u32 - 7).await.unwrap();
        assert_eq!(
            (answer.finished().completion_tokens, answer.finished().reason),
            (7, FinishReason::Length)
        );
    }
}

#[tokio::test]
async fn defaults_are_filled_in_for_workers() {
    let fixture = Fixture::new(Options::default());
    fixture.generate_ids(max_tokens(1), 10).await.unwrap();
    let ignore = Sampling { ignore_eos: true, max_tokens: Some(1), seed: Some(7), ..Sampling::default() };
    fixture.generate_ids(GenerateStart { sampling: ignore, ..GenerateStart::default() }, 10).await.unwrap();
    fixture.generate_ids(max_tokens(1), 10).await.unwrap();
    let calls = fixture.decoders[0].calls();
    assert_eq!(calls[0].stop_token_ids, model().tokenizer.eos_ids());
    assert!(calls[1].stop_token_ids.is_empty());
    assert_eq!(calls[1].sampling.seed, Some(7));
    let seeds: HashSet<_> = calls.iter().map(|call| call.sampling.seed).collect();
    assert_eq!(seeds.len(), 3, "seeds are drawn anew");
    assert_eq!(calls[0].request_id, "test");
}

#[tokio::test]
async fn log_probabilities_carry_texts() {
    let fixture = Fixture::new(Options::default());
    fixture.decoders[0].say(encode("hello"));
    let sampling = Sampling { logprobs: Some(2), ..Sampling::default() };
    let start = GenerateStart { sampling, ..GenerateStart::default() };
    let answer = fixture.generate_ids(start, 10).await.unwrap();
    assert_eq!(answer.logprobs.len(), answer.ids.len());
    let choice = &answer.logprobs[0];
    assert_eq!((choice.text.as_str(), choice.chosen.token_id, choice.top.len()), ("hello", answer.ids[0], 2));
    assert_eq!(choice.top[0].1, model().tokenizer.decode(&[50]));
}

#[tokio::test]
async fn text_and_chat_are_tokenized_with_the_models_own_rules() {
    let fixture = Fixture::new(Options::default());
    let text = |text: &str| PromptChunk::Text(text.to_owned());
    let answer = fixture.generate(max_tokens(1), vec![text("hello "), text("there")]).await.unwrap();
    assert_eq!(answer.prompt_tokens, encode("hello there").len() as u64);
    let message = |role: &str, content: &str| {
        PromptChunk::Message(ChatMessage { role: role.to_owned(), content: content.to_owned() })
    };
    let chat = vec![message("system", "be brief"), message("user", "hello")];
    let answer = fixture.generate(max_tokens(1), chat).await.unwrap();
    let rendered =
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(answer.prompt_tokens, encode(rendered).len() as u64);
    let long = "hello there ".repeat(150);
    let answer = fixture.generate(max_tokens(1), vec![text(&long)]).await.unwrap();
    assert_eq!(answer.prompt_tokens, encode(&long).len() as u64);
}

#[tokio::test]
async fn tokenizes_and_describes() {
    let fixture = Fixture::new(Options::default());
    let ctx = CallContext::new("test");
    assert_eq!(
        fixture.router.tokenize(&ctx, MODEL, "hello there", false).await.unwrap(),
        encode("hello there")
    );
    let error = fixture.router.tokenize(&ctx, "other", "x", false).await.unwrap_err();
    assert_eq!((error.code, error.field.as_deref()), (Code::NotFound, Some("model")));
    let huge = "x".repeat(1 << 20);
    assert_eq!(fixture.router.tokenize(&ctx, "", &huge, false).await.unwrap_err().code, Code::OutOfRange);
    let described = fixture.router.describe(&ctx).await.unwrap();
    assert_eq!((described.this.id.as_str(), described.members.len()), ("router-0", 4));
    assert_eq!(described.models, fixture.router.list_models(&ctx).await.unwrap());
    assert_eq!(described.models[0].kv_bytes_per_token, 2 * 2 * 2 * 16 * 2);
}

#[tokio::test]
async fn load_spreads_over_workers() {
    let fixture = Fixture::new(Options { decoders: 2, ..Options::default() });
    fixture.decoders.iter().for_each(|decoder| decoder.script(Script::HangAfter(1)));
    let mut running = Vec::new();
    for _ in 0..2 {
        let mut events = fixture.start(max_tokens(9), vec![PromptChunk::Tokens(vec![5])]).await.unwrap();
        // Head, then first token: the worker has the sequence.
        for _ in 0..2 {
            futures::StreamExt::next(&mut events).await.unwrap().unwrap();
        }
        running.push(events);
    }
    assert_eq!(fixture.decoders.iter().map(|decoder| decoder.calls().len()).collect::<Vec<_>>(), [1, 1]);
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let fixture = Fixture::new(Options::default());
    fixture.generate_ids(max_tokens(5), 300).await.unwrap();
    fixture.generate_ids(max_tokens(5), 300).await.unwrap();
    let metrics = &fixture.metrics;
    Fixture::eventually("the end of both requests", || metrics.in_flight.get() == 0).await;
    assert_eq!(
        (metrics.prompt_tokens.get(), metrics.cached_tokens.get(), metrics.generated_tokens.get()),
        (600, 256, 10)
    );
    let registry = longshore_chassis::Metrics::new();
    crate::RouterMetrics::register(&registry);
    assert!(registry.encode().contains("longshore_router_time_to_first_token_seconds"));
}
