//! Means against their definition, and where they lie.

use longshore_compute::InstructionSet;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::mean::MeanOf;
use super::{Mean, PromisedMeans, Summaries};
use crate::simd::dispatch;
use crate::{KvDtype, PagedKv, Promise, Tile, TileShape};

fn random(shape: TileShape, rng: &mut ChaCha8Rng) -> Tile {
    let elements = shape.block_tokens * shape.kv_heads * shape.head_dim;
    // Keys with something in common.
    let keys: Vec<f32> =
        (0..elements).map(|at| rng.random_range(-1.0..1.0) + (at % 3) as f32 * 0.3).collect();
    let values: Vec<f32> = (0..elements).map(|_| rng.random_range(-3.0..3.0)).collect();
    let mut tile = Tile::zeroed(shape);
    tile.write(0, &keys, &values).unwrap();
    tile
}

/// Sums of f32 in order of the tokens, as documented.
fn expected(tile: &Tile) -> (Vec<f32>, Vec<f32>) {
    let shape = tile.shape();
    let width = shape.kv_heads * shape.head_dim;
    let (mut key, mut value) = (vec![0.0_f32; width], vec![0.0_f32; width]);
    for token in 0..shape.block_tokens {
        let (k, v) = tile.read(token).unwrap();
        key.iter_mut().zip(&k).for_each(|(sum, k)| *sum += k);
        value.iter_mut().zip(&v).for_each(|(sum, v)| *sum += v);
    }
    let share = 1.0 / shape.block_tokens as f32;
    key.iter_mut().chain(&mut value).for_each(|sum| *sum *= share);
    (key, value)
}

/// Variances of the elements of keys, f32 in order of the tokens, as documented.
fn expected_spread(tile: &Tile) -> Vec<f32> {
    let mean = expected(tile).0;
    let mut spread = vec![0.0_f32; mean.len()];
    for token in 0..tile.shape().block_tokens {
        let keys = tile.read(token).unwrap().0;
        for ((sum, k), mean) in spread.iter_mut().zip(keys).zip(&mean) {
            *sum = (k - mean).mul_add(k - mean, *sum);
        }
    }
    spread.iter().map(|sum| sum * (1.0 / tile.shape().block_tokens as f32)).collect()
}

/// Mean cosine of the keys of a head with their mean, in f64.
fn expected_cosine(tile: &Tile, head: usize) -> f64 {
    let shape = tile.shape();
    let dim = shape.head_dim;
    let keys: Vec<Vec<f64>> = (0..shape.block_tokens)
        .map(|token| tile.read(token).unwrap().0[head * dim..][..dim].iter().map(|&k| f64::from(k)).collect())
        .collect();
    let mean: Vec<f64> =
        (0..dim).map(|i| keys.iter().map(|key| key[i]).sum::<f64>() / keys.len() as f64).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cosines = keys.iter().map(|key| dot(key, &mean) / (dot(key, key) * dot(&mean, &mean)).sqrt());
    cosines.sum::<f64>() / keys.len() as f64
}

#[test]
fn means_match_their_definition_on_every_instruction_set() {
    println!("seed 95");
    let mut rng = ChaCha8Rng::seed_from_u64(95);
    for head_dim in [1, 5, 16, 64, 80, 96, 128, 256] {
        for dtype in KvDtype::ALL {
            let block_tokens = [16, 32, 64, 128, 256][rng.random_range(0..5)];
            let shape = TileShape { block_tokens, kv_heads: rng.random_range(1..4), head_dim, dtype };
            let tile = random(shape, &mut rng);
            let mean = Mean::of(&tile);
            assert_eq!((mean.key().to_vec(), mean.value().to_vec()), expected(&tile), "{shape:?}");
            assert_eq!(mean.spread(), expected_spread(&tile), "{shape:?}");
            for (head, cosine) in mean.cosines().iter().enumerate() {
                let error = (f64::from(*cosine) - expected_cosine(&tile, head)).abs();
                assert!(error < 1e-6, "{shape:?}, head {head}: off by {error:e}");
            }
            for set in InstructionSet::available() {
                assert_eq!(dispatch(set, MeanOf { tile: &tile }), mean, "{set}, {shape:?}");
            }
        }
    }
}

#[test]
fn cosines_of_special_keys() {
    let shape = TileShape { block_tokens: 16, kv_heads: 3, head_dim: 4, dtype: KvDtype::Int8 };
    let mut keys = Vec::new();
    for token in 0..16 {
        let sign = if token % 2 == 0 { 1.0 } else { -1.0 };
        keys.extend([3.0, 4.0, 0.0, 0.0]); // all equal
        keys.extend([sign, 0.0, 0.0, 0.0]); // a mean of zero
        keys.extend([0.0; 4]);
    }
    let mut tile = Tile::zeroed(shape);
    tile.write(0, &keys, &keys).unwrap();
    let mean = Mean::of(&tile);
    assert!((mean.cosines()[0] - 1.0).abs() < 1e-6, "{:?}", mean.cosines());
    assert_eq!(mean.cosines()[1..], [0.0, 0.0]);
}

