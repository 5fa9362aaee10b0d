//! Reads of some KV heads of tiles: what is asked for, and how a reader verifies what came.

use std::ops::Range;

use longshore_blocks::{combine_crc32c, crc32c};

use super::TileMessage;
use crate::{WireError, v1};

/// Most KV heads of a tile that has parts.
const HEADS_MAX: usize = 65_536;

/// Which KV heads of a tile a body has, and what proves that they are those that were stored: the checksums of all heads, joined in
/// order, give that of the tile. Heads lie one after the other in a tile, all of one size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadPart {
    /// First head of the body.
    pub first: u32,
    /// CRC-32C of the whole tile.
    pub tile_crc32c: u32,
    /// CRC-32C of every head of the tile, in order.
    pub head_crc32cs: Vec<u32>,
}

impl HeadPart {
    /// What proves a part of `tile` that begins with head `first`.
    ///
    /// # Panics
    /// When the tile does not consist of `kv_heads` heads of one size.
    pub fn of(tile: &[u8], kv_heads: usize, first: u32) -> Self {
        assert!(kv_heads > 0 && tile.len().is_multiple_of(kv_heads), "heads are of one size");
        let head_bytes = tile.len() / kv_heads;
        let head_crc32cs: Vec<u32> = tile.chunks(head_bytes.max(1)).map(crc32c).collect();
        Self { first, tile_crc32c: joined(&head_crc32cs, head_bytes), head_crc32cs }
    }
}

/// CRC-32C of heads of one size, one after the other.
fn joined(head_crc32cs: &[u32], head_bytes: usize) -> u32 {
    head_crc32cs.iter().fold(0, |before, head| combine_crc32c(before, *head, head_bytes))
}

impl TileMessage {
    /// Copies `heads` of a tile with `kv_heads` heads of `head_bytes` each, which the message must bring, and verifies the copy: each head
    /// by its checksum, and the checksums of all heads together by that of the tile, which is returned.
    pub fn copy_heads(
        &self,
        heads: Range<u32>,
        kv_heads: u32,
        head_bytes: usize,
    ) -> Result<(Vec<u8>, u32), WireError> {
        let Some(part) = self.data.heads() else {
            return Err(WireError::invalid("heads", "is missing: a part of a tile was asked for"));
        };
        if part.first != heads.start {
            let problem = format!("is {}, {} was asked for", part.first, heads.start);
            return Err(WireError::invalid("heads.first", problem));
        }
        if part.head_crc32cs.len() != kv_heads as usize {
            let problem = format!("has {} entries for {kv_heads} KV heads", part.head_crc32cs.len());
            return Err(WireError::invalid("heads.head_crc32c", problem));
        }
        let checksum = |field: &str| WireError::Checksum { field: field.to_owned() };
        if joined(&part.head_crc32cs, head_bytes) != part.tile_crc32c {
            return Err(checksum("heads.tile_crc32c"));
        }
        let own = part.head_crc32cs.get(heads.start as usize..heads.end as usize);
        let own = own.ok_or_else(|| WireError::invalid("heads", format!("are {heads:?} of {kv_heads}")))?;
        let mut copy = vec![0; own.len() * head_bytes];
        if self.data.copy_to(&mut copy)? != self.crc32c {
            return Err(checksum("data"));
        }
        // The copy is checked: the message may lie in memory that its sender can still write to.
        if !copy.chunks(head_bytes.max(1)).map(crc32c).eq(own.iter().copied()) {
            return Err(checksum("heads.head_crc32c"));
        }
        Ok((copy, part.tile_crc32c))
    }
}

impl v1::GetBlocksRequest {
    /// The KV heads that are asked for; `None`: whole tiles.
    pub fn head_range(&self) -> Result<Option<Range<u32>>, WireError> {
        match (self.first_head, self.heads) {
            (0, 0) => Ok(None),
            (first, 0) => Err(WireError::invalid("heads", format!("is 0 although `first_head` is {first}"))),
            (first, heads) => match first.checked_add(heads) {
                Some(end) => Ok(Some(first..end)),
                None => Err(WireError::invalid("heads", format!("is {heads}, from {first} on"))),
            },
        }
    }

    /// The same request for these KV heads only.
    pub fn with_heads(self, heads: Option<Range<u32>>) -> Self {
        let heads = heads.unwrap_or(0..0);
        Self { first_head: heads.start, heads: heads.end.saturating_sub(heads.start), ..self }
    }
}

impl TryFrom<v1::HeadPart> for HeadPart {
    type Error = WireError;

    fn try_from(wire: v1::HeadPart) -> Result<Self, WireError> {
        let heads = wire.head_crc32c.len();
        if heads > HEADS_MAX {
            return Err(WireError::invalid("head_crc32c", format!("has {heads} entries, limit {HEADS_MAX}")));
        }
        Ok(Self { first: wire.first, tile_crc32c: wire.tile_crc32c, head_crc32cs: wire.head_crc32c })
    }
}

