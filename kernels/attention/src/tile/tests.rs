//! Where elements lie, and what is refused.

use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Tile;
use crate::{KvDtype, TileShape};

fn shape(block_tokens: usize, kv_heads: usize, head_dim: usize, dtype: KvDtype) -> TileShape {
    TileShape { block_tokens, kv_heads, head_dim, dtype }
}

#[test]
fn elements_lie_where_the_layout_says() {
    // Two heads of 20: K of a head is 2 × 20 lanes, V 2 × 32 lanes.
    let mut tile = Tile::zeroed(shape(32, 2, 20, KvDtype::F32));
    let keys: Vec<f32> = (1..=40).map(|x| x as f32).collect();
    let values: Vec<f32> = keys.iter().map(|x| -x).collect();
    tile.write(17, &keys, &values).unwrap();

    let body: Vec<f32> =
        tile.as_bytes().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(body.len(), 2 * (2 * 20 + 2 * 32) * 16);
    let head = (2 * 20 + 2 * 32) * 16;
    // Head 1, element 18 of token 17: panel 1, lane 1 of K; panel 1, row 17, column 2 of V.
    assert_eq!(body[head + (20 + 18) * 16 + 1], 39.0);
    assert_eq!(body[head + 40 * 16 + (32 + 17) * 16 + 2], -39.0);
    assert_eq!(body.iter().filter(|&&x| x != 0.0).count(), 80);
    assert_eq!(tile.as_bytes().as_ptr().align_offset(64), 0);
}

#[test]
fn a_version_names_one_content() {
    let mut tile = Tile::zeroed(shape(16, 1, 4, KvDtype::F16));
    let (before, copy) = (tile.version(), tile.clone());
    assert_eq!(copy.version(), before);
    tile.write(0, &[1.0; 4], &[2.0; 4]).unwrap();
    let other = Tile::from_bytes(tile.shape(), tile.as_bytes()).unwrap();
    let versions = [before, tile.version(), other.version(), Tile::zeroed(tile.shape()).version()];
    let different: std::collections::HashSet<u64> = versions.into_iter().collect();
    assert_eq!((different.len(), copy.version()), (4, before));
    assert!(tile.write(20, &[1.0; 4], &[2.0; 4]).is_err());
    assert_eq!(tile.version(), versions[1], "nothing was written");
    // Versions that were set aside belong to nobody else.
    let reserved = Tile::reserve_versions(3);
    assert!(
        Tile::zeroed(tile.shape()).version() >= reserved + 3 && Tile::reserve_versions(1) >= reserved + 3
    );
    let mut tile = tile.with_version(reserved + 1);
    assert_eq!((tile.version(), tile.clone().version()), (reserved + 1, reserved + 1));
    tile.write(1, &[1.0; 4], &[2.0; 4]).unwrap();
    assert!(tile.version() >= reserved + 3, "what is written has another");
}

#[test]
fn what_is_written_is_read() {
    println!("seed 41");
    let mut rng = ChaCha8Rng::seed_from_u64(41);
    for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16] {
        for (block, heads, dim) in [(16, 1, 1), (16, 3, 7), (64, 2, 64), (256, 1, 33), (32, 2, 1024)] {
            let mut tile = Tile::zeroed(shape(block, heads, dim, dtype));
            let (offset, count) = (rng.random_range(0..block - 3), 3);
            let mut draw = || -> Vec<f32> {
                (0..count * heads * dim)
                    .map(|_| bf16::from_f32(rng.random_range(-9.0..9.0)).to_f32())
                    .collect()
            };
            let (keys, values) = (draw(), draw());
            tile.write(offset, &keys, &values).unwrap();
            let copy = Tile::from_bytes(tile.shape(), tile.as_bytes()).unwrap();
            assert_eq!(copy.as_bytes(), tile.as_bytes());
            for token in 0..block {
                let (key, value) = copy.read(token).unwrap();
                if (offset..offset + count).contains(&token) {
                    let at = (token - offset) * heads * dim..(token - offset + 1) * heads * dim;
                    assert_eq!((&key[..], &value[..]), (&keys[at.clone()], &values[at]), "token {token}");
                } else {
                    assert!(key.iter().chain(&value).all(|&x| x == 0.0), "token {token}");
                }
            }
        }
    }
}

