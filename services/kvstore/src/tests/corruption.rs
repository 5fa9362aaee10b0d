//! Damage of every kind, in memory, on disk and on the way to a shard: each case is detected and none is served. The seeds are
//! fixed, so a case that fails is found again by its number (and by `LONGSHORE_DAMAGE_SEED=N`, where other cases were asked for).

use std::{collections::BTreeMap, fs::File, os::unix::fs::FileExt as _};

use longshore_proto::types::{ForeignBytes, TileData};

use super::{
    disk::{folder, tiers},
    *,
};

/// Numbers that a seed fixes (SplitMix64: Steele, Lea and Flood 2014).
pub(crate) struct Draws(pub(crate) u64);

impl Draws {
    pub(crate) fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to `end` - 1.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.word()) * end as u128) >> 64) as usize
    }

    pub(crate) fn flip(&mut self, bytes: &mut [u8]) {
        let at = self.below(bytes.len());
        bytes[at] ^= 1 << self.below(8);
    }
}

/// The seed of a test: its own, or another one that `LONGSHORE_DAMAGE_SEED=N` makes of it.
#[allow(clippy::print_stdout, reason = "a test says which seed it has")]
pub(crate) fn seed(own: u64) -> u64 {
    let Some(set) = std::env::var_os("LONGSHORE_DAMAGE_SEED") else { return own };
    let set: u64 = set.to_str().and_then(|set| set.parse().ok()).expect("LONGSHORE_DAMAGE_SEED is a number");
    println!("LONGSHORE_DAMAGE_SEED={set}");
    // Tests that have seeds of their own do not share them here either.
    set.wrapping_mul(16).wrapping_add(own)
}

/// `good` with some damage that keeps its length, and what it is. `others` are tiles that parts may be taken from.
pub(crate) fn damaged(draws: &mut Draws, good: &[u8], others: &[&[u8]]) -> (&'static str, Vec<u8>) {
    loop {
        let mut bad = good.to_vec();
        let from = draws.below(good.len());
        let len = 1 + draws.below(good.len() - from);
        let kind = match draws.below(8) {
            0 | 1 => {
                draws.flip(&mut bad);
                "a flipped bit"
            }
            2 => {
                (0..2 + draws.below(7)).for_each(|_| draws.flip(&mut bad));
                "flipped bits"
            }
            3 => {
                bad[from..from + len.min(64)].iter_mut().for_each(|byte| *byte = draws.word() as u8);
                "noise"
            }
            4 => {
                bad[from..from + len].fill(0);
                "zeros"
            }
            5 => {
                bad.rotate_left(1 + draws.below(good.len() - 1));
                "shifted bytes"
            }
            6 => {
                bad = others[draws.below(others.len())].to_vec();
                "another tile"
            }
            _ => {
                let other = others[draws.below(others.len())];
                bad[from..from + len].copy_from_slice(&other[from..from + len]);
                "a part of another tile"
            }
        };
        if bad != good {
            return (kind, bad);
        }
    }
}

/// Tiles of blocks 1 to 3, as they are sent.
fn sent() -> BTreeMap<u8, Vec<TileMessage>> {
    (1..=3).map(|name| (name, block(name))).collect()
}

/// Tiles of other blocks and layers.
fn others(sent: &BTreeMap<u8, Vec<TileMessage>>, name: u8, layer: u32) -> Vec<&[u8]> {
    let is_other = |tile: &&TileMessage| tile.key != key(name) || tile.layer != layer;
    sent.values().flatten().filter(is_other).map(|tile| &*tile.data).collect()
}

/// Whether a shard gives out a block that is damaged in one layer, by one of the ways to read it.
async fn is_served(shard: &Fixture, way: u64, name: u8, layer: u32) -> bool {
    match way % 3 {
        0 => shard.get(&[name]).await != [None],
        1 => {
            let (keys, layers) = (vec![key(name)], Some(1));
            let get = GetBlocks { first_layer: layer, layers, ..GetBlocks::whole(identity(""), keys) };
            let tiles = collect(shard.shard.get_blocks(&shard.ctx, get).await.unwrap()).await;
            tiles.into_iter().any(|tile| tile.unwrap().is_some())
        }
        _ => match shard.open("", &[(0, name)], None).await.unwrap() {
            OpenedView::Missing(keys) => keys != [key(name)],
            OpenedView::Open { .. } => true,
        },
    }
}

#[tokio::test]
async fn no_damage_in_memory_is_served() {
    const CASES: u64 = 20_000;
    let (shard, sent, mut draws) = (shard(8), sent(), Draws(seed(1)));
    shard.store(&[1, 2, 3]).await;
    let mut detected = 0;
    for case in 0..CASES {
        let (name, layer) = (1 + draws.below(3) as u8, draws.below(LAYERS as usize) as u32);
        let good = &sent[&name][layer as usize].data;
        let (kind, bad) = damaged(&mut draws, good, &others(&sent, name, layer));
        assert!(shard.shard.rot_for_test(key(name), layer, &bad), "case {case}: the block was held");
        assert!(!is_served(&shard, case, name, layer).await, "case {case}: {kind} is served");
        assert_eq!(shard.lookup("", &[name]).await, [false], "case {case}: {kind} stays");
        detected += 1;
        let acks = shard.put("", sent[&name].clone()).await;
        assert_eq!(outcomes(&acks), [(name, PutOutcome::Stored)], "case {case}");
        if case % 64 == 0 {
            assert_eq!(shard.get(&[name]).await, [Some(sent[&name].clone())], "case {case}");
        }
    }
    assert_eq!((detected, shard.stats().await.corrupt_total), (CASES, CASES));
    println!("{detected} cases in memory");
}

