//! What comes to the host of the logits of a decode step, and that the sampler takes the same token of it.

use std::sync::Arc;

use longshore_cuda::{CudaBackend, Device};
use longshore_model::testing::TinyOptions;
use longshore_model::{Activations, Backend as _, RowLogits, Sampler, SamplerParams, WantedRow};

use crate::counted::{Counts, Watched};
use crate::watched::{load, model};

const VOCABULARY: usize = 267;

fn backend() -> (Arc<Watched>, CudaBackend) {
    let watched = Watched::with_room(usize::MAX);
    let device: Arc<dyn Device> = watched.clone();
    let backend = load(device, &model(&TinyOptions::default()), &|_| ()).unwrap();
    assert_eq!(backend.config().vocabulary, VOCABULARY);
    (watched, backend)
}

fn wanted(candidates: &[Option<usize>]) -> Vec<WantedRow> {
    candidates.iter().enumerate().map(|(row, &candidates)| WantedRow { row, candidates }).collect()
}

fn candidates(
    (watched, backend): &(Arc<Watched>, CudaBackend),
    x: &Activations,
    wanted: &[WantedRow],
) -> (Counts, Vec<RowLogits>) {
    let before = watched.counted();
    let rows = backend.candidates(x, wanted).unwrap();
    (watched.counted() - before, rows)
}

/// Rows after all layers; attention is whatever has its shape.
fn rows(backend: &CudaBackend, tokens: &[u32]) -> Activations {
    let mut x = backend.embed(tokens).unwrap();
    for layer in 0..backend.config().layers {
        let qkv = backend.qkv(layer, &x, &(0..tokens.len() as u64).collect::<Vec<_>>()).unwrap();
        x = backend.finish(layer, x, &qkv.q).unwrap();
    }
    x
}

#[test]
fn a_greedy_step_brings_twenty_bytes_a_row_by_one_copy() {
    let own = backend();
    let x = rows(&own.1, &[5, 6, 7]);
    let (counts, chosen) = candidates(&own, &x, &wanted(&[Some(1); 3]));
    // A candidate, and the sum and the fault of one span of 2,048 logits.
    assert_eq!(
        (counts.downloads, counts.downloaded_bytes, counts.waits()),
        (1, 3 * (8 + 12), 1),
        "{counts:?}"
    );
    let (counts, whole) = candidates(&own, &x, &wanted(&[None; 3]));
    assert_eq!(counts.downloaded_bytes, 3 * VOCABULARY * size_of::<f32>(), "{counts:?}");
    let sampler = Sampler::new(SamplerParams::greedy()).unwrap();
    for (chosen, whole) in chosen.iter().zip(&whole) {
        assert!(matches!(chosen, RowLogits::Likeliest(_)) && matches!(whole, RowLogits::All(_)));
        let token = |row| sampler.sample_row(row, VOCABULARY, 0).unwrap().token;
        assert_eq!(token(chosen), token(whole));
    }
    let logits = own.1.logits(&x, &[0, 1, 2]).unwrap();
    assert!(whole.into_iter().flat_map(RowLogits::into_all).eq(logits), "whole rows are the logits");
}

