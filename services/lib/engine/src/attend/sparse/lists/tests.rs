//! Cuts of lists and rows.
#![allow(clippy::single_range_in_vec_init, reason = "lists of one run")]

use longshore_attention::{ExactBlock, SparseWork, Visit};
use longshore_blocks::Geometry;

use super::{Lists, Span, StripeVisits, WaveSizes, waves};

fn block(index: u64, tile: u64) -> Visit {
    Visit::Block(ExactBlock { tile: tile as u32, first_position: index * 16, len: 16 })
}

fn means(tile: u32) -> Visit {
    Visit::Means { tile, first: 0, keys: 1 }
}

/// Two KV heads, two tiles of 32 rows.
fn work() -> SparseWork {
    let whole = |blocks: &[u64]| blocks.iter().map(|&index| block(index, index)).collect::<Vec<_>>();
    let end = [Visit::EndOfStripe];
    // Stripes of 4 blocks: 0, 1, 3 and means of stripe 0; 6, 7 (7 is here) and means of stripe 1; 9.
    let first =
        [&whole(&[0, 1, 3])[..], &[means(0)], &end, &whole(&[6, 7]), &[means(1)], &end, &whole(&[9]), &end];
    let second = [&[means(0)][..], &end];
    let lists = [first.concat(), second.concat(), Vec::new(), whole(&[9])];
    let lists = lists.into_iter().map(|visits| (visits, Vec::new())).collect();
    SparseWork::new(2, vec![32, 64], lists).unwrap()
}

#[test]
fn lists_are_cut_at_the_border() {
    let lists = Lists::new(&work(), Geometry::new(16, 4).unwrap(), 7);
    let expected = [
        StripeVisits { stripe: 0, remote: vec![0..2, 3..4], local: vec![means(0)] },
        StripeVisits { stripe: 1, remote: vec![6..7], local: vec![block(7, 0), means(1)] },
        StripeVisits { stripe: 2, remote: Vec::new(), local: vec![block(9, 2)] },
    ];
    assert_eq!(lists.list(0, 0), expected);
    assert_eq!(lists.of_stripe(0, 0, 1), Some(&expected[1]));
    assert_eq!(lists.of_stripe(0, 1, 1), None);
    assert!(lists.list(1, 0).is_empty());
    assert_eq!(lists.list(1, 1), [expected[2].clone()]);
}

#[test]
fn waves_hold_no_more_than_their_budget() {
    let work = work();
    let lists = Lists::new(&work, Geometry::new(16, 4).unwrap(), 7);
    let cut = |partial_bytes_max, query_bytes| {
        waves(&work, &lists, WaveSizes { partial_bytes_max, partial_bytes: 10, query_bytes })
    };
    let span = |tile, rows| Span { tile, rows };
    // Two remote stripes of tile 0: 20 bytes a row, and nothing in tile 1.
    assert_eq!(cut(1 << 20, 8), [[span(0, 0..32), span(1, 32..64)]]);
    let small = cut(200, 8);
    assert_eq!(small[0], [span(0, 0..10)]);
    assert_eq!(small[3], [span(0, 30..32), span(1, 32..64)]);
    // One row goes however large it is.
    assert_eq!(cut(1, 8)[..2], [[span(0, 0..1)], [span(0, 1..2)]]);
    assert_eq!(cut(1 << 20, 1 << 19).len(), 32, "two rows of queries a wave");
}
