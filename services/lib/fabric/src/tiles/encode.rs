//! Messages to frames: a tile's body is a frame of its own, lent and not copied.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};
use longshore_proto::{types::TileMessage, v1};
use prost::Message;

use super::{CRC, DATA, GET_TILE, HEADS, INDEX, KEY, LAYER, PREFIX_BYTES, PUT_TILE, SEED};

/// Bytes of a frame's head: prefix, two tags with lengths, key, layer, checksum, place. Parts of tiles need more.
const HEAD_BYTES_MAX: usize = 112;

/// A whole message with its prefix.
pub(crate) fn encoded(message: &impl Message) -> Bytes {
    let bytes = message.encoded_len();
    let mut frame = BytesMut::with_capacity(PREFIX_BYTES + bytes);
    put_prefix(&mut frame, bytes);
    message.encode(&mut frame).expect("the buffer grows");
    frame.freeze()
}

/// `PutBlocksRequest` with a tile.
pub(super) fn put_tile(tile: &TileMessage, into: &mut VecDeque<Bytes>) {
    tile_frames(PUT_TILE, tile, into);
}

/// `GetBlocksResponse` with a tile.
pub(super) fn get_tile(tile: &TileMessage, into: &mut VecDeque<Bytes>) {
    tile_frames(GET_TILE, tile, into);
}

/// The body comes last: readers accept fields in any order, and nothing has to follow it then.
fn tile_frames(outer: u8, tile: &TileMessage, into: &mut VecDeque<Bytes>) {
    let mut inner = BytesMut::with_capacity(HEAD_BYTES_MAX);
    inner.put_u8(KEY);
    inner.put_u8(tile.key.0.len() as u8);
    inner.put_slice(&tile.key.0);
    inner.put_u8(LAYER);
    put_varint(&mut inner, u64::from(tile.layer));
    inner.put_u8(CRC);
    inner.put_u32_le(tile.crc32c);
    if let Some(place) = &tile.place {
        inner.put_u8(SEED);
        inner.put_u8(place.stripe_seed.len() as u8);
        inner.put_slice(&place.stripe_seed);
        inner.put_u8(INDEX);
        put_varint(&mut inner, place.index);
    }
    if let Some(part) = tile.data.heads() {
        let part = v1::HeadPart::from(part);
        inner.put_u8(HEADS);
        put_varint(&mut inner, part.encoded_len() as u64);
        part.encode(&mut inner).expect("the buffer grows");
    }
    inner.put_u8(DATA);
    put_varint(&mut inner, tile.data.len() as u64);
    let inner_bytes = inner.len() + tile.data.len();

    let mut head = BytesMut::with_capacity(HEAD_BYTES_MAX);
    put_prefix(&mut head, 1 + varint_bytes(inner_bytes as u64) + inner_bytes);
    head.put_u8(outer);
    put_varint(&mut head, inner_bytes as u64);
    head.unsplit(inner);
    into.push_back(head.freeze());
    into.extend(tile.data.pieces().into_iter().filter(|piece| !piece.is_empty()));
}

fn put_prefix(into: &mut BytesMut, bytes: usize) {
    into.put_u8(0);
    // Longer messages are beyond every peer's limit; the length says so instead of lying.
    into.put_u32(u32::try_from(bytes).unwrap_or(u32::MAX));
}

fn put_varint(into: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        into.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    into.put_u8(value as u8);
}

fn varint_bytes(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}
