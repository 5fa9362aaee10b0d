//! Frames of a tile connection: a head of fixed length, and behind that of a tile its body. Pure.
//!
//! | offset | bytes | field |
//! | --- | --- | --- |
//! | 0 | 8 | lease: number of the call among those of the connection |
//! | 8 | 4 | number of the frame in its call, from 0 |
//! | 12 | 4 | kind: 1 tile, 2 tile with its place, 3 block that is not held, 4 end |
//! | 16 | 4 | bytes of the body, which follow the head |
//! | 20 | 4 | CRC-32C of the body |
//! | 24 | 4 | layer |
//! | 28 | 16 | key |
//! | 44 | 8 | index of the block in its sequence |
//! | 52 | 32 | stripe seed |
//! | 84 | 8 | zeros |
//! | 92 | 4 | CRC-32C of all before |
//!
//! Numbers are little-endian; what a kind has no use for is zero.

use longshore_blocks::{BlockKey, BlockPlace, crc32c};
use longshore_proto::types::TileMessage;

use super::Fault;

/// Bytes of a head.
pub(super) const HEAD_BYTES: usize = 96;
const CHECKED_BYTES: usize = HEAD_BYTES - 4;

const TILE: u32 = 1;
const PLACED_TILE: u32 = 2;
const MISSING: u32 = 3;
const END: u32 = 4;

/// One frame, without its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Frame {
    /// A tile.
    Tile(TileHead),
    /// A block that is not held.
    Missing,
    /// The call has no more frames.
    End,
}

/// A tile without its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TileHead {
    pub(crate) key: BlockKey,
    pub(crate) layer: u32,
    /// Of the body.
    pub(crate) crc32c: u32,
    /// Of the body.
    pub(crate) bytes: u32,
    pub(crate) place: Option<BlockPlace>,
}

impl TileHead {
    /// That of `tile`; `None` when its body is too long for any frame.
    pub(super) fn of(tile: &TileMessage) -> Option<Self> {
        let bytes = u32::try_from(tile.data.len()).ok()?;
        Some(Self { key: tile.key, layer: tile.layer, crc32c: tile.crc32c, bytes, place: tile.place })
    }
}

impl Frame {
    /// The head of frame `number` of the call `lease`.
    pub(super) fn encode(&self, lease: u64, number: u32) -> [u8; HEAD_BYTES] {
        let mut head = [0; HEAD_BYTES];
        let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &lease.to_le_bytes());
        put(8, &number.to_le_bytes());
        let kind = match self {
            Self::Tile(TileHead { place: None, .. }) => TILE,
            Self::Tile(TileHead { place: Some(_), .. }) => PLACED_TILE,
            Self::Missing => MISSING,
            Self::End => END,
        };
        put(12, &kind.to_le_bytes());
        if let Self::Tile(tile) = self {
            put(16, &tile.bytes.to_le_bytes());
            put(20, &tile.crc32c.to_le_bytes());
            put(24, &tile.layer.to_le_bytes());
            put(28, &tile.key.0);
            if let Some(place) = &tile.place {
                put(44, &place.index.to_le_bytes());
                put(52, &place.stripe_seed);
            }
        }
        let check = crc32c(&head[..CHECKED_BYTES]);
        head[CHECKED_BYTES..].copy_from_slice(&check.to_le_bytes());
        head
    }

    /// What a head says that must be frame `number` of the call `lease`, of a body of `body_bytes_max` at most.
    pub(super) fn decode(
        head: &[u8; HEAD_BYTES],
        (lease, number): (u64, u32),
        body_bytes_max: usize,
    ) -> Result<Self, Fault> {
        let nonsense = |field, problem: String| Err(Fault::Nonsense { field, problem });
        if crc32c(&head[..CHECKED_BYTES]) != u32_at(head, CHECKED_BYTES) {
            return nonsense("frame", "has a head that does not match its checksum".to_owned());
        }
        let came = (u64::from_le_bytes(exact(head, 0)), u32_at(head, 8));
        if came != (lease, number) {
            let problem = format!("is {} of call {}, must be {number} of call {lease}", came.1, came.0);
            return nonsense("frame.number", problem);
        }
        let kind = u32_at(head, 12);
        let frame = match kind {
            TILE | PLACED_TILE => Self::Tile(tile(head, kind == PLACED_TILE)),
            MISSING => Self::Missing,
            END => Self::End,
            other => return nonsense("frame.kind", format!("is {other}, must be from {TILE} to {END}")),
        };
        if let Self::Tile(TileHead { bytes, .. }) = frame
            && bytes as usize > body_bytes_max
        {
            return nonsense("frame.bytes", format!("is {bytes}, the limit is {body_bytes_max}"));
        }
        // One way only to say a thing: what has no meaning cannot hide anything.
        if frame.encode(lease, number) != *head {
            return nonsense("frame", "has bytes where its kind has none".to_owned());
        }
        Ok(frame)
    }
}

