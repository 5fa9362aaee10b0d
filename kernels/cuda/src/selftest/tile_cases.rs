//! Which tiles are compared.

use std::collections::BTreeSet;

use longshore_attention::{KvDtype, TileShape};

use super::Case;
use super::append::rows_to_pages;
use super::tile::{checksum, means, quantise_e4m3, quantise_int8, rounded_means, transcode};
use crate::{PageElement, PageShape};

fn shape(block_tokens: usize, kv_heads: usize, head_dim: usize, dtype: KvDtype) -> TileShape {
    TileShape { block_tokens, kv_heads, head_dim, dtype }
}

fn name(what: &str, shape: &TileShape) -> String {
    let TileShape { block_tokens, kv_heads, head_dim, dtype } = shape;
    format!("{what} {} {kv_heads}×{head_dim}, {block_tokens} tokens", dtype.name())
}

/// Comparisons of pages.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let shapes =
        [(KvDtype::F32, 32, 64), (KvDtype::F16, 64, 128), (KvDtype::Bf16, 16, 80), (KvDtype::Int8, 64, 80)];
    for (dtype, tokens, dim) in shapes {
        let shape = shape(tokens, 2, dim, dtype);
        cases.push(Case::new(name("transcode", &shape), 0.0, move |device| transcode(device, shape)));
        cases.push(Case::new(name("means", &shape), 0.0, move |device| means(device, shape)));
    }
    for (dtype, tokens, dim) in [(KvDtype::F32, 16, 80), (KvDtype::F16, 32, 64), (KvDtype::Bf16, 16, 96)] {
        let shape = shape(tokens, 2, dim, dtype);
        let run = move |device: &_| rows_to_pages(device, shape);
        cases.push(Case::new(name("rows to pages", &shape), 0.0, run));
    }
    for (dtype, dim) in [(KvDtype::F32, 80), (KvDtype::F16, 128), (KvDtype::Bf16, 64)] {
        let shape = shape(16, 2, dim, dtype);
        cases.push(Case::new(name("quantise to int8", &shape), 0.0, move |device| {
            quantise_int8(device, shape)
        }));
    }
    let floats = shape(16, 2, 96, KvDtype::F32);
    cases
        .push(Case::new(name("quantise to e4m3", &floats), 0.0, move |device| quantise_e4m3(device, floats)));
    for bytes in [16, 4_096, 4_112, 65_552] {
        let name = format!("checksum of {bytes} bytes");
        cases.push(Case::new(name, 0.0, move |device| checksum(device, bytes)));
    }
    let halves = shape(16, 2, 64, KvDtype::F16);
    for (element, limit) in [(PageElement::F16, 3e-4), (PageElement::Bf16, 3e-3)] {
        let run = move |device: &_| rounded_means(device, halves, element);
        cases.push(Case::new(name(&format!("means as {element:?} of"), &halves), limit, run));
    }
    cases
}

/// Every type at every head size of models.
pub(super) fn large_cases() -> Vec<Case> {
    let (mut cases, mut sizes) = (Vec::new(), BTreeSet::new());
    for dtype in KvDtype::ALL {
        for dim in PageShape::HEAD_DIMS {
            let shape = shape(64, 8, dim, dtype);
            cases.push(Case::new(name("transcode", &shape), 0.0, move |device| transcode(device, shape)));
            cases.push(Case::new(name("means", &shape), 0.0, move |device| means(device, shape)));
            sizes.insert(shape.bytes());
        }
    }
    cases.extend(sizes.into_iter().map(|bytes| {
        Case::new(format!("checksum of {bytes} bytes"), 0.0, move |device| checksum(device, bytes))
    }));
    cases
}
