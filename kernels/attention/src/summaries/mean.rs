//! Mean key and value of one block, from its stored bytes: whoever holds the block makes the same bits.
//!
//! All of it is f32. An element's mean is `Σ x · (1 / block_tokens)`, `x` being the stored element (in int8 tiles times the
//! scale of its token), the sum that of tokens 0, 1, 2, … in order from 0. The cosine of a key with the mean key is
//! `(k·k̄) / (√(k·k) · √(k̄·k̄))`, each product one chain of fused multiply-adds over the elements in order, or 0 where that is
//! no number; a head's is the sum of its keys' in order, times `1 / block_tokens`. The spread of an element of the keys is
//! `Σ (x − mean)² · (1 / block_tokens)`, one chain of fused multiply-adds over the tokens in order from 0.

use half::{bf16, f16};
use longshore_compute::InstructionSet;

use crate::shape::LANES;
use crate::simd::{Kernel, Lane, Simd, dispatch};
use crate::tile::{Element, Head};
use crate::{Error, KvDtype, Tile};

/// Mean key and value of a full block in one layer, and how like each other its keys are.
#[derive(Debug, Clone, PartialEq)]
pub struct Mean {
    heads: usize,
    head_dim: usize,
    key: Vec<f32>,
    value: Vec<f32>,
    spread: Vec<f32>,
    cosines: Vec<f32>,
}

impl Mean {
    /// The mean of all tokens of a tile.
    pub fn of(tile: &Tile) -> Self {
        dispatch(InstructionSet::detect(), MeanOf { tile })
    }

    /// A mean that was made elsewhere, `[kv_heads, head_dim]` each. What is not known (`None`) is 0; who plans with it must not
    /// ask for it. Refuses slices of other lengths and what is not finite.
    pub fn from_parts(
        (heads, head_dim): (usize, usize),
        key: &[f32],
        value: Option<&[f32]>,
        spread: Option<&[f32]>,
        cosines: Option<&[f32]>,
    ) -> Result<Self, Error> {
        let part = |field: &'static str, part: Option<&[f32]>, elements: usize| {
            let Some(part) = part else { return Ok(vec![0.0; elements]) };
            if part.len() != elements {
                let problem = format!("has {} elements, must have {elements}", part.len());
                return Err(Error::Invalid { field, problem });
            }
            match part.iter().find(|x| !x.is_finite()) {
                Some(x) => {
                    Err(Error::Invalid { field, problem: format!("is {x} somewhere, must be finite") })
                }
                None => Ok(part.to_vec()),
            }
        };
        let elements = heads * head_dim;
        Ok(Self {
            heads,
            head_dim,
            key: part("key", Some(key), elements)?,
            value: part("value", value, elements)?,
            spread: part("spread", spread, elements)?,
            cosines: part("cosines", cosines, heads)?,
        })
    }

    /// Whether everything is finite.
    pub fn is_finite(&self) -> bool {
        let all = [&self.key, &self.value, &self.spread, &self.cosines];
        all.into_iter().flatten().all(|x| x.is_finite())
    }

    /// Bytes of memory that it takes.
    pub fn memory_bytes(&self) -> usize {
        let parts = [&self.key, &self.value, &self.spread, &self.cosines];
        size_of::<Self>() + parts.into_iter().map(|part| part.capacity() * size_of::<f32>()).sum::<usize>()
    }

    /// KV heads and head size.
    pub fn shape(&self) -> (usize, usize) {
        (self.heads, self.head_dim)
    }

    /// Mean key, `[kv_heads, head_dim]`.
    pub fn key(&self) -> &[f32] {
        &self.key
    }

    /// Mean value, `[kv_heads, head_dim]`.
    pub fn value(&self) -> &[f32] {
        &self.value
    }

    /// Variance of each element of the keys, `[kv_heads, head_dim]`.
    pub fn spread(&self) -> &[f32] {
        &self.spread
    }

    /// Mean cosine of the keys with their mean, one a KV head: 1 when all point in one direction, about 0 when they have
    /// nothing in common (or are zero).
    pub fn cosines(&self) -> &[f32] {
        &self.cosines
    }
}

/// The mean of a tile, compiled once per instruction set.
pub(super) struct MeanOf<'a> {
    pub(super) tile: &'a Tile,
}

impl Kernel for MeanOf<'_> {
    type Output = Mean;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Mean {
        match self.tile.shape().dtype {
            KvDtype::F32 => self.run_as::<S, f32>(s),
            KvDtype::F16 => self.run_as::<S, f16>(s),
            KvDtype::Bf16 => self.run_as::<S, bf16>(s),
            KvDtype::Int8 => self.run_as::<S, i8>(s),
        }
    }
}

