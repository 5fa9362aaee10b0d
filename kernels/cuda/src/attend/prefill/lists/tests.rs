//! Lists against what they were made of, key by key.

use std::collections::BTreeSet;

use longshore_attention::{Column, ExactBlock};

use super::*;
use crate::PageElement;

const SHAPE: PageShape = PageShape { tokens: 32, kv_heads: 2, head_dim: 64, element: PageElement::F16 };
const ROW: u64 = 128;
const PAGES: [u64; 4] = [0x1000, 0x9_0000_0000, 0x2000, 0x3000];

fn block(tile: u32, first_position: u64, len: u32) -> Visit {
    Visit::Block(ExactBlock { tile, first_position, len })
}

fn work() -> SparseWork {
    let column = |tile, offset, position| Column { tile, offset, position };
    let visits = vec![
        block(0, 0, 32),
        block(1, 32, 32),
        Visit::EndOfStripe,
        block(3, 64, 7),
        Visit::Columns { first: 0, count: 70 },
        Visit::Means { tile: 1, first: 16, keys: 1 << 40 | 1 << 31 | 5 },
    ];
    let columns = (0..70).map(|key| column(1, key % 32, u64::from(key))).collect();
    let empty = || (Vec::new(), Vec::new());
    let lists = vec![(visits, columns), empty(), empty(), (vec![block(2, 40, 32)], vec![column(0, 3, 3)])];
    SparseWork::new(2, vec![30, 41], lists).unwrap()
}

/// Every (kind, place, position or 0) that a list visits.
fn visited(visits: &[KeyVisit], list: &List) -> Vec<(u32, u64, u64)> {
    let range = list.first_visit as usize..(list.first_visit + u64::from(list.visits)) as usize;
    let each = visits[range].iter().flat_map(|visit| {
        let (kind, count) = (visit.what >> 16, u64::from(visit.what & 0xffff));
        (0..count).filter_map(move |key| match kind {
            MEANS => (visit.keys >> key & 1 == 1).then(|| (kind, u64::from(visit.first) + key, 0)),
            BLOCK => Some((kind, u64::from(visit.first) + key, visit.keys + key)),
            _ => Some((kind, u64::from(visit.first) + key, 0)),
        })
    });
    each.collect()
}

#[test]
fn lists_visit_what_the_work_does() {
    let lists = KeyLists::of_sparse(&work(), &SHAPE, &PAGES, 128).unwrap();
    for keys in [16, 32, 64] {
        // Rows 0 to 29 of positions 50 to 79, then rows 30 to 40.
        let (visits, cut) = lists.cut(keys, 3, 50, SHAPE.tokens);
        assert!(visits.iter().all(|visit| (visit.what & 0xffff) as usize <= keys));
        let shape = |list: &List| (list.kv_head, list.first_row, list.rows);
        assert_eq!(
            cut.iter().map(shape).collect::<Vec<_>>(),
            [(0, 0, 90), (0, 90, 33), (1, 0, 90), (1, 90, 33)]
        );
        let mut wanted: Vec<(u32, u64, u64)> = (0..64).map(|key| (BLOCK, key, key)).collect();
        wanted.extend((0..7).map(|key| (BLOCK, 96 + key, 64 + key)));
        wanted.extend((0..70).map(|key| (COLUMNS, key, 0)));
        wanted.extend([0, 2, 31, 40].map(|bit| (MEANS, 128 + 16 + bit, 0)));
        assert_eq!(visited(&visits, &cut[0]), wanted, "{keys} keys");
        assert!(visited(&visits, &cut[1]).is_empty() && visited(&visits, &cut[2]).is_empty());
        assert_eq!(
            visited(&visits, &cut[3]),
            (0..32).map(|key| (BLOCK, 64 + key, 40 + key)).collect::<Vec<_>>()
        );
    }
    let rows: BTreeSet<u64> = lists.columns().iter().map(|column| column.row).collect();
    let wanted = (0..32).map(|offset| PAGES[1] + offset * ROW).chain([PAGES[0] + 3 * ROW]);
    assert_eq!(rows, wanted.collect());
}

#[test]
fn keys_that_no_row_sees_are_left_out() {
    let lists = KeyLists::of_sparse(&work(), &SHAPE, &PAGES, 128).unwrap();
    // The last row of the first tile is at position 39.
    let (visits, cut) = lists.cut(64, 1, 10, SHAPE.tokens);
    let blocks = visited(&visits, &cut[0]).into_iter().filter(|visit| visit.0 == BLOCK);
    assert_eq!(blocks.map(|visit| visit.2).collect::<Vec<_>>(), (0..40).collect::<Vec<_>>());
}

#[test]
fn blocks_that_follow_each_other_are_visited_together() {
    let lists = KeyLists::of_sparse(&work(), &SHAPE, &PAGES, 128).unwrap();
    let (visits, _) = lists.cut(64, 1, 100, SHAPE.tokens);
    assert_eq!(visits[0], KeyVisit::new(BLOCK, 64, 0, 0), "two pages of 32");
}

#[test]
fn columns_and_means_of_stripes_are_visited_together() {
    let column = |position| Column { tile: 0, offset: position, position: position.into() };
    let means = |tile, keys| Visit::Means { tile, first: 0, keys };
    let visits = vec![
        block(0, 0, 32),
        Visit::Columns { first: 0, count: 2 },
        means(0, 0xffff_ffff),
        Visit::EndOfStripe,
        block(1, 32, 32),
        Visit::Columns { first: 2, count: 3 },
        means(1, 5),
        Visit::EndOfStripe,
        means(2, 9),
        means(2, 9),
    ];
    let work = SparseWork::new(1, vec![10], vec![(visits, (0..5).map(column).collect())]).unwrap();
    let shape = PageShape { kv_heads: 1, ..SHAPE };
    let (visits, _) = KeyLists::of_sparse(&work, &shape, &PAGES, 32).unwrap().cut(64, 1, 100, 32);
    let wanted = [
        KeyVisit::new(BLOCK, 64, 0, 0),
        KeyVisit::new(COLUMNS, 5, 0, 0),
        KeyVisit::new(MEANS, 35, 0, 5 << 32 | 0xffff_ffff),
        KeyVisit::new(MEANS, 4, 64, 9),
        KeyVisit::new(MEANS, 4, 64, 9),
    ];
    assert_eq!(visits, wanted, "means that are visited twice count twice");
}

#[test]
fn columns_of_pages_that_are_not_there_are_refused() {
    let error = KeyLists::of_sparse(&work(), &SHAPE, &PAGES[..1], 128).unwrap_err();
    assert!(error.to_string().contains("columns"), "{error}");
}