/// Beyond the range is its end; NaN stays what it is.
#[test]
fn narrow_types_round_to_nearest_and_saturate() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let written = [1.0 + 1.0 / 2048.0, 1.0 + 1.0 / 256.0, 65504.0, -1e9, 1e-9, -inf, f32::MAX, nan];
    for (dtype, expected) in [
        (KvDtype::F16, [1.0, 1.003_906_3, 65504.0, -65504.0, 0.0, -65504.0, 65504.0]),
        (KvDtype::Bf16, [1.0, 1.0, 65536.0, -1e9_f32, 1e-9, -3.389_531_4e38, 3.389_531_4e38]),
    ] {
        let mut tile = Tile::zeroed(shape(16, 1, 8, dtype));
        tile.write(0, &written, &written).unwrap();
        let (keys, values) = tile.read(0).unwrap();
        for (found, expected) in keys.iter().zip(&expected) {
            // bf16 keeps 8 bits of a number.
            assert!((found - expected).abs() <= expected.abs() / 256.0, "{dtype:?}: {found} for {expected}");
            assert!(dtype == KvDtype::Bf16 || found == expected, "{dtype:?}: {found} for {expected}");
        }
        assert_eq!((&keys[..7], keys[7].is_nan(), values[7].is_nan()), (&values[..7], true, true));
    }
}

#[test]
fn int8_keeps_a_scale_for_each_head_of_a_token() {
    let mut tile = Tile::zeroed(shape(16, 2, 4, KvDtype::Int8));
    let keys = [127.0, -63.5, 0.4, 1.5, 0.0, 0.0, 0.0, 0.0];
    let values = [-1e-3, 1e-3, 2e-6, 0.5e-3, 2.0, f32::INFINITY, 0.0, f32::NEG_INFINITY];
    tile.write(3, &keys, &values).unwrap();
    let (k, v) = tile.read(3).unwrap();
    // Halves round to even: −63.5 to −64 and 1.5 to 2.
    assert_eq!(k, [127.0, -64.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0]);
    let scale = 1e-3 / 127.0;
    assert_eq!(v[..4], [-127.0 * scale, 127.0 * scale, 0.0, 64.0 * scale]);
    assert!(v[5] > 3.4e38 && v[7] < -3.4e38 && v[4] == 0.0 && tile.is_finite(), "{v:?}");

    // Scales lie after the head's elements: 4 × 16 of K and 16 × 16 of V.
    let scale_of = |place: usize| f32::from_le_bytes(tile.as_bytes()[place..place + 4].try_into().unwrap());
    assert_eq!((scale_of(320 + 3 * 4), scale_of(320 + 64 + 3 * 4)), (1.0, scale));
    assert_eq!(tile.shape().bytes(), 2 * (64 + 256 + 2 * 64));
    assert_eq!(scale_of(448 + 320 + 3 * 4), 0.0);

    // What is too small for a scale vanishes; NaN does not.
    tile.write(3, &[1e-45; 8], &[1.0, 1.0, f32::NAN, 1.0, 1.0, 1.0, 1.0, 1.0]).unwrap();
    let (k, v) = tile.read(3).unwrap();
    assert_eq!(k, [0.0; 8]);
    assert!(v[..4].iter().all(|x| x.is_nan()) && v[4..] == [1.0; 4] && !tile.is_finite(), "{v:?}");
}

/// Rounding moves an element by half a step at most, and what was read is written as it was.
#[test]
fn int8_is_stable() {
    println!("seed 42");
    let mut rng = ChaCha8Rng::seed_from_u64(42);
    let mut tile = Tile::zeroed(shape(16, 1, 64, KvDtype::Int8));
    for round in 0..200 {
        let size = [1e-30, 1.0, 1e30][round % 3];
        let row: Vec<f32> = (0..64).map(|_| rng.random_range(-size..size)).collect();
        tile.write(round % 16, &row, &row).unwrap();
        let (k, v) = tile.read(round % 16).unwrap();
        let step = row.iter().fold(0.0_f32, |most, x| most.max(x.abs())) / 127.0;
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 0.501 * step;
        assert!(row.iter().zip(&k).all(close) && k == v, "{row:?} became {k:?}");
        let elements = tile.as_bytes()[..64 * 16].to_vec();
        tile.write(round % 16, &k, &v).unwrap();
        assert_eq!(elements, tile.as_bytes()[..64 * 16], "{row:?}");
    }
}