/// Memory of a peer: what is copied out of it differs from copy to copy.
struct Fickle {
    copies: std::sync::Mutex<Vec<Vec<u8>>>,
}

impl ForeignBytes for Fickle {
    fn bytes(&self) -> usize {
        shape().bytes()
    }

    fn copy_to(&self, offset: usize, into: &mut [u8]) {
        let mut copies = self.copies.lock().unwrap();
        let copy = if copies.len() > 1 { copies.remove(0) } else { copies[0].clone() };
        into.copy_from_slice(&copy[offset..offset + into.len()]);
    }
}

fn foreign(copies: Vec<Vec<u8>>) -> TileData {
    TileData::from_foreign(Arc::new(Fickle { copies: std::sync::Mutex::new(copies) }))
}

/// Pieces of a body, in order.
fn pieces(draws: &mut Draws, body: &[u8]) -> Vec<Bytes> {
    let (first, second) = (1 + draws.below(body.len() / 2 - 1), body.len() / 2);
    [0..first, first..second, second..body.len()].map(|part| Bytes::copy_from_slice(&body[part])).into()
}

/// Does something to the tiles of a block on their way; what, and whether the block is still right.
fn hurt(draws: &mut Draws, tiles: &mut Vec<TileMessage>, others: &[&[u8]]) -> (&'static str, bool) {
    let (at, next) = (draws.below(tiles.len()), draws.below(tiles.len() - 1));
    let next = if next >= at { next + 1 } else { next };
    let good = tiles[at].data.to_vec();
    match draws.below(16) {
        0..4 => {
            let (kind, bad) = damaged(draws, &good, others);
            tiles[at].data = bad.into();
            return (kind, false);
        }
        4 => tiles[at].data = good[..draws.below(good.len())].to_vec().into(),
        5 => tiles[at].data = [&good[..], &good[..1 + draws.below(64)]].concat().into(),
        6 => tiles[at].crc32c ^= 1 << draws.below(32),
        7 => {
            let other = std::mem::replace(&mut tiles[next].data, good.into());
            tiles[at].data = other;
            return ("bodies that changed places", false);
        }
        8 => {
            (tiles[at].crc32c, tiles[next].crc32c) = (tiles[next].crc32c, tiles[at].crc32c);
            return ("checksums that changed places", false);
        }
        9 => {
            let mut parts = pieces(draws, &good);
            parts.rotate_left(1 + draws.below(2));
            tiles[at].data = TileData::from_pieces(parts);
            return ("pieces out of order", false);
        }
        10 => {
            tiles[at].data = foreign(vec![damaged(draws, &good, others).1]);
            return ("memory that its sender wrote to before the copy", false);
        }
        11 => {
            tiles.remove(at);
            return ("a layer that is missing", false);
        }
        12 => {
            let differs: Vec<&&[u8]> =
                others.iter().filter(|other| tiles.iter().all(|tile| *tile.data != ***other)).collect();
            let bad = differs[draws.below(differs.len())].to_vec();
            // Not the last one, which would end the block.
            let at = draws.below(tiles.len() - 1);
            let again = TileMessage { crc32c: crc32c(&bad), data: bad.into(), ..tiles[at].clone() };
            tiles.insert(at + 1, again);
            return ("a layer that came twice and differs", false);
        }
        13 => {
            tiles.rotate_left(at);
            tiles.swap(0, next);
            return ("tiles in another order", true);
        }
        14 => {
            tiles[at].data = foreign(vec![good.clone(), damaged(draws, &good, others).1]);
            return ("memory that its sender wrote to after the copy", true);
        }
        _ => {
            tiles[at].data = TileData::from_pieces(pieces(draws, &good));
            tiles.insert(at, tiles[at].clone());
            return ("a tile in pieces that came twice", true);
        }
    }
    ("a body or checksum that does not fit", false)
}

