//! Mass and distance against a slow softmax in f64.

use std::time::Duration;

use longshore_attention::{ExactBlock, HeadShape, KvDtype, PlanInput, Tile, TileShape, Tiles};

use super::*;
use crate::random::Random;

const HEADS: HeadShape = HeadShape { kv_heads: 2, group: 2, head_dim: 16 };
const BLOCK: usize = 16;

/// Softmax output and mass of `keys` for one query head.
fn reference(kv: &Tiles, q: &[f32], kv_head: usize, keys: &[usize]) -> (Vec<f64>, f64) {
    let row = |key: usize| kv.tiles[key / BLOCK].read(key % BLOCK).unwrap();
    let part = |x: &[f32]| x[kv_head * 16..][..16].iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    let weight = |key: usize| {
        let dot: f64 = part(&row(key).0).iter().zip(q).map(|(k, q)| k * f64::from(*q)).sum();
        (dot * 0.25).exp()
    };
    let sum: f64 = keys.iter().map(|key| weight(*key)).sum();
    let mut output = vec![0.0; 16];
    for &key in keys {
        let v = part(&row(key).1);
        output.iter_mut().zip(v).for_each(|(o, v)| *o += weight(key) / sum * v);
    }
    (output, sum)
}

#[test]
fn mass_and_distance_are_those_of_a_slow_softmax() {
    let mut random = Random::new(9);
    let mut numbers =
        |count: usize| -> Vec<f32> { (0..count).map(|_| (random.unit() * 4.0 - 2.0) as f32).collect() };
    let shape = TileShape { block_tokens: BLOCK, kv_heads: 2, head_dim: 16, dtype: KvDtype::F32 };
    let mut tile = || {
        let mut tile = Tile::zeroed(shape);
        tile.write(0, &numbers(BLOCK * 32), &numbers(BLOCK * 32)).unwrap();
        tile
    };
    let kv = Tiles { shape, tiles: (0..6).map(|_| tile()).collect() };
    // Rows 64 to 95; head 0 leaves out blocks 1 and 2 but for one key, head 1 visits everything.
    let (first, rows) = (64u64, 32usize);
    let q = numbers(rows * 64);
    let block = |tile: u32| {
        Visit::Block(ExactBlock { tile, first_position: u64::from(tile) * BLOCK as u64, len: BLOCK as u32 })
    };
    let column = Column { tile: 2, offset: 3, position: 35 };
    let sparse = [0, 3, 4, 5]
        .map(block)
        .into_iter()
        .chain([Visit::Columns { first: 0, count: 1 }, Visit::EndOfStripe]);
    let dense = (0..6).map(block).chain([Visit::EndOfStripe]);
    let lists = vec![(sparse.collect(), vec![column]), (dense.collect(), Vec::new())];
    let work = SparseWork::new(2, vec![rows as u32], lists).unwrap();
    let plan = PlanInput {
        queries: Queries { shape: HEADS, first_position: first, scale: 0.25, data: &q },
        layer: 3,
        kv: &kv,
        first_block: 0,
        summaries: &kv,
        stripe_blocks: 32,
        dense_from: u64::MAX,
        spreads: None,
        cosines: None,
    };
    // The policy's output: zeros, which lie at a distance of 1.
    let zeros = vec![0.0; rows * 64];
    let mut output = zeros.clone();
    let (position, row) = (80usize, 16usize);
    let kept: Vec<usize> = (0..16).chain([35]).chain(48..=position).collect();
    let all: Vec<usize> = (0..=position).collect();
    let mut expected_mass = Vec::new();
    let (mut distance, mut norm) = (0.0, 0.0);
    for head in 0..2 {
        let q = &q[row * 64 + head * 16..][..16];
        let ((ours, part), (right, whole)) = (reference(&kv, q, 0, &kept), reference(&kv, q, 0, &all));
        expected_mass.push(part / whole);
        for i in 0..16 {
            output[row * 64 + head * 16 + i] = ours[i] as f32;
            distance += (ours[i] - right[i]).powi(2);
            norm += right[i].powi(2);
        }
    }
    let pool = longshore_compute::ComputePool::serial();
    let sampled = [10, 80, 200];
    let mut heads = Heads::new(&pool, &sampled);
    let (plan_time, attend_time) = (Duration::ZERO, Duration::ZERO);
    let probe = AttentionProbe { layer: 3, plan, work: &work, output: &output, plan_time, attend_time };
    heads.look(&probe).unwrap();
    assert_eq!(heads.first_sparse, Some(64));
    assert_eq!(heads.samples.len(), 1, "a dense head has no samples");
    let (mass, distances) = &heads.samples[&(3, 0)];
    for (found, expected) in mass.iter().zip(&expected_mass) {
        assert!((found - expected).abs() < 1e-5 && *expected < 0.95, "{found} instead of {expected}");
    }
    let expected = (distance / norm).sqrt();
    assert!((distances[0] - expected).abs() < 1e-4 && expected > 0.05, "{} for {expected}", distances[0]);
    let mut other = Heads::new(&pool, &sampled);
    other.look(&AttentionProbe { output: &zeros, ..probe }).unwrap();
    assert!((other.output().median - 1.0).abs() < 1e-6);
}
