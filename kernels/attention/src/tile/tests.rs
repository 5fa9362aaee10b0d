//! Where elements lie, and what is refused.

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Tile;
use crate::simd::widen;
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
fn what_is_written_is_read() {
    println!("seed 41");
    let mut rng = ChaCha8Rng::seed_from_u64(41);
    for dtype in [KvDtype::F32, KvDtype::F16] {
        for (block, heads, dim) in [(16, 1, 1), (16, 3, 7), (64, 2, 64), (256, 1, 33), (32, 2, 1024)] {
            let mut tile = Tile::zeroed(shape(block, heads, dim, dtype));
            let (offset, count) = (rng.random_range(0..block - 3), 3);
            let mut draw = || -> Vec<f32> {
                (0..count * heads * dim)
                    .map(|_| f16::from_f32(rng.random_range(-9.0..9.0)).to_f32())
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

#[test]
fn f16_rounds_to_nearest_and_widens_exactly() {
    let mut tile = Tile::zeroed(shape(16, 1, 4, KvDtype::F16));
    let written = [1.0 + 1.0 / 2048.0, 65504.0, -1e9, 1e-9];
    tile.write(0, &written, &written).unwrap();
    let expected = [1.0, 65504.0, -65504.0, 0.0];
    assert_eq!(tile.read(0).unwrap().0, expected);
}

#[test]
fn every_f16_widens_exactly() {
    for bits in 0..=u16::MAX {
        let (found, expected) = (widen(bits), f16::from_bits(bits).to_f32());
        assert!(
            found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()),
            "{bits:#x}: {found}"
        );
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
