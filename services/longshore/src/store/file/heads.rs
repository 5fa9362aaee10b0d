//! Files of heads: some KV heads of a block, with what proves that they are those of the block. The format is described in
//! docs/protocol.md.

use std::{ops::Range, path::Path};

use bytes::Bytes;
use longshore_blocks::{combine_crc32c, crc32c};

use super::{BlockFile, FileError, invalid, replace, tile_bytes};

/// First bytes of every file of heads.
pub(super) const MAGIC: [u8; 8] = *b"LSHEADS\0";

/// Some KV heads of every layer of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) struct HeadsFile {
    /// What names the block; without tiles.
    pub(in crate::store) block: BlockFile,
    /// Which heads.
    pub(in crate::store) heads: Range<u32>,
    /// By layer.
    pub(in crate::store) layers: Vec<HeadsLayer>,
}

/// Some KV heads of a tile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) struct HeadsLayer {
    /// CRC-32C of the whole tile.
    pub(in crate::store) tile_crc32c: u32,
    /// CRC-32C of each head of the tile.
    pub(in crate::store) head_crc32cs: Vec<u32>,
    /// The heads, one after the other.
    pub(in crate::store) body: Bytes,
}

impl HeadsFile {
    /// Writes it to `path`, in the place of what is there only when all of it is written. Refuses what does not prove itself.
    pub(in crate::store) fn write(&self, path: &Path) -> Result<u64, FileError> {
        replace(path, &self.header()?, self.layers.iter().map(|layer| &layer.body))
    }

    /// Header with its checksum, of heads that were all checked.
    pub(super) fn header(&self) -> Result<Vec<u8>, FileError> {
        let shape = &self.block.shape;
        let tile_bytes = tile_bytes(shape)?;
        let head_bytes = tile_bytes / shape.kv_heads as usize;
        if self.heads.is_empty() || self.heads.end > shape.kv_heads {
            let problem = format!("are {:?}, tiles have {} KV heads", self.heads, shape.kv_heads);
            return Err(invalid("heads", problem));
        }
        if self.layers.len() != shape.layers as usize {
            let problem = format!("are {}, heads of {} came", shape.layers, self.layers.len());
            return Err(invalid("layers", problem));
        }
        for (at, layer) in self.layers.iter().enumerate() {
            if !layer.is_sound(&self.heads, shape.kv_heads as usize, head_bytes) {
                return Err(FileError::Checksum { field: format!("tiles[{at}]") });
            }
        }
        let mut header = self.block.fixed(MAGIC, tile_bytes);
        let mut put = |number: u32| header.extend_from_slice(&number.to_le_bytes());
        put(self.heads.start);
        put(self.heads.end - self.heads.start);
        self.layers.iter().for_each(|layer| put(layer.tile_crc32c));
        self.layers.iter().flat_map(|layer| &layer.head_crc32cs).for_each(|crc| put(*crc));
        let crc = crc32c(&header);
        header.extend_from_slice(&crc.to_le_bytes());
        Ok(header)
    }
}

impl HeadsLayer {
    /// Whether the body has the checksums of its heads, and those of all heads make that of the tile.
    fn is_sound(&self, heads: &Range<u32>, kv_heads: usize, head_bytes: usize) -> bool {
        let own = self.head_crc32cs.get(heads.start as usize..heads.end as usize).unwrap_or_default();
        let join = |before: u32, head: &u32| combine_crc32c(before, *head, head_bytes);
        self.head_crc32cs.len() == kv_heads
            && self.head_crc32cs.iter().fold(0, join) == self.tile_crc32c
            && self.body.len() == own.len() * head_bytes
            && self.body.chunks(head_bytes).map(crc32c).eq(own.iter().copied())
    }
}