#[tokio::test]
async fn no_damage_on_the_way_to_a_shard_is_stored() {
    const CASES: u64 = 20_000;
    let (shard, sent, mut draws) = (shard(16), sent(), Draws(seed(2)));
    let (mut detected, mut harmless) = (0, 0);
    for case in 0..CASES {
        let name = 1 + draws.below(3) as u8;
        let mut key = [0; 16];
        key[..8].copy_from_slice(&case.to_le_bytes());
        let key = BlockKey(key);
        let own: Vec<TileMessage> =
            sent[&name].iter().map(|tile| TileMessage { key, ..tile.clone() }).collect();
        let mut tiles = own.clone();
        let (kind, right) = hurt(&mut draws, &mut tiles, &others(&sent, name, 9));
        let acks = shard.put("", tiles).await;
        let stored = acks.iter().any(|ack| ack.outcome == PutOutcome::Stored);
        assert_eq!(stored, right, "case {case}: {kind}: {acks:?}");
        let get = GetBlocks::whole(identity(""), vec![key]);
        let read = collect(shard.shard.get_blocks(&shard.ctx, get).await.unwrap()).await;
        let read: Option<Vec<TileMessage>> = read.into_iter().map(|tile| tile.unwrap()).collect();
        assert_eq!(read, right.then_some(own), "case {case}: {kind}");
        detected += u64::from(!right);
        harmless += u64::from(right);
    }
    assert_eq!((detected + harmless, shard.stats().await.open_blocks), (CASES, 0));
    assert!(detected > CASES * 3 / 4, "{detected}");
    println!("{detected} cases on the way to a shard, and {harmless} harmless ones");
}

/// The segment file, and where its first place begins: the table before it is large.
struct Segment {
    file: File,
    first: u64,
}

impl Segment {
    fn open(folder: &std::path::Path, name: u8) -> Self {
        let path = folder.join("shard-kv-0").join("segment-00000000");
        let file = File::options().read(true).write(true).open(path).unwrap();
        let whole = Self { file, first: 0 };
        let first = whole.find(&whole.read(), name, 0).expect("the first block that made way is on disk");
        Self { first, ..whole }
    }

    /// All places.
    fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; (self.file.metadata().unwrap().len() - self.first) as usize];
        self.file.read_exact_at(&mut bytes, self.first).unwrap();
        bytes
    }

    /// Where a tile begins in the file.
    fn find(&self, bytes: &[u8], name: u8, layer: u32) -> Option<u64> {
        let body = body(name, layer);
        let at = bytes.windows(body.len()).position(|window| window == body)?;
        Some(self.first + at as u64)
    }

    /// Damages a block behind the shard's back; `before` is one that may have had its place.
    fn damage(&self, draws: &mut Draws, name: u8, before: u8) -> &'static str {
        let bytes = self.read();
        let layer = draws.below(LAYERS as usize) as u32;
        let at = self.find(&bytes, name, layer).expect("the block that made way is on disk");
        if draws.below(16) == 0 {
            // So much of the tile is gone that it cannot be zeros, which a hole in the file is read as.
            self.file.set_len(at + draws.below(shape().bytes() - 64) as u64).unwrap();
            return "a file that was cut off";
        }
        if draws.below(8) == 0 {
            let first = self.find(&bytes, name, 0).expect("all layers are there");
            let old: Vec<u8> = (0..LAYERS).flat_map(|layer| body(before, layer)).collect();
            self.file.write_all_at(&old, first).unwrap();
            return "an earlier generation of its place";
        }
        let others = [body(name, (layer + 1) % LAYERS), body(before, layer)];
        let (kind, bad) = damaged(draws, &body(name, layer), &others.each_ref().map(|other| &other[..]));
        self.file.write_all_at(&bad, at).unwrap();
        kind
    }
}

fn body(name: u8, layer: u32) -> Vec<u8> {
    tile(name, layer).as_bytes().to_vec()
}

#[tokio::test]
async fn no_damage_on_disk_is_served() {
    const CASES: u64 = 3_000;
    let (folder, mut draws) = (folder(), Draws(seed(3)));
    let shard = with_config(tiers(folder.path(), 1, 4));
    shard.store(&[1]).await;
    let (mut detected, mut segment) = (0, None);
    for case in 0..CASES {
        // The next block drives the one before it to disk.
        let (name, next) = (1 + (case % 200) as u8, 1 + ((case + 1) % 200) as u8);
        // One that rises into memory at the moment has its only place.
        while shard.put("", block(next)).await[0].outcome == PutOutcome::NoSpace {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let segment = segment.get_or_insert_with(|| Segment::open(folder.path(), name));
        let before = if name > 1 { name - 1 } else { 200 };
        let kind = segment.damage(&mut draws, name, before);
        // Ranged reads of sound layers may be served, so the whole block is read here, or attended over.
        let served = match case % 2 {
            0 => shard.get(&[name]).await != [None],
            _ => {
                let view = shard.view(&[(0, name)]).await;
                let mut all = true;
                for layer in 0..LAYERS {
                    let answers = shard.attend(vec![query(1, layer, vec![item(view, 16, 1)])]).await;
                    all &= matches!(answers.as_slice(), [AttendAnswer::Partials { .. }]);
                }
                shard.shard.close_view(&shard.ctx, view).await.unwrap();
                all
            }
        };
        assert!(!served, "case {case}: {kind} is served");
        assert_eq!(shard.get(&[name]).await, [None], "case {case}: {kind}");
        detected += 1;
    }
    assert_eq!(detected, CASES);
    println!("{detected} cases on disk");
}
