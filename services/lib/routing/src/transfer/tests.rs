//! The formula against a count of single elements, and its edges.

use proptest::prelude::*;

use super::*;

const SMOL: TransferShape = TransferShape {
    query_heads: 9,
    head_dim: 64,
    stripe_blocks: 32,
    // 64 tokens, 3 KV heads, 64 elements, K and V, f16.
    tile_bytes: 64 * 3 * 64 * 2 * 2,
};

#[test]
fn a_whole_stripe_turns_at_the_documented_row() {
    assert_eq!(SMOL.tile_bytes * 32, 3 << 19);
    assert_eq!(SMOL.ship_bytes(1, 32), 9 * (64 + 66) * 4);
    assert_eq!(ship_or_fetch(336, 32, &SMOL), Choice::Ship);
    assert_eq!(ship_or_fetch(337, 32, &SMOL), Choice::Fetch);
}

#[test]
fn nothing_remote_moves_nothing() {
    assert_eq!((SMOL.ship_bytes(1000, 0), SMOL.fetch_bytes(0)), (0, 0));
    assert_eq!(ship_or_fetch(1000, 0, &SMOL), Choice::Ship);
    assert_eq!(ship_or_fetch(0, 1000, &SMOL), Choice::Ship);
}

#[test]
fn sizes_beyond_u64_saturate() {
    let huge = TransferShape { query_heads: u32::MAX, head_dim: u32::MAX, tile_bytes: u64::MAX, ..SMOL };
    assert_eq!(huge.ship_bytes(u64::MAX, u64::MAX), u64::MAX);
    assert_eq!(huge.fetch_bytes(u64::MAX), u64::MAX);
    let no_stripe = TransferShape { stripe_blocks: 0, ..SMOL };
    assert_eq!(no_stripe.ship_bytes(1, 1), SMOL.ship_bytes(1, 1));
}

/// Walks rows, heads and stripes one by one.
fn counted(rows: u64, blocks: u64, shape: &TransferShape) -> (u64, u64) {
    let (mut ship, mut fetch) = (0, 0);
    for _row in 0..rows {
        for _head in 0..shape.query_heads {
            if blocks > 0 {
                ship += 4 * u64::from(shape.head_dim);
            }
            for block in 0..blocks {
                if block % u64::from(shape.stripe_blocks) == 0 {
                    ship += 4 * (1 + 1 + u64::from(shape.head_dim));
                }
            }
        }
    }
    for _block in 0..blocks {
        fetch += shape.tile_bytes;
    }
    (ship, fetch)
}

proptest! {
    #[test]
    fn bytes_equal_a_count(
        rows in 0u64..40, blocks in 0u64..80, query_heads in 1u32..8, head_dim in 1u32..130,
        stripe_blocks in 1u32..40, tile_bytes in 1u64..100_000,
    ) {
        let shape = TransferShape { query_heads, head_dim, stripe_blocks, tile_bytes };
        let (ship, fetch) = counted(rows, blocks, &shape);
        prop_assert_eq!(shape.ship_bytes(rows, blocks), ship);
        prop_assert_eq!(shape.fetch_bytes(blocks), fetch);
        let expected = if fetch < ship { Choice::Fetch } else { Choice::Ship };
        prop_assert_eq!(ship_or_fetch(rows, blocks, &shape), expected);
    }

    #[test]
    fn more_rows_never_turn_back_to_shipping(rows in 0u64..10_000, more in 0u64..10_000, blocks in 0u64..2000) {
        if ship_or_fetch(rows, blocks, &SMOL) == Choice::Fetch {
            prop_assert_eq!(ship_or_fetch(rows + more, blocks, &SMOL), Choice::Fetch);
        }
    }
}
