//! Which decode calls are compared.

use longshore_attention::HeadShape;

use super::Case;
use super::decode::{DecodeRequest, DecodeShape, chosen_pages, decode, merge};
use crate::{PageElement, PageShape, split_keys};

/// Largest relative distance, by what is multiplied.
fn limit(element: PageElement) -> f64 {
    match element {
        PageElement::F32 => 1e-5,
        PageElement::Bf16 => 8e-3,
        PageElement::F16 | PageElement::Int8 | PageElement::E4m3 => 2e-3,
    }
}

fn heads(kv_heads: usize, group: usize, head_dim: usize) -> HeadShape {
    HeadShape { kv_heads, group, head_dim }
}

/// A batch of tails, one key, nothing, and rows that see only some or none of the keys.
fn batch() -> Vec<DecodeRequest> {
    vec![
        DecodeRequest::step(131),
        DecodeRequest::step(1),
        DecodeRequest::step(0),
        DecodeRequest { keys: 100, rows: 1, first_position: 40 },
        DecodeRequest { keys: 40, rows: 1, first_position: 20 },
        DecodeRequest::step(192),
    ]
}

fn case(name: &str, shape: DecodeShape, requests: Vec<DecodeRequest>, split: usize) -> Case {
    let HeadShape { kv_heads, group, head_dim } = shape.heads;
    let name = format!(
        "decode {:?} {kv_heads}×{group}×{head_dim}, pages of {}, {name}",
        shape.element, shape.tokens
    );
    Case::new(name, limit(shape.element), move |device| decode(device, &shape, &requests, split))
}

/// Comparisons of decode attention and merges.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (element, tokens, heads) in [
        (PageElement::F32, 16, heads(2, 3, 80)),
        (PageElement::F16, 64, heads(2, 4, 128)),
        (PageElement::Bf16, 32, heads(1, 8, 64)),
        (PageElement::Bf16, 16, heads(1, 2, 256)),
        (PageElement::Int8, 64, heads(2, 1, 128)),
        (PageElement::Int8, 16, heads(1, 5, 80)),
        (PageElement::E4m3, 32, heads(2, 7, 96)),
    ] {
        cases.push(case("batch", DecodeShape { element, tokens, heads, size: 2.0 }, batch(), 64));
    }
    for element in [PageElement::F32, PageElement::F16, PageElement::Bf16, PageElement::Int8] {
        let shape = DecodeShape { element, tokens: 16, heads: heads(1, 3, 64), size: 2.0 };
        let requests = vec![DecodeRequest::tail(90, 9), DecodeRequest::tail(20, 20), DecodeRequest::step(33)];
        cases.push(case("several rows", shape, requests, 48));
        let extreme = DecodeShape { size: 300.0, ..shape };
        cases.push(case("extreme logits", extreme, vec![DecodeRequest::step(150)], 64));
        let name = format!("decode {element:?}, pages chosen by each KV head");
        let shape = DecodeShape { heads: heads(3, 2, 64), ..shape };
        cases.push(Case::new(name, limit(element), move |device| chosen_pages(device, &shape, 187)));
    }
    for (head_dim, sources, records) in [(64, 1, 5), (80, 7, 9), (256, 70, 5)] {
        let name = format!("merge of {sources} partials of {records}×{head_dim}");
        cases.push(Case::new(name, 0.0, move |device| merge(device, head_dim, sources, records)));
    }
    cases
}

/// The shape of Llama-3-8B over tens of thousands of keys.
pub(super) fn large_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for element in PageElement::ALL {
        let shape = DecodeShape { element, tokens: 64, heads: heads(8, 4, 128), size: 2.0 };
        for keys in [20_000, 70_001] {
            let requests =
                vec![DecodeRequest::step(keys), DecodeRequest::step(777), DecodeRequest::step(keys / 2)];
            cases.push(case(&format!("{keys} keys"), shape, requests, split_keys(keys as u64) as usize));
        }
        let requests = vec![DecodeRequest::tail(5_000, 64), DecodeRequest::step(3_000)];
        cases.push(case("a tail of 64 rows", shape, requests, 1_024));
    }
    for head_dim in PageShape::HEAD_DIMS {
        let name = format!("merge of 256 partials of 200×{head_dim}");
        cases.push(Case::new(name, 0.0, move |device| merge(device, head_dim, 256, 200)));
    }
    cases
}
