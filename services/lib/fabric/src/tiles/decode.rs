//! Messages with a tile: parsed by hand where they look as usual, so that the body stays where it is; by Prost otherwise.

use bytes::Buf;
use longshore_blocks::{BlockKey, BlockPlace};
use longshore_proto::{
    types::{TileData, TileMessage},
    v1,
};
use prost::Message;
use tonic::Status;

use super::{CRC, DATA, GET_TILE, INDEX, KEY, LAYER, PUT_TILE, Rope, SEED};

/// Most bytes of a varint.
const VARINT_BYTES_MAX: u32 = 10;

/// One message of a store stream.
#[derive(Debug)]
pub(crate) enum TileRequest {
    /// A tile, its body in the pieces in which it came.
    Tile(TileMessage),
    /// Anything else.
    Other(v1::PutBlocksRequest),
}

/// Decodes a message of a store stream.
pub(crate) fn tile_request(message: Rope) -> Result<TileRequest, Status> {
    if let Some(tile) = tile_of(&message, PUT_TILE) {
        return Ok(TileRequest::Tile(tile));
    }
    decoded(message).map(TileRequest::Other)
}

/// Decodes an answer of a read stream: a tile, or what tells that there is none.
pub(crate) fn tile_answer(message: Rope) -> Result<Result<TileMessage, v1::GetBlocksResponse>, Status> {
    match tile_of(&message, GET_TILE) {
        Some(tile) => Ok(Ok(tile)),
        None => decoded(message).map(Err),
    }
}

/// Decodes any message.
pub(crate) fn decoded<M: Message + Default>(message: Rope) -> Result<M, Status> {
    // In the words of Tonic, which `refusal` says anew.
    M::decode(message)
        .map_err(|error| Status::internal(format!("failed to decode Protobuf message: {error}")))
}

/// The tile of a message that consists of one under the tag `outer`, with fields that this version knows and a key of 16 bytes. `None`
/// is no verdict: Prost decides then.
fn tile_of(message: &Rope, outer: u8) -> Option<TileMessage> {
    let mut rest = message.clone();
    if rest.next_byte()? != outer || varint(&mut rest)? != rest.remaining() as u64 {
        return None;
    }
    let (mut key, mut layer, mut crc32c, mut data) = (None, 0, 0, Rope::default());
    let (mut seed, mut index) = (None, 0);
    while let Some(tag) = rest.next_byte() {
        match tag {
            KEY => key = Some(exact::<16>(&mut rest)?),
            LAYER => layer = u32::try_from(varint(&mut rest)?).ok()?,
            DATA => data = delimited(&mut rest)?,
            SEED => seed = Some(exact::<32>(&mut rest)?),
            INDEX => index = varint(&mut rest)?,
            CRC if rest.remaining() >= 4 => crc32c = rest.get_u32_le(),
            _ => return None,
        }
    }
    let data = TileData::from_pieces(data.into_pieces());
    let place = seed.map(|stripe_seed| BlockPlace { stripe_seed, index });
    Some(TileMessage { key: BlockKey(key?), layer, data, crc32c, place })
}

/// A field of `COUNT` bytes.
fn exact<const COUNT: usize>(rest: &mut Rope) -> Option<[u8; COUNT]> {
    let mut field = delimited(rest).filter(|field| field.remaining() == COUNT)?;
    let mut bytes = [0; COUNT];
    field.copy_to_slice(&mut bytes);
    Some(bytes)
}

fn delimited(rest: &mut Rope) -> Option<Rope> {
    let bytes = usize::try_from(varint(rest)?).ok()?;
    rest.take_front(bytes)
}

/// A number of at most ten bytes of seven bits, the lowest first.
fn varint(rest: &mut Rope) -> Option<u64> {
    let mut value = 0u64;
    for step in 0..VARINT_BYTES_MAX {
        let byte = rest.next_byte()?;
        let bits = u64::from(byte & 0x7f);
        value |= bits.checked_shl(7 * step).filter(|shifted| shifted >> (7 * step) == bits)?;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}