fn tile(head: &[u8; HEAD_BYTES], placed: bool) -> TileHead {
    let place = placed
        .then(|| BlockPlace { stripe_seed: exact(head, 52), index: u64::from_le_bytes(exact(head, 44)) });
    TileHead {
        key: BlockKey(exact(head, 28)),
        layer: u32_at(head, 24),
        crc32c: u32_at(head, 20),
        bytes: u32_at(head, 16),
        place,
    }
}

fn exact<const COUNT: usize>(head: &[u8; HEAD_BYTES], at: usize) -> [u8; COUNT] {
    std::array::from_fn(|byte| head[at + byte])
}

fn u32_at(head: &[u8; HEAD_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(exact(head, at))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames() -> impl Strategy<Value = Frame> {
        let place = proptest::option::of((any::<[u8; 32]>(), any::<u64>()));
        let tile = (any::<[u8; 16]>(), any::<u32>(), any::<u32>(), 0u32..1000, place);
        prop_oneof![
            Just(Frame::Missing),
            Just(Frame::End),
            tile.prop_map(|(key, layer, crc32c, bytes, place)| {
                let place = place.map(|(stripe_seed, index)| BlockPlace { stripe_seed, index });
                Frame::Tile(TileHead { key: BlockKey(key), layer, crc32c, bytes, place })
            }),
        ]
    }

    proptest! {
        #[test]
        fn heads_say_what_was_put_into_them(frame in frames(), lease: u64, number: u32) {
            let head = frame.encode(lease, number);
            prop_assert_eq!(Frame::decode(&head, (lease, number), 1000).unwrap(), frame);
            prop_assert!(Frame::decode(&head, (lease ^ 1, number), 1000).is_err());
            prop_assert!(Frame::decode(&head, (lease, number ^ 1), 1000).is_err());
        }

        #[test]
        fn no_flipped_bit_goes_unseen(frame in frames(), bit in 0..HEAD_BYTES * 8) {
            let mut head = frame.encode(7, 3);
            head[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Frame::decode(&head, (7, 3), usize::MAX).is_err());
        }

        #[test]
        fn any_bytes_with_a_checksum_are_refused_or_said_again(mut head in any::<[u8; HEAD_BYTES]>(), kind in 0u32..6) {
            head[..12].copy_from_slice(&Frame::End.encode(7, 3)[..12]);
            head[12..16].copy_from_slice(&kind.to_le_bytes());
            let check = crc32c(&head[..CHECKED_BYTES]);
            head[CHECKED_BYTES..].copy_from_slice(&check.to_le_bytes());
            if let Ok(frame) = Frame::decode(&head, (7, 3), usize::MAX) {
                prop_assert_eq!(frame.encode(7, 3), head);
            }
        }
    }

    #[test]
    fn bodies_beyond_the_limit_are_refused_by_name() {
        let tile = TileHead { key: BlockKey([1; 16]), layer: 0, crc32c: 0, bytes: 1001, place: None };
        let head = Frame::Tile(tile).encode(1, 0);
        let fault = Frame::decode(&head, (1, 0), 1000).unwrap_err();
        assert!(matches!(fault, Fault::Nonsense { field: "frame.bytes", .. }), "{fault:?}");
        assert!(Frame::decode(&head, (1, 0), 1001).is_ok());
    }
}
