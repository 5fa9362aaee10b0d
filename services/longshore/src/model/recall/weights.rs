//! The weights of a recall model, set by hand. "Units" are those of the residual stream before any norm.

use std::f64::consts::LOG2_E;

use anyhow::Result;

use super::{RecallOptions, RecallVocabulary, codes::codes};
use crate::random::Random;

/// Logit of each pair of the previous-token head at distance 1, in base 2. Distances 0 and 2 lie 20 below the peak with the pairs that
/// [`Layout::previous_pairs`] gives, all others more than 50: over two million positions the previous token keeps all but 2e-6.
const PREVIOUS_LOGIT: f64 = 40.0;
/// Length of each pair of a previous-token key.
const PREVIOUS_KEY: f64 = 4.0;
/// Elements of a match key.
const MATCH_KEY: f64 = 8.0;
/// The first token's key, for tokens that are no keys themselves.
const REST_KEY: f64 = 64.0;
/// How far the first token lies above all others for them, as a share of the sharpness.
const REST_SHARE: f64 = 1.25;
/// Logit of the right value, natural.
const OUTPUT_LOGIT: f64 = 30.0;
pub(super) const NORM_EPS: f64 = 1e-6;
/// Width of the feed-forward layer, which does nothing.
pub(super) const FFN: usize = 16;

/// A named tensor, row-major.
#[derive(Debug)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) data: Vec<f32>,
}

impl Tensor {
    fn new(name: impl Into<String>, shape: &[usize]) -> Self {
        Self { name: name.into(), shape: shape.to_vec(), data: vec![0.0; shape.iter().product()] }
    }

    fn filled(name: impl Into<String>, len: usize, value: f32) -> Self {
        Self { name: name.into(), shape: vec![len], data: vec![value; len] }
    }

    fn set(&mut self, row: usize, column: usize, value: f64) {
        self.data[row * self.shape[1] + column] = value as f32;
    }
}

/// Where everything lies in the residual stream and in a head.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Layout {
    pub(super) vocabulary: RecallVocabulary,
    pub(super) hidden: usize,
    head_dim: usize,
    kv_heads: usize,
    group: usize,
    /// Elements of a key code in one KV head; the values have `head_dim`.
    code: usize,
    key: usize,
    value: usize,
    previous: usize,
    out: usize,
}

/// Elements of the residual stream that stand for one thing each.
const CONSTANT: usize = 0;
const FIRST: usize = 1;
const FILLER: usize = 2;
const VALUE_MARK: usize = 3;
const PREVIOUS_MARK: usize = 4;

impl Layout {
    pub(super) fn of(options: &RecallOptions) -> Self {
        let &RecallOptions { head_dim, kv_heads, group, .. } = options;
        let code = head_dim / 2;
        let key = PREVIOUS_MARK + 1;
        let value = key + kv_heads * code;
        let previous = value + kv_heads * head_dim;
        let out = previous + kv_heads * code;
        let hidden = (out + kv_heads * head_dim).next_multiple_of(64);
        let vocabulary = RecallVocabulary::of(options);
        Self { vocabulary, hidden, head_dim, kv_heads, group, code, key, value, previous, out }
    }

    /// Squared norm of a whole key code, and of what every other token has in its place.
    fn code_norm(&self) -> f64 {
        (self.kv_heads * self.code) as f64
    }

    /// What RMSNorm divides by, of a row of this squared norm.
    fn rms(&self, squared_norm: f64) -> f64 {
        (squared_norm / self.hidden as f64 + NORM_EPS).sqrt()
    }

    /// Of embeddings.
    fn first_rms(&self) -> f64 {
        self.rms(1.0 + self.code_norm())
    }

    /// After the previous-token head.
    fn second_rms(&self) -> f64 {
        self.rms(1.0 + 2.0 * self.code_norm())
    }

    /// After the match head has found a value.
    fn last_rms(&self) -> f64 {
        self.rms(1.0 + 2.0 * self.code_norm() + (self.kv_heads * self.head_dim) as f64)
    }

    /// Pairs of a head that tell distances: from 1 down to about 1e-6 a position.
    fn previous_pairs(&self) -> usize {
        self.head_dim * 3 / 16
    }

    /// Element of a head that carries element `i` of a key code: the slower half of the pairs.
    fn code_element(&self, i: usize) -> usize {
        let quarter = self.head_dim / 4;
        if i < quarter { quarter + i } else { 2 * quarter + i }
    }