impl From<&HeadPart> for v1::HeadPart {
    fn from(part: &HeadPart) -> Self {
        Self { first: part.first, tile_crc32c: part.tile_crc32c, head_crc32c: part.head_crc32cs.clone() }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use longshore_blocks::BlockKey;
    use proptest::prelude::*;

    use super::*;

    const HEADS: usize = 5;

    fn message(tile: &[u8], heads: Range<u32>) -> TileMessage {
        let head_bytes = tile.len() / HEADS;
        let body = &tile[heads.start as usize * head_bytes..heads.end as usize * head_bytes];
        let data = crate::types::TileData::from(Bytes::copy_from_slice(body));
        TileMessage {
            key: BlockKey([1; 16]),
            layer: 0,
            crc32c: crc32c(body),
            data: data.of_heads(HeadPart::of(tile, HEADS, heads.start)),
            place: None,
        }
    }

    fn part(message: &TileMessage, change: impl FnOnce(&mut HeadPart)) -> TileMessage {
        let mut part = message.data.heads().unwrap().clone();
        change(&mut part);
        TileMessage { data: message.data.clone().of_heads(part), ..message.clone() }
    }

    proptest! {
        #[test]
        fn every_range_is_verified_against_the_whole_tile(
            head in prop::collection::vec(any::<u8>(), 1..200), first in 0u32..5, count in 1u32..6,
        ) {
            let tile: Vec<u8> = (0..HEADS as u8).flat_map(|add| head.iter().map(move |x| x.wrapping_add(add))).collect();
            let heads = first..(first + count).min(HEADS as u32);
            let sent = message(&tile, heads.clone());
            let wire = v1::Tile::from(sent.clone());
            let read = TileMessage::try_from(wire).unwrap();
            prop_assert_eq!(&read, &sent);
            let (copy, told) = read.copy_heads(heads.clone(), HEADS as u32, head.len()).unwrap();
            prop_assert_eq!(told, crc32c(&tile));
            prop_assert_eq!(copy, &tile[heads.start as usize * head.len()..heads.end as usize * head.len()]);
        }

        /// Any bit of the body and of its proof.
        #[test]
        fn every_flipped_bit_is_found(flip in 0usize..8 * (3 * 64 + 4 * HEADS + 8)) {
            let tile: Vec<u8> = (0..HEADS * 64).map(|at| (at * 7) as u8).collect();
            let good = message(&tile, 1..4);
            let (at, bit) = (flip / 8, 1u32 << (flip % 8));
            let body_bytes = 3 * 64;
            let bad = match at.checked_sub(body_bytes) {
                None => {
                    let mut body = good.data.to_vec();
                    body[at] ^= bit as u8;
                    let data = crate::types::TileData::from(body).of_heads(good.data.heads().unwrap().clone());
                    // Whoever damages the body may tell its checksum too.
                    TileMessage { crc32c: crc32c(&data), data, ..good }
                }
                Some(at) if at < 4 * HEADS => part(&good, |part| part.head_crc32cs[at / 4] ^= bit << (8 * (at % 4))),
                Some(at) if at < 4 * HEADS + 4 => part(&good, |part| part.tile_crc32c ^= bit << (8 * (at % 4))),
                Some(at) => part(&good, |part| part.first ^= bit << (8 * (at % 4))),
            };
            prop_assert!(bad.copy_heads(1..4, HEADS as u32, 64).is_err());
        }
    }

    #[test]
    fn parts_of_other_tiles_and_other_ranges_are_refused_by_field() {
        let tile: Vec<u8> = (0..HEADS * 8).map(|at| at as u8).collect();
        let other: Vec<u8> = tile.iter().map(|x| x ^ 0x55).collect();
        let good = message(&tile, 1..3);
        let ask = |message: &TileMessage, heads: Range<u32>| {
            message.copy_heads(heads, HEADS as u32, 8).unwrap_err().field().to_owned()
        };
        let whole = TileMessage { data: tile.clone().into(), crc32c: crc32c(&tile), ..good };
        assert_eq!(ask(&whole, 1..3), "heads", "a shard that knows no heads sends the whole tile");
        assert_eq!(ask(&good, 2..4), "heads.first");
        assert_eq!(ask(&good, 1..4), "data", "too few bytes");
        assert_eq!(ask(&part(&good, |part| part.head_crc32cs.truncate(4)), 1..3), "heads.head_crc32c");
        // Heads of another tile with the proof of this one, and with their own in this one's place.
        let body = other[8..24].to_vec();
        let crc = crc32c(&body);
        let data = crate::types::TileData::from(body).of_heads(good.data.heads().unwrap().clone());
        let swapped = TileMessage { data, crc32c: crc, ..good };
        assert_eq!(ask(&swapped, 1..3), "heads.head_crc32c");
        let forged = part(&swapped, |part| {
            part.head_crc32cs[1] = crc32c(&other[8..16]);
            part.head_crc32cs[2] = crc32c(&other[16..24]);
        });
        assert_eq!(ask(&forged, 1..3), "heads.tile_crc32c");
    }

    #[test]
    fn ranges_on_the_wire_make_sense_or_are_refused() {
        let request = |first_head, heads| v1::GetBlocksRequest { first_head, heads, ..Default::default() };
        assert_eq!(request(0, 0).head_range(), Ok(None));
        assert_eq!(request(2, 3).head_range(), Ok(Some(2..5)));
        assert_eq!(request(0, 0).with_heads(Some(2..5)), request(2, 3));
        for wrong in [request(1, 0), request(u32::MAX, 1), request(1, u32::MAX)] {
            assert_eq!(wrong.head_range().unwrap_err().field(), "heads");
        }
    }
}
