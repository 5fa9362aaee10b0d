use longshore_attention::{KvDtype, Tile, TileShape};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{PageElement, PageShape, page_of, tile_of};
use crate::Kind;

fn random(shape: TileShape) -> Tile {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let mut tile = Tile::zeroed(shape);
    let elements = shape.block_tokens * shape.kv_heads * shape.head_dim;
    let mut side = || (0..elements).map(|_| random.random_range(-3.0_f32..3.0)).collect::<Vec<_>>();
    tile.write(0, &side(), &side()).unwrap();
    tile
}

fn element(page: &[u8], at: usize, dtype: KvDtype) -> f32 {
    match dtype {
        KvDtype::F32 => bytemuck::pod_read_unaligned(&page[4 * at..][..4]),
        KvDtype::F16 => bytemuck::pod_read_unaligned::<half::f16>(&page[2 * at..][..2]).to_f32(),
        KvDtype::Bf16 => bytemuck::pod_read_unaligned::<half::bf16>(&page[2 * at..][..2]).to_f32(),
        KvDtype::Int8 => f32::from(page[at] as i8),
    }
}

#[test]
fn a_page_is_rows_and_becomes_the_same_tile() {
    for dtype in KvDtype::ALL {
        for (block_tokens, kv_heads, head_dim) in [(16, 1, 16), (64, 2, 80), (32, 3, 64)] {
            let tile = random(TileShape { block_tokens, kv_heads, head_dim, dtype });
            let shape = PageShape::of(tile.shape()).unwrap();
            let page = page_of(&tile).unwrap();
            assert_eq!(page.len(), tile.as_bytes().len(), "{shape:?}");
            for token in 0..block_tokens {
                let (keys, values) = tile.read(token).unwrap();
                for (index, (key, value)) in keys.iter().zip(&values).enumerate() {
                    let head = &page[index / head_dim * shape.head_bytes()..][..shape.head_bytes()];
                    let at = token * head_dim + index % head_dim;
                    let scale = |side: usize| match dtype {
                        KvDtype::Int8 => {
                            let at = 2 * shape.side_bytes() + (side * block_tokens + token) * 4;
                            bytemuck::pod_read_unaligned::<f32>(&head[at..][..4])
                        }
                        _ => 1.0,
                    };
                    assert_eq!(element(head, at, dtype) * scale(0), *key);
                    assert_eq!(element(&head[shape.side_bytes()..], at, dtype) * scale(1), *value);
                }
            }
            assert_eq!(tile_of(&shape, &page).unwrap().as_bytes(), tile.as_bytes());
        }
    }
}

#[test]
fn refuses_what_kernels_do_not_know() {
    let good = PageShape { tokens: 64, kv_heads: 2, head_dim: 64, element: PageElement::F16 };
    good.validate().unwrap();
    let bad = [
        (PageShape { tokens: 48, ..good }, "block_tokens"),
        (PageShape { tokens: 512, ..good }, "block_tokens"),
        (PageShape { kv_heads: 0, ..good }, "kv_heads"),
        (PageShape { head_dim: 72, ..good }, "head_dim"),
        (PageShape { head_dim: 0, ..good }, "head_dim"),
        (PageShape { head_dim: 272, ..good }, "head_dim"),
    ];
    for (shape, field) in bad {
        let error = shape.validate().unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidInput);
        assert!(error.to_string().contains(field), "{error}");
    }
    let error = tile_of(&good, &[0; 100]).unwrap_err();
    assert!(error.to_string().contains("100 bytes"), "{error}");
    let e4m3 = PageShape { element: PageElement::E4m3, ..good };
    assert!(tile_of(&e4m3, &vec![0; e4m3.bytes()]).unwrap_err().to_string().contains("E4M3"));
}