#[test]
fn blocks_lie_in_their_stripes() {
    println!("seed 96");
    let mut rng = ChaCha8Rng::seed_from_u64(96);
    for (stripe_blocks, first) in [(1, 5), (4, 0), (4, 6), (16, 3), (32, 40), (128, 1), (256, 256)] {
        let shape = TileShape { block_tokens: 16, kv_heads: 2, head_dim: 5, dtype: KvDtype::F16 };
        let mut summaries = Summaries::new(shape, stripe_blocks, first).unwrap();
        assert_eq!((summaries.blocks(), summaries.len()), (first..first, 0));
        let tiles: Vec<Tile> = (0..70).map(|_| random(shape, &mut rng)).collect();
        for (block, tile) in (first..).zip(&tiles) {
            if block % 2 == 0 {
                summaries.push(block, tile).unwrap();
            } else {
                summaries.insert(block, &Mean::of(tile)).unwrap();
            }
        }
        assert_eq!(summaries.blocks(), first..first + 70);
        let stripes = (first..first + 70).map(|block| block / u64::from(stripe_blocks));
        assert_eq!(
            summaries.len() as u64,
            stripes.clone().next_back().unwrap() - first / u64::from(stripe_blocks) + 1
        );
        for ((block, stripe), tile) in (first..).zip(stripes).zip(&tiles) {
            let place = (stripe - first / u64::from(stripe_blocks)) as usize;
            let key = (block % u64::from(stripe_blocks)) as usize;
            assert_eq!(summaries.place(block), (place, key));
            let found = summaries.tile(place);
            assert_eq!(found.shape(), summaries.shape());
            assert_eq!(found.read(key).unwrap(), expected(tile), "block {block}");
            for head in 0..2 {
                assert_eq!(summaries.cosine(block, head), Mean::of(tile).cosines()[head]);
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let shape = TileShape { block_tokens: 16, kv_heads: 2, head_dim: 5, dtype: KvDtype::F16 };
    let field = |found: Result<(), crate::Error>| match found {
        Err(crate::Error::Invalid { field, .. }) => field,
        _ => "nothing",
    };
    for stripe_blocks in [0, 257, 512, u32::MAX] {
        assert_eq!(field(Summaries::new(shape, stripe_blocks, 0).map(|_| ())), "stripe_blocks");
    }
    let wrong = TileShape { block_tokens: 17, ..shape };
    assert_eq!(field(Summaries::new(wrong, 32, 0).map(|_| ())), "block_tokens");
    let large = TileShape { kv_heads: 64, head_dim: 128, ..shape };
    assert_eq!(field(Summaries::new(large, 256, 0).map(|_| ())), "tile_shape");

    let mut summaries = Summaries::new(shape, 32, 7).unwrap();
    let tile = Tile::zeroed(shape);
    for block in [6, 8] {
        assert_eq!(field(summaries.push(block, &tile)), "block");
        assert_eq!(field(summaries.insert(block, &Mean::of(&tile))), "block");
    }
    for other in [TileShape { dtype: KvDtype::F32, ..shape }, TileShape { kv_heads: 1, ..shape }] {
        assert_eq!(field(summaries.push(7, &Tile::zeroed(other))), "tile");
    }
    let narrow = Tile::zeroed(TileShape { head_dim: 4, ..shape });
    assert_eq!(field(summaries.insert(7, &Mean::of(&narrow))), "mean");
    assert_eq!(summaries.blocks(), 7..7);
    assert_eq!(field(summaries.push(7, &tile)), "nothing");
}

#[test]
fn means_made_elsewhere_are_as_good() {
    let shape = TileShape { block_tokens: 32, kv_heads: 2, head_dim: 20, dtype: KvDtype::F16 };
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let tiles: Vec<Tile> = (0..5).map(|_| random(shape, &mut rng)).collect();
    let (mut own, mut other) = (Summaries::new(shape, 3, 0).unwrap(), Summaries::new(shape, 3, 0).unwrap());
    let mut bare = Summaries::new(shape, 3, 0).unwrap().without_spreads();
    for (block, tile) in (0..).zip(&tiles) {
        let mean = Mean::of(tile);
        let (key, value) = (mean.key(), Some(mean.value()));
        let sent = Mean::from_parts((2, 20), key, value, Some(mean.spread()), Some(mean.cosines())).unwrap();
        assert_eq!(sent, mean);
        assert!(mean.is_finite());
        let keys_only = Mean::from_parts((2, 20), key, None, None, None).unwrap();
        assert_eq!((keys_only.key(), keys_only.value()), (key, &[0.0; 40][..]));
        own.push(block, tile).unwrap();
        other.insert(block, &sent).unwrap();
        bare.insert(block, &sent).unwrap();
    }
    assert_eq!((bare.len(), bare.spreads().len()), (2, 0));
    for stripe in 0..2 {
        assert_eq!(own.tile(stripe).as_bytes(), other.tile(stripe).as_bytes());
        assert_eq!(own.tile(stripe).as_bytes(), bare.tile(stripe).as_bytes());
        assert_eq!(own.spreads().tile(stripe).as_bytes(), other.spreads().tile(stripe).as_bytes());
    }
}

#[test]
fn means_that_make_no_sense_are_refused_by_part() {
    let good = [1.0; 6];
    for bad in [vec![1.0; 5], vec![1.0; 7], vec![f32::NAN; 6], vec![f32::INFINITY; 6]] {
        let parts: [(&str, Result<Mean, crate::Error>); 3] = [
            ("key", Mean::from_parts((2, 3), &bad, None, None, None)),
            ("value", Mean::from_parts((2, 3), &good, Some(&bad), None, None)),
            ("spread", Mean::from_parts((2, 3), &good, None, Some(&bad), None)),
        ];
        for (field, refused) in parts {
            let error = refused.expect_err(field).to_string();
            assert!(error.starts_with(&format!("`{field}` ")), "{error}");
        }
    }
    let error = Mean::from_parts((2, 3), &good, None, None, Some(&good)).unwrap_err().to_string();
    assert!(error.starts_with("`cosines` "), "{error}");
}

#[test]
fn promised_versions_are_those_of_the_tiles_when_their_means_came() {
    let shape = TileShape { block_tokens: 16, kv_heads: 2, head_dim: 8, dtype: KvDtype::F32 };
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let tiles: Vec<Tile> = (0..7).map(|_| random(shape, &mut rng)).collect();
    let mut summaries = Summaries::new(shape, 3, 0).unwrap();
    let mut plain = summaries.clone();
    for end in [2, 2, 7] {
        let (from, before) = (summaries.blocks().end, summaries.len());
        let old: Vec<u64> = (0..before).map(|tile| summaries.tile(tile).version()).collect();
        let promised = summaries.promise(end);
        let versions: Vec<u64> = promised.tiles().iter().map(Promise::version).collect();
        // Blocks 0 and 1 are of stripe 0; 2 to 6 end it and make stripes 1 and 2.
        assert_eq!(versions.len(), if end == from { 0 } else { end as usize / 2 });
        // Nothing has changed but that tiles of new stripes are there, zero.
        assert!((0..before).all(|tile| summaries.tile(tile).version() == old[tile]));
        assert!(
            (before..summaries.len()).all(|tile| summaries.tile(tile).as_bytes().iter().all(|&b| b == 0))
        );
        for block in from..end {
            summaries.push(block, &tiles[block as usize]).unwrap();
            plain.push(block, &tiles[block as usize]).unwrap();
        }
        summaries.keep(promised).unwrap();
        let first = summaries.len() - versions.len();
        assert!((first..).zip(&versions).all(|(tile, version)| summaries.tile(tile).version() == *version));
        assert_eq!(summaries.len(), plain.len());
        let same = |tile| summaries.tile(tile).as_bytes() == plain.tile(tile).as_bytes();
        assert!((0..plain.len()).all(same));
    }
}

#[test]
fn versions_are_kept_for_the_blocks_that_they_were_promised_for() {
    let shape = TileShape { block_tokens: 16, kv_heads: 2, head_dim: 8, dtype: KvDtype::F32 };
    let tile = random(shape, &mut ChaCha8Rng::seed_from_u64(9));
    let mut summaries = Summaries::new(shape, 3, 0).unwrap();
    let versions = |summaries: &Summaries| -> Vec<u64> {
        (0..summaries.len()).map(|tile| summaries.tile(tile).version()).collect()
    };
    // Too early: no mean came, or not all of them did.
    let refused = |summaries: &mut Summaries, promised| {
        let before = versions(summaries);
        let error = summaries.keep(promised).unwrap_err().to_string();
        assert!(error.starts_with("`promised` are for the blocks up to"), "{error}");
        assert_eq!(versions(summaries), before);
    };
    let early = summaries.promise(2);
    refused(&mut summaries, early);
    let early = summaries.promise(5);
    (0..2).for_each(|block| summaries.push(block, &tile).unwrap());
    refused(&mut summaries, early);
    // Too late.
    let late = summaries.promise(4);
    (2..5).for_each(|block| summaries.push(block, &tile).unwrap());
    refused(&mut summaries, late);
    // Of tiles that others were promised for later the blocks have no part.
    let (now, before) = (summaries.promise(6), versions(&summaries));
    let wanted = now.tiles()[0].version();
    let later = summaries.promise(9);
    assert_eq!((now.tiles().len(), later.tiles().len(), summaries.len()), (1, 2, 3));
    summaries.push(5, &tile).unwrap();
    summaries.keep(now).unwrap();
    assert_eq!(versions(&summaries)[..2], [before[0], wanted]);
    assert!(summaries.keep(PromisedMeans::default()).is_ok(), "none are kept for any");
}