impl MeanOf<'_> {
    #[inline(always)]
    fn run_as<S: Simd, E: Element>(self, s: S) -> Mean {
        let shape = self.tile.shape();
        let (heads, head_dim) = (shape.kv_heads, shape.head_dim);
        let (mut key, mut value) = (vec![0.0; heads * head_dim], vec![0.0; heads * head_dim]);
        let mut spread = vec![0.0; heads * head_dim];
        let mut cosines = Vec::with_capacity(heads);
        let rows = key.chunks_exact_mut(head_dim).zip(value.chunks_exact_mut(head_dim));
        let rows = rows.zip(spread.chunks_exact_mut(head_dim));
        for (index, ((key, value), spread)) in rows.enumerate() {
            let head = self.tile.head::<E>(index);
            fold_keys(s, &head, key, |sum, x, _| s.add(sum, x));
            spread.copy_from_slice(key);
            fold_keys(s, &head, spread, |sum, x, mean| {
                let off = s.sub(x, mean);
                s.fma(off, off, sum)
            });
            mean_value(s, &head, shape.block_tokens, value);
            cosines.push(cosine(s, &head, shape.block_tokens, key));
        }
        Mean { heads, head_dim, key, value, spread, cosines }
    }
}

/// Folds the keys in order by `step(sum, key, mean)`, from 0, and leaves the share of each key in place of the means. Keys lie
/// side by side in a lane: 16 elements of 16 keys are turned round, so that the sums of 16 elements go on at once.
#[inline(always)]
fn fold_keys<S: Simd, E: Element>(
    s: S,
    head: &Head<'_, E>,
    means: &mut [f32],
    step: impl Fn(S::F32s, S::F32s, S::F32s) -> S::F32s,
) {
    let dim = means.len();
    let panels = head.k.len() / dim;
    let share = s.splat(1.0 / (panels * LANES) as f32);
    for (part, mean) in means.chunks_mut(LANES).enumerate() {
        let mut before = [0.0; LANES];
        before[..mean.len()].copy_from_slice(mean);
        let (before, mut sum) = (s.load(&before), s.splat(0.0));
        for panel in 0..panels {
            let lanes = &head.k[panel * dim + part * LANES..][..mean.len()];
            let mut turned = [[0.0; LANES]; LANES];
            for (element, lane) in lanes.iter().enumerate() {
                let mut row = [0.0; LANES];
                s.store(stored(s, lane, head.k_scales.get(panel)), &mut row);
                (0..LANES).for_each(|key| turned[key][element] = row[key]);
            }
            for lane in &turned {
                sum = step(sum, s.load(lane), before);
            }
        }
        store(s, s.mul(sum, share), mean);
    }
}

/// Columns lie side by side in a lane.
#[inline(always)]
fn mean_value<S: Simd, E: Element>(s: S, head: &Head<'_, E>, tokens: usize, mean: &mut [f32]) {
    let share = s.splat(1.0 / tokens as f32);
    for (lanes, mean) in head.v.chunks_exact(tokens).zip(mean.chunks_mut(LANES)) {
        let mut sum = s.splat(0.0);
        for (token, lane) in lanes.iter().enumerate() {
            let mut value = E::load(s, lane);
            if E::SCALED {
                value = s.mul(value, s.splat(head.v_scales.as_flattened()[token]));
            }
            sum = s.add(sum, value);
        }
        store(s, s.mul(sum, share), mean);
    }
}

#[inline(always)]
fn cosine<S: Simd, E: Element>(s: S, head: &Head<'_, E>, tokens: usize, mean: &[f32]) -> f32 {
    let length = mean.iter().fold(0.0_f32, |sum, x| x.mul_add(*x, sum)).sqrt();
    let mut sum = 0.0;
    for (panel, lanes) in head.k.chunks_exact(mean.len()).enumerate() {
        let (mut products, mut squares) = (s.splat(0.0), s.splat(0.0));
        for (lane, &mean) in lanes.iter().zip(mean) {
            let key = stored(s, lane, head.k_scales.get(panel));
            products = s.fma(key, s.splat(mean), products);
            squares = s.fma(key, key, squares);
        }
        let [mut products_of, mut squares_of]: [Lane; 2] = [[0.0; LANES]; 2];
        s.store(products, &mut products_of);
        s.store(squares, &mut squares_of);
        for (product, square) in products_of.iter().zip(squares_of) {
            let cosine = product / (square.sqrt() * length);
            sum += if cosine.is_finite() { cosine } else { 0.0 };
        }
    }
    sum * (1.0 / tokens as f32)
}

/// 16 elements of K; `scales` are those of their keys.
#[inline(always)]
fn stored<S: Simd, E: Element>(s: S, lane: &[E; LANES], scales: Option<&Lane>) -> S::F32s {
    match scales {
        Some(scales) if E::SCALED => s.mul(E::load(s, lane), s.load(scales)),
        _ => E::load(s, lane),
    }
}

/// Writes as many of the numbers as there is room for.
#[inline(always)]
fn store<S: Simd>(s: S, x: S::F32s, to: &mut [f32]) {
    let mut lane = [0.0; LANES];
    s.store(x, &mut lane);
    to.copy_from_slice(&lane[..to.len()]);
}
