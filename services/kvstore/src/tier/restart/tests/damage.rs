//! Damage of every kind to the files of a shard that starts: it serves what was written or nothing.

use super::*;
use crate::tests::corruption::{Draws, damaged, seed};

const CASES: u64 = 12_000;

/// Bytes of a tile, and of a whole block.
fn sizes() -> (usize, usize) {
    (shape().bytes(), shape().bytes() * LAYERS as usize)
}

/// Where the tiles of a place begin in its file.
fn tiles_of(place: u64) -> usize {
    Format { places: 3, ..format() }.tile_offset(place % 3, 0) as usize
}

fn entry_of(place: u64) -> usize {
    Format { places: 3, ..format() }.entry_offset(place % 3) as usize
}

/// Exchanges two ranges of a file, as far as it has them.
fn exchange(bytes: &mut [u8], a: usize, b: usize, len: usize) {
    if a.max(b) + len <= bytes.len() && a.abs_diff(b) >= len {
        let first = bytes[a..a + len].to_vec();
        bytes.copy_within(b..b + len, a);
        bytes[b..b + len].copy_from_slice(&first);
    }
}

/// Does something to the files of a shard; `old` is what they once were.
fn hurt(draws: &mut Draws, files: &mut [(String, Vec<u8>)], old: &[(String, Vec<u8>)]) -> &'static str {
    let at = draws.below(files.len());
    let (one, other) = (draws.below(3) as u64, draws.below(3) as u64);
    let entry_bytes = format().entry_bytes() as usize;
    let bytes = &mut files[at].1;
    let from = draws.below(bytes.len());
    let len = 1 + draws.below(bytes.len() - from);
    match draws.below(12) {
        0..3 => {
            (0..1 + draws.below(4)).for_each(|_| draws.flip(bytes));
            "flipped bits"
        }
        3 => {
            bytes.truncate(from);
            "a file that was cut off"
        }
        4 => {
            let (tile, block) = sizes();
            let (a, b) = (tiles_of(one) + draws.below(block / tile) * tile, tiles_of(other));
            exchange(bytes, a, b, tile);
            "tiles that changed places"
        }
        5 => {
            exchange(bytes, entry_of(one), entry_of(other), entry_bytes);
            "entries that changed places"
        }
        6 => {
            exchange(bytes, entry_of(one), entry_of(other), entry_bytes);
            exchange(bytes, tiles_of(one), tiles_of(other), sizes().1);
            "blocks that changed places"
        }
        7 => {
            let stale = &old[at].1;
            let end = (from + len).min(stale.len());
            if from < end {
                bytes[from..end].copy_from_slice(&stale[from..end]);
            }
            "a part that is stale"
        }
        8 => {
            let stale = &old[at].1;
            let (begin, end) = (tiles_of(one), (tiles_of(one) + sizes().1).min(stale.len().min(bytes.len())));
            if begin < end {
                bytes[begin..end].copy_from_slice(&stale[begin..end]);
            }
            "tiles of an earlier generation"
        }
        9 => {
            let names: Vec<String> = files.iter().map(|(name, _)| name.clone()).collect();
            files.reverse();
            files.iter_mut().zip(names).for_each(|(file, name)| file.0 = name);
            "segments that changed places"
        }
        10 => {
            let whole = bytes.clone();
            let (_, bad) = damaged(draws, &whole, &[&whole]);
            *bytes = bad;
            "noise, zeros or shifted bytes"
        }
        _ => {
            let (_, bad) = damaged(draws, &bytes[from..from + len], &[&vec![0xa5; len]]);
            bytes[from..from + len].copy_from_slice(&bad);
            "a part that is damaged"
        }
    }
}

#[test]
fn files_that_are_damaged_in_any_way_serve_what_was_written_or_nothing() {
    // Before its last writes, place 0 held block 9 and place 1 another one.
    let folder = tempfile::tempdir().unwrap();
    let (tier, _) = open_tier(folder.path());
    for (place, name) in [(0, 9), (1, 8), (2, 3), (3, 4)] {
        write(&tier, place, name, u64::from(name)).unwrap();
    }
    drop(tier);
    let read = |number| {
        let name = DiskTier::file_name(number);
        let bytes = fs::read(folder.path().join(&name)).unwrap();
        (name, bytes)
    };
    let old = [read(0), read(1)];
    let (_folder, files) = log();
    let mut draws = Draws(seed(4));
    let (mut looked, mut served_blocks, mut refused) = (0, 0, 0);
    for case in 0..CASES {
        let mut changed = files.clone();
        let kind = hurt(&mut draws, &mut changed, &old);
        let changed: Vec<(String, &[u8])> =
            changed.iter().map(|(name, bytes)| (name.clone(), &bytes[..])).collect();
        let (_folder, opened) = reopen(&changed);
        match opened {
            Ok((tier, _, found)) => {
                // Compares every tile that passes with what was written under its name.
                let names = served(&tier, &found);
                assert!(
                    names.iter().all(|name| [1, 2, 3, 4, 8, 9].contains(name)),
                    "case {case}: {kind}: {names:?}"
                );
                served_blocks += names.len();
            }
            Err(DiskError::Foreign { .. }) => refused += 1,
            Err(error) => panic!("case {case}: {kind}: {error}"),
        }
        looked += 1;
    }
    assert_eq!(looked, CASES);
    assert!(served_blocks > 0 && refused < CASES / 10, "{served_blocks} blocks, {refused} refused");
    println!("{looked} cases of files at a start");
}