    /// Element of a head that tokens without keys use: the first of a pair slower than all that tell distances.
    fn rest_element(&self) -> usize {
        self.head_dim / 4 - 1
    }

    /// Product of q and k elements that makes a logit of 1 in base 2.
    fn unit_logit(&self) -> f64 {
        (self.head_dim as f64).sqrt() / LOG2_E
    }
}

/// All tensors of the model.
pub(super) fn tensors(options: &RecallOptions, layout: &Layout) -> Result<Vec<Tensor>> {
    let mut random = Random::new(options.seed);
    let slices = (0..options.kv_heads)
        .map(|_| codes("keys", options.keys, layout.code, &mut random))
        .collect::<Result<Vec<_>>>()?;
    let values = codes("values", options.values, options.kv_heads * options.head_dim, &mut random)?;
    let mut tensors = vec![embedding(layout, &slices, &values)];
    for layer in 0..options.layers {
        tensors.extend(if layer + 1 == options.layers {
            match_layer(layout, layer, f64::from(options.sharpness))
        } else {
            previous_layer(layout, layer, layer + 2 == options.layers)
        });
        tensors.extend(idle_parts(layout, layer));
    }
    tensors.push(Tensor::filled("model.norm.weight", layout.hidden, 1.0));
    tensors.push(output(layout, &values));
    Ok(tensors)
}

/// Every row has the squared norm `1 + code_norm`.
fn embedding(layout: &Layout, slices: &[Vec<Vec<f32>>], values: &[Vec<f32>]) -> Tensor {
    let words = layout.vocabulary.len();
    let mut table = Tensor::new("model.embed_tokens.weight", &[words, layout.hidden]);
    let (whole, half) = (layout.code_norm().sqrt(), (layout.code_norm() / 2.0).sqrt());
    for token in 0..words as u32 {
        let row = token as usize;
        table.set(row, CONSTANT, 1.0);
        if layout.vocabulary.keys.contains(&token) {
            let key = (token - layout.vocabulary.keys.start) as usize;
            let code = slices.iter().flat_map(|codes| &codes[key]);
            code.enumerate().for_each(|(i, &sign)| table.set(row, layout.key + i, f64::from(sign)));
        } else if layout.vocabulary.values.contains(&token) {
            let value = (token - layout.vocabulary.values.start) as usize;
            table.set(row, VALUE_MARK, half);
            for (i, &sign) in values[value].iter().enumerate() {
                table.set(row, layout.value + i, 0.5 * f64::from(sign));
            }
        } else if token == layout.vocabulary.bos {
            table.set(row, FILLER, half);
            table.set(row, FIRST, half);
        } else {
            table.set(row, FILLER, whole);
        }
    }
    table
}

fn named(layer: usize, part: &str) -> String {
    format!("model.layers.{layer}.{part}.weight")
}

/// q, k, v and output projections, all zero.
fn projections(layout: &Layout, layer: usize) -> [Tensor; 4] {
    let kv = layout.kv_heads * layout.head_dim;
    let q = kv * layout.group;
    [
        Tensor::new(named(layer, "self_attn.q_proj"), &[q, layout.hidden]),
        Tensor::new(named(layer, "self_attn.k_proj"), &[kv, layout.hidden]),
        Tensor::new(named(layer, "self_attn.v_proj"), &[kv, layout.hidden]),
        Tensor::new(named(layer, "self_attn.o_proj"), &[layout.hidden, q]),
    ]
}

/// Attends to the previous token; writes its code when `writes`.
fn previous_layer(layout: &Layout, layer: usize, writes: bool) -> Vec<Tensor> {
    let [mut q, mut k, mut v, mut o] = projections(layout, layer);
    let (dim, rms) = (layout.head_dim, layout.first_rms());
    let length = PREVIOUS_LOGIT * layout.unit_logit() / PREVIOUS_KEY;
    for head in 0..layout.kv_heads * layout.group {
        for pair in 0..layout.previous_pairs() {
            // One position ahead: turned back by what one position turns.
            let angle = frequency(pair, dim);
            q.set(head * dim + pair, CONSTANT, length * rms * angle.cos());
            q.set(head * dim + dim / 2 + pair, CONSTANT, -length * rms * angle.sin());
        }
    }
    for head in 0..layout.kv_heads {
        for pair in 0..layout.previous_pairs() {
            k.set(head * dim + pair, CONSTANT, PREVIOUS_KEY * rms);
        }
        if writes {
            copy_key(layout, head, rms, &mut v, &mut o);
        }
    }
    vec![q, k, v, o]
}