#[test]
fn rows_come_whole_where_their_choice_takes_all_logits() {
    let own = backend();
    let x = rows(&own.1, &[1, 2, 3, 4]);
    let mixed = wanted(&[Some(3), None, Some(40), Some(1)]);
    let (counts, found) = candidates(&own, &x, &mixed);
    // As many candidates of each as one of them takes; what needs fewer is given more.
    let bytes = 4 * (40 * 8 + 12) + VOCABULARY * size_of::<f32>();
    assert_eq!((counts.downloads, counts.downloaded_bytes), (2, bytes), "{counts:?}");
    let logits = own.1.logits(&x, &[0, 1, 2, 3]).unwrap();
    for ((wanted, found), logits) in mixed.iter().zip(&found).zip(logits.chunks_exact(VOCABULARY)) {
        let RowLogits::Likeliest(likeliest) = found else {
            assert!(wanted.candidates.is_none() && *found == RowLogits::All(logits.to_vec()));
            continue;
        };
        assert_eq!(likeliest.best.len(), 40);
        let params =
            SamplerParams { top_k: 3, temperature: 0.8, logprobs: Some(2), ..SamplerParams::default() };
        let sampler = Sampler::new(params).unwrap();
        for index in 0..20 {
            let [a, b] = [sampler.sample_row(found, VOCABULARY, index), sampler.sample(logits, index)]
                .map(Result::unwrap);
            let near = |a: f32, b: f32| (a - b).abs() < 1e-4;
            assert!(a.token == b.token && near(a.logprob.unwrap(), b.logprob.unwrap()), "{a:?} {b:?}");
        }
    }
    // More than the kernel keeps, which a larger vocabulary could ask for.
    let (_, found) = candidates(&own, &x, &wanted(&[Some(VOCABULARY + 1)]));
    assert!(matches!(&found[..], [RowLogits::All(_)]));
}

#[test]
fn without_memory_to_choose_rows_come_whole() {
    let own = backend();
    let x = rows(&own.1, &[5, 6, 7]);
    // Allocations that logits take: without those there is nothing to bring.
    let outcome = |number: usize, wanted: &[WantedRow]| {
        own.0.refuse_allocation(number);
        let before = own.0.refusals();
        let outcome = own.1.candidates(&x, wanted);
        let refused = own.0.refusals() > before;
        own.0.refuse_allocation(usize::MAX);
        (refused, outcome)
    };
    let logits = (0..).find(|&number| !outcome(number, &wanted(&[None; 3])).0).unwrap();
    assert!(logits > 0);
    let (mut number, expected) = (0, outcome(usize::MAX, &wanted(&[Some(2), None, Some(5)])).1.unwrap());
    let sampler = Sampler::new(SamplerParams::greedy()).unwrap();
    let tokens = |rows: &[RowLogits]| -> Vec<u32> {
        rows.iter().map(|row| sampler.sample_row(row, VOCABULARY, 0).unwrap().token).collect()
    };
    loop {
        let (refused, found) = outcome(number, &wanted(&[Some(2), None, Some(5)]));
        if !refused {
            break;
        }
        match found {
            Err(error) => assert!(number < logits && error.retryable(), "allocation {number}: {error}"),
            Ok(found) => {
                assert!(found.iter().all(|row| matches!(row, RowLogits::All(_))), "allocation {number}");
                assert_eq!(tokens(&found), tokens(&expected));
            }
        }
        number += 1;
    }
    assert!(number > logits, "{number} allocations, {logits} of them for logits");
}

#[test]
fn of_equal_logits_the_lowest_token_wins_and_what_is_no_number_comes_whole() {
    let own = backend();
    // Rows of zeros have logits of zero; rows of NaN of NaN.
    let x = Activations::from_host(64, [vec![0.0; 64], vec![f32::NAN; 64], vec![0.0; 64]].concat());
    let (_, found) = candidates(&own, &x, &wanted(&[Some(2); 3]));
    let sampler = Sampler::new(SamplerParams::greedy()).unwrap();
    for row in [0, 2] {
        let RowLogits::Likeliest(likeliest) = &found[row] else { panic!("{:?}", found[row]) };
        assert_eq!(likeliest.best, [(0, 0.0), (1, 0.0)]);
        assert_eq!(sampler.sample_row(&found[row], VOCABULARY, 0).unwrap().token, 0);
    }
    let RowLogits::All(logits) = &found[1] else { panic!("{:?}", found[1]) };
    assert!(logits.len() == VOCABULARY && logits.iter().all(|logit| logit.is_nan()));
    let error = sampler.sample_row(&found[1], VOCABULARY, 0).unwrap_err();
    assert!(error.to_string().contains("logit of token `0`"), "{error}");
}