#[test]
fn wrong_bodies_and_places_are_refused() {
    let shape = shape(16, 2, 8, KvDtype::F16);
    let body = vec![0; shape.bytes() + 1];
    for length in [0, shape.bytes() - 1, shape.bytes() + 1] {
        let error = Tile::from_bytes(shape, &body[..length]).unwrap_err().to_string();
        assert!(error.starts_with("`body` has "), "{error}");
    }
    let odd = TileShape { block_tokens: 48, ..shape };
    assert!(Tile::from_bytes(odd, &body).unwrap_err().to_string().starts_with("`block_tokens`"));
    let huge = TileShape { kv_heads: 1024, head_dim: 1024, ..shape };
    assert!(Tile::from_bytes(huge, &body).unwrap_err().to_string().starts_with("`tile_shape`"));

    let mut tile = Tile::zeroed(shape);
    let data = [1.0; 64];
    for (field, offset, keys, values) in [
        ("keys", 0, 0, 0),
        ("keys", 0, 15, 15),
        ("values", 0, 16, 32),
        ("offset", 16, 16, 16),
        ("offset", 13, 64, 64),
        ("offset", usize::MAX, 16, 16),
    ] {
        let error = tile.write(offset, &data[..keys], &data[..values]).unwrap_err().to_string();
        assert!(error.starts_with(&format!("`{field}` ")), "{error}");
    }
    assert!(tile.read(16).is_err() && tile.read(usize::MAX).is_err());
    assert!(tile.as_bytes().iter().all(|&b| b == 0));
}

/// Writing keeps infinities out; whoever sends bodies may not.
#[test]
fn one_element_without_number_is_found_wherever_it_is() {
    for dtype in KvDtype::ALL {
        let shape = shape(16, 2, 3, dtype);
        let mut tile = Tile::zeroed(shape);
        let row = [-65_504.0, 1.0, 0.0, 3e-5, 0.5, 2.0];
        (0..16).for_each(|token| tile.write(token, &row, &row).unwrap());
        assert!(tile.is_finite());
        let (body, size) = (tile.as_bytes().to_vec(), dtype.bytes());
        let (bad, places): (&[u8], _) = match dtype {
            KvDtype::F32 => (&[0, 0, 0x80, 0x7f], [0, 17, 2 * 304 - 1].map(|at| at * size)),
            KvDtype::F16 => (&[0, 0xfc], [0, 17, 2 * 304 - 1].map(|at| at * size)),
            KvDtype::Bf16 => (&[0x81, 0xff], [0, 17, 2 * 304 - 1].map(|at| at * size)),
            KvDtype::Int8 => (&[0, 0, 0x80, 0xbf], [304, 304 + 17 * 4, 2 * 432 - 4]),
        };
        for place in places {
            let mut broken = body.clone();
            broken[place..place + bad.len()].copy_from_slice(bad);
            assert!(!Tile::from_bytes(shape, &broken).unwrap().is_finite(), "{dtype:?} at {place}");
        }
    }
}

#[test]
fn a_promised_version_is_had_by_the_write_that_keeps_it_and_by_no_other() {
    let mut tile = Tile::zeroed(shape(16, 2, 4, KvDtype::F16));
    let (old, promise) = (tile.version(), Tile::promise());
    let promised = promise.version();
    assert!(promised != old && Tile::promise().version() != promised);
    assert_eq!(tile.version(), old, "nothing was written");
    let row = vec![1.5; tile.shape().kv_heads * tile.shape().head_dim];
    tile.write_promised(promise, 3, &row, &row).unwrap();
    assert_eq!(tile.version(), promised);
    let mut same = Tile::zeroed(tile.shape());
    same.write(3, &row, &row).unwrap();
    assert_eq!(tile.as_bytes(), same.as_bytes());
    // Any other write is of another version, and so is what a refused one leaves.
    tile.write(4, &row, &row).unwrap();
    assert_ne!(tile.version(), promised);
    let (before, refused) = (tile.version(), Tile::promise());
    assert!(tile.write_promised(refused, tile.shape().block_tokens, &row, &row).is_err());
    assert_eq!(tile.version(), before);
}