/// Value and output projection of a previous-token head: its slice of the code, and head 0 the mark of tokens without one, which
/// keeps the norm constant.
fn copy_key(layout: &Layout, head: usize, rms: f64, v: &mut Tensor, o: &mut Tensor) {
    let (dim, code, share) = (layout.head_dim, layout.code, 1.0 / layout.group as f64);
    for i in 0..code {
        v.set(head * dim + i, layout.key + head * code + i, rms);
        for query in head * layout.group..(head + 1) * layout.group {
            o.set(layout.previous + head * code + i, query * dim + i, share);
        }
    }
    if head == 0 {
        let root = std::f64::consts::SQRT_2;
        v.set(code, FILLER, rms);
        v.set(code, VALUE_MARK, root * rms);
        v.set(code, FIRST, (root - 1.0) * rms);
        for query in 0..layout.group {
            o.set(PREVIOUS_MARK, query * dim + code, share);
        }
    }
}

/// Finds the token after the key that this token is, and copies its value code.
fn match_layer(layout: &Layout, layer: usize, sharpness: f64) -> Vec<Tensor> {
    let [mut q, mut k, mut v, mut o] = projections(layout, layer);
    let (dim, code, rms) = (layout.head_dim, layout.code, layout.second_rms());
    // No other code has more than half of the product: the gap is half of the logit.
    let query = 2.0 * sharpness * layout.unit_logit() / (code as f64 * MATCH_KEY);
    let rest = REST_SHARE * sharpness * layout.unit_logit() / REST_KEY;
    let (whole, half) = (layout.code_norm().sqrt(), (layout.code_norm() / 2.0).sqrt());
    for head in 0..layout.kv_heads * layout.group {
        let kv_head = head / layout.group;
        for i in 0..code {
            q.set(head * dim + layout.code_element(i), layout.key + kv_head * code + i, query * rms);
        }
        q.set(head * dim + layout.rest_element(), FILLER, rest * rms / whole);
        q.set(head * dim + layout.rest_element(), VALUE_MARK, rest * rms / half);
    }
    for head in 0..layout.kv_heads {
        for i in 0..code {
            k.set(head * dim + layout.code_element(i), layout.previous + head * code + i, MATCH_KEY * rms);
        }
        k.set(head * dim + layout.rest_element(), FIRST, REST_KEY * rms / half);
        for i in 0..dim {
            v.set(head * dim + i, layout.value + head * dim + i, 2.0 * rms);
            for query in head * layout.group..(head + 1) * layout.group {
                o.set(layout.out + head * dim + i, query * dim + i, 1.0 / layout.group as f64);
            }
        }
    }
    vec![q, k, v, o]
}

/// Norms without effect and a feed-forward layer that adds nothing.
fn idle_parts(layout: &Layout, layer: usize) -> Vec<Tensor> {
    let hidden = layout.hidden;
    vec![
        Tensor::filled(named(layer, "input_layernorm"), hidden, 1.0),
        Tensor::filled(named(layer, "post_attention_layernorm"), hidden, 1.0),
        Tensor::new(named(layer, "mlp.gate_proj"), &[FFN, hidden]),
        Tensor::new(named(layer, "mlp.up_proj"), &[FFN, hidden]),
        Tensor::new(named(layer, "mlp.down_proj"), &[hidden, FFN]),
    ]
}

/// Reads the copied value code.
fn output(layout: &Layout, values: &[Vec<f32>]) -> Tensor {
    let mut table = Tensor::new("lm_head.weight", &[layout.vocabulary.len(), layout.hidden]);
    let scale = OUTPUT_LOGIT * layout.last_rms() / (layout.kv_heads * layout.head_dim) as f64;
    for (token, code) in layout.vocabulary.values.clone().zip(values) {
        for (i, &sign) in code.iter().enumerate() {
            table.set(token as usize, layout.out + i, scale * f64::from(sign));
        }
    }
    table
}

/// Angle per position of a pair, in radians.
fn frequency(pair: usize, head_dim: usize) -> f64 {
    super::THETA.powf(-((2 * pair) as f64) / head_dim as f64)
}
