//! Damage of every kind to the messages of a block: what its reader takes has the right bytes.

use super::*;

const CASES: u64 = 40_000;
/// Tiles of a block.
const LAYERS: u32 = 3;

/// Numbers that a seed fixes (SplitMix64: Steele, Lea and Flood 2014).
struct Draws(u64);

impl Draws {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to `end` - 1.
    fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.word()) * end as u128) >> 64) as usize
    }
}

/// The tiles of a block with bodies of some hundred bytes.
fn block(draws: &mut Draws) -> Vec<TileMessage> {
    let key = std::array::from_fn(|_| draws.word() as u8);
    let len = 200 + draws.below(400);
    (0..LAYERS).map(|layer| tile(key, layer, (0..len).map(|_| draws.word() as u8).collect())).collect()
}

/// A message as it travels in a store stream, or in a read stream.
fn encoded(tile: &TileMessage, stored: bool) -> Vec<u8> {
    let mut frames = VecDeque::new();
    match stored {
        true => put_tile(tile, &mut frames),
        false => get_tile(tile, &mut frames),
    }
    body_of(frames)
}

/// What a receiver makes of a message; `None` when it refuses it or there is no tile in it.
fn decoded(bytes: &[u8], cut: usize, stored: bool) -> Option<TileMessage> {
    let message = rope(bytes, &[cut]);
    if stored {
        return match tile_request(message).ok()? {
            TileRequest::Tile(tile) => Some(tile),
            TileRequest::Other(v1::PutBlocksRequest { part: Some(Part::Tile(tile)) }) => tile.try_into().ok(),
            TileRequest::Other(_) => None,
        };
    }
    match tile_answer(message).ok()? {
        Ok(tile) => Some(tile),
        Err(answer) => Option::<TileMessage>::try_from(answer).ok()?,
    }
}

/// Does something to the messages of a block; `other` are those of another one. Tells what.
fn hurt(draws: &mut Draws, messages: &mut Vec<Vec<u8>>, other: &[Vec<u8>]) -> &'static str {
    let at = draws.below(messages.len());
    let message = &mut messages[at];
    let from = draws.below(message.len());
    match draws.below(10) {
        0..3 => {
            message[from] ^= 1 << draws.below(8);
            "a flipped bit"
        }
        3 => {
            for _ in 0..2 + draws.below(7) {
                let at = draws.below(message.len());
                message[at] ^= 1 << draws.below(8);
            }
            "flipped bits"
        }
        4 => {
            message.truncate(from);
            "a message that was cut off"
        }
        5 => {
            let more = draws.word().to_le_bytes();
            message.extend_from_slice(&more[..1 + draws.below(8)]);
            "bytes behind a message"
        }
        6 => {
            // A frame of another stream.
            let end = message.len().min(other[at].len());
            let from = from.min(end - 1);
            message[from..end].copy_from_slice(&other[at][from..end]);
            "the end of another message"
        }
        7 => {
            *message = other[at].clone();
            "a message of another block"
        }
        8 => {
            let next = (at + 1 + draws.below(messages.len() - 1)) % messages.len();
            messages.swap(at, next);
            "messages that changed places"
        }
        _ => {
            messages.remove(at);
            "a message that is missing"
        }
    }
}

/// What the reader of `key` takes of a stream: its tiles, layer by layer, each with its checksum. It asked for them in this order.
fn taken(tiles: Vec<Option<TileMessage>>, key: BlockKey) -> Option<Vec<TileMessage>> {
    let fits = |(layer, tile): (u32, Option<TileMessage>)| {
        tile.filter(|tile| tile.key == key && tile.layer == layer && tile.data.matches(tile.crc32c))
    };
    let taken: Vec<TileMessage> = (0..).zip(tiles).map_while(fits).collect();
    (taken.len() == LAYERS as usize).then_some(taken)
}

/// The seed of a test: its own, or another one that `LONGSHORE_DAMAGE_SEED=N` makes of it.
#[allow(clippy::print_stdout, reason = "a test says which seed it has")]
fn seed(own: u64) -> u64 {
    let Some(set) = std::env::var_os("LONGSHORE_DAMAGE_SEED") else { return own };
    let set: u64 = set.to_str().and_then(|set| set.parse().ok()).expect("LONGSHORE_DAMAGE_SEED is a number");
    println!("LONGSHORE_DAMAGE_SEED={set}");
    // Tests that have seeds of their own do not share them here either.
    set.wrapping_mul(16).wrapping_add(own)
}

#[test]
fn no_damage_to_messages_is_taken_for_a_block() {
    let mut draws = Draws(seed(5));
    let (mut detected, mut harmless) = (0, 0);
    for case in 0..CASES {
        let (sent, other) = (block(&mut draws), block(&mut draws));
        let stored = case % 2 == 0;
        let mut messages: Vec<Vec<u8>> = sent.iter().map(|tile| encoded(tile, stored)).collect();
        let before = messages.clone();
        let other: Vec<Vec<u8>> = other.iter().map(|tile| encoded(tile, stored)).collect();
        let kind = hurt(&mut draws, &mut messages, &other);
        if messages == before {
            continue;
        }
        let cut = draws.below(1000);
        let tiles = messages.iter().map(|bytes| decoded(bytes, cut, stored)).collect();
        match taken(tiles, sent[0].key) {
            None => detected += 1,
            // A bit of what places the block, or one that Prost passes over, changes no byte of it.
            Some(tiles) => {
                let bodies =
                    |tiles: &[TileMessage]| tiles.iter().map(|tile| tile.data.to_vec()).collect::<Vec<_>>();
                assert_eq!(bodies(&tiles), bodies(&sent), "case {case}: {kind} is taken");
                harmless += 1;
            }
        }
    }
    assert!(
        detected + harmless >= CASES * 99 / 100 && detected > CASES * 8 / 10,
        "{detected} and {harmless}"
    );
    println!("{detected} cases of messages, and {harmless} harmless ones");
}
