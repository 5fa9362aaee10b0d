//! Tiles on gRPC without copies. The messages are those of the schema, so that any gRPC peer can send and read them; but a tile's
//! bytes go from where they lie into the connection as frames of their own, and come out of it as the pieces that the connection
//! read, which whoever keeps the tile copies once to where it stays.

mod body;
mod decode;
mod encode;
mod messages;
mod rope;

pub(crate) use body::{Outgoing, OutgoingBody};
pub(crate) use decode::{TileRequest, decoded, tile_answer, tile_request};
pub(crate) use encode::encoded;
pub(crate) use messages::Messages;
pub(crate) use rope::Rope;

use longshore_proto::types::TileMessage;

use crate::Error;

/// A tile to be stored must be whole.
pub(crate) fn whole(tile: TileMessage) -> Result<TileMessage, Error> {
    if tile.data.heads().is_some() { Err(part_refused()) } else { Ok(tile) }
}

/// Field and problem of some KV heads of a tile that were to be stored, on every lane.
pub const PART_REFUSED: (&str, &str) =
    ("tile.heads", "is set, tiles are stored whole; hint: send all of its KV heads without it");

/// Some KV heads of a tile were to be stored.
pub(crate) fn part_refused() -> Error {
    let (field, problem) = PART_REFUSED;
    Error::invalid(field, problem)
}

/// Path of the method that stores tiles.
pub(crate) const PUT_BLOCKS: &str = "/longshore.v1.KvStoreService/PutBlocks";
/// Path of the method that reads tiles.
pub(crate) const GET_BLOCKS: &str = "/longshore.v1.KvStoreService/GetBlocks";
/// Bytes before each message: whether it is compressed, and its length in big-endian order.
const PREFIX_BYTES: usize = 5;

/// Tag of `PutBlocksRequest.tile`: field 2, length-delimited.
const PUT_TILE: u8 = 0x12;
/// Tag of `GetBlocksResponse.tile`: field 1, length-delimited.
const GET_TILE: u8 = 0x0a;
/// Tag of `Tile.key`: field 1, length-delimited.
const KEY: u8 = 0x0a;
/// Tag of `Tile.layer`: field 2, varint.
const LAYER: u8 = 0x10;
/// Tag of `Tile.data`: field 3, length-delimited.
const DATA: u8 = 0x1a;
/// Tag of `Tile.stripe_seed`: field 5, length-delimited.
const SEED: u8 = 0x2a;
/// Tag of `Tile.block_index`: field 6, varint.
const INDEX: u8 = 0x30;
/// Tag of `Tile.heads`: field 8, length-delimited.
const HEADS: u8 = 0x42;
/// Tag of `Tile.crc32c`: field 4, four bytes.
const CRC: u8 = 0x25;

#[cfg(test)]
mod tests;
