//! The bytes of the disk tier. A segment file is a header, a table with one entry per place, and the places. All numbers are
//! little-endian. An entry names the block in its place, where its copies belong and the checksum of each of its tiles; it says
//! itself where it lies, so that a misplaced copy of it is no entry. Header and entries end with the CRC-32C of what is before it.

use longshore_blocks::{BlockKey, BlockPlace, Deployment, Namespace, crc32c};

/// First bytes of a segment file.
const MAGIC: [u8; 8] = *b"LSHKVSEG";
/// First bytes of an entry in use.
const ENTRY_MAGIC: [u8; 4] = *b"LSBK";
/// Version of everything in this file. Entries of version 1 did not say where copies belong and were shorter: its files are refused,
/// since what they hold can be computed again.
pub(super) const VERSION: u32 = 2;
/// Bytes that the header takes, most of them zero.
pub(super) const HEADER_BYTES: u64 = 4096;
/// Bytes of the header that say something.
const HEADER_USED: usize = 72;
/// Tiles and entries begin on multiples of this: a sector.
const SECTOR: u64 = 512;
/// Bytes of an entry without its tiles' checksums.
const ENTRY_FIXED: usize = 120;

/// Sizes of everything in the files of one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Format {
    /// Whose KV it is.
    pub(super) deployment: Deployment,
    /// Bytes of a tile.
    pub(super) tile_bytes: u64,
    /// Tiles of a block.
    pub(super) layers: u32,
    /// Places of a segment.
    pub(super) places: u32,
}

/// Why a header is not that of a segment of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unfit {
    /// No header, or a damaged one: nothing in the file can be used.
    Damaged,
    /// Written by another version or for another deployment.
    Foreign(String),
}

/// A block as an entry names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) place: u64,
    pub(super) namespace: Namespace,
    pub(super) key: BlockKey,
    pub(super) generation: u64,
    /// Where its copies belong, when its writer said so.
    pub(super) belongs: Option<BlockPlace>,
    pub(super) checksums: Box<[u32]>,
}

impl Format {
    pub(super) fn entry_bytes(&self) -> u64 {
        (ENTRY_FIXED as u64 + 4 * u64::from(self.layers)).next_multiple_of(SECTOR)
    }

    pub(super) fn table_bytes(&self) -> u64 {
        self.entry_bytes() * u64::from(self.places)
    }

    pub(super) fn tile_stride(&self) -> u64 {
        self.tile_bytes.next_multiple_of(SECTOR)
    }

    pub(super) fn block_bytes(&self) -> u64 {
        self.tile_stride() * u64::from(self.layers)
    }

    /// Segment of a place, and which one of that segment it is.
    pub(super) fn segment_of(&self, place: u64) -> (u64, u64) {
        (place / u64::from(self.places), place % u64::from(self.places))
    }

    pub(super) fn entry_offset(&self, slot: u64) -> u64 {
        HEADER_BYTES + slot * self.entry_bytes()
    }

    pub(super) fn tile_offset(&self, slot: u64, layer: u32) -> u64 {
        let places = (HEADER_BYTES + self.table_bytes()).next_multiple_of(4096);
        places + slot * self.block_bytes() + u64::from(layer) * self.tile_stride()
    }

    /// End of the last tile of a place, without the padding behind it.
    pub(super) fn block_end(&self, slot: u64) -> u64 {
        self.tile_offset(slot, self.layers - 1) + self.tile_bytes
    }

    pub(super) fn header(&self, segment: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES as usize);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.places.to_le_bytes());
        bytes.extend(segment.to_le_bytes());
        bytes.extend(self.tile_bytes.to_le_bytes());
        bytes.extend(self.layers.to_le_bytes());
        bytes.extend(self.deployment.as_bytes());
        let crc = crc32c(&bytes);
        bytes.extend(crc.to_le_bytes());
        debug_assert_eq!(bytes.len(), HEADER_USED, "the reader takes as much");
        bytes.resize(HEADER_BYTES as usize, 0);
        bytes
    }

    /// Checks a header against what this shard would write; the number of places is the file's own.
    pub(super) fn check_header(&self, bytes: &[u8], segment: u64) -> Result<Self, Unfit> {
        let header = bytes.get(..HEADER_USED).ok_or(Unfit::Damaged)?;
        if header[..8] != MAGIC {
            return Err(Unfit::Damaged);
        }
        // The version comes first: another one may have its checksum elsewhere.
        let version = u32_at(header, 8);
        let damaged = u32_at(header, HEADER_USED - 4) != crc32c(&header[..HEADER_USED - 4]);
        if version != VERSION {
            return Err(Unfit::Foreign(format!("is of version {version}, this program reads {VERSION}")));
        }
        if damaged || u64_at(header, 16) != segment || u32_at(header, 12) == 0 {
            return Err(Unfit::Damaged);
        }
        if header[36..68] != *self.deployment.as_bytes() {
            return Err(Unfit::Foreign(
                "holds blocks of another deployment (model, KV type or block size)".to_owned(),
            ));
        }
        if (u64_at(header, 24), u32_at(header, 32)) != (self.tile_bytes, self.layers) {
            return Err(Unfit::Foreign("holds blocks of another shape".to_owned()));
        }
        Ok(Self { places: u32_at(header, 12), ..*self })
    }

    pub(super) fn entry(&self, entry: &Entry) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.entry_bytes() as usize);
        bytes.extend(ENTRY_MAGIC);
        bytes.extend(self.layers.to_le_bytes());
        bytes.extend(entry.place.to_le_bytes());
        bytes.extend(entry.namespace.as_bytes());
        bytes.extend(entry.key.0);
        bytes.extend(entry.generation.to_le_bytes());
        bytes.extend(u32::from(entry.belongs.is_some()).to_le_bytes());
        let BlockPlace { stripe_seed, index } =
            entry.belongs.unwrap_or(BlockPlace { stripe_seed: [0; 32], index: 0 });
        bytes.extend(stripe_seed);
        bytes.extend(index.to_le_bytes());
        bytes.extend(entry.checksums.iter().flat_map(|crc| crc.to_le_bytes()));
        let crc = crc32c(&bytes);
        bytes.extend(crc.to_le_bytes());
        bytes.resize(self.entry_bytes() as usize, 0);
        bytes
    }

    /// The entry of a place; none when the place is empty, the entry damaged or another place's.
    pub(super) fn parse_entry(&self, bytes: &[u8], place: u64) -> Option<Entry> {
        let used = ENTRY_FIXED + 4 * self.layers as usize;
        let (body, crc) = bytes.get(..used)?.split_at(used - 4);
        let fits = body[..4] == ENTRY_MAGIC && u32_at(body, 4) == self.layers && u64_at(body, 8) == place;
        if !fits || u32_at(crc, 0) != crc32c(body) {
            return None;
        }
        let belongs = match u32_at(body, 72) {
            0 => None,
            1 => Some(BlockPlace { stripe_seed: body[76..108].try_into().ok()?, index: u64_at(body, 108) }),
            _ => return None,
        };
        Some(Entry {
            place,
            namespace: Namespace::from_bytes(body[16..48].try_into().ok()?),
            key: BlockKey(body[48..64].try_into().ok()?),
            generation: u64_at(body, 64),
            belongs,
            checksums: body[ENTRY_FIXED - 4..].chunks_exact(4).map(|word| u32_at(word, 0)).collect(),
        })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes were taken"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes were taken"))
}

#[cfg(test)]
mod tests;
