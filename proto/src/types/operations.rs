//! What operators ask shards: pages of blocks, rounds of the scrubber, drains; and what `Stats` tells of them.

use bytes::Bytes;
use longshore_blocks::{BlockKey, BlockPlace, Namespace};

use super::check;
use crate::{WireError, v1};

/// Most blocks of one page.
pub const LIST_BLOCKS_MAX: u32 = 4_096;
/// Blocks of a page that names no limit.
const LIST_BLOCKS: u32 = 1_024;
/// Bytes of a namespace and a key, which name the place in a list.
const CURSOR_BYTES: usize = 48;

/// Which held blocks to list, in the order of namespace and key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListBlocks {
    /// First hexadecimal digits of the namespaces, lower case; empty: all.
    pub namespace_prefix: String,
    /// First hexadecimal digits of the keys, lower case; empty: all.
    pub key_prefix: String,
    /// The last block of the page before.
    pub after: Option<(Namespace, BlockKey)>,
    /// Most blocks of the page, 1 to [`LIST_BLOCKS_MAX`].
    pub limit: u32,
    /// Read and check them too.
    pub check: bool,
}

impl Default for ListBlocks {
    /// All blocks, from the first on.
    fn default() -> Self {
        let (namespace_prefix, key_prefix) = (String::new(), String::new());
        Self { namespace_prefix, key_prefix, after: None, limit: LIST_BLOCKS, check: false }
    }
}

/// Some held blocks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BlockPage {
    /// Ascending by namespace and key.
    pub blocks: Vec<BlockEntry>,
    /// What the next page comes after; `None`: there are no more.
    pub next: Option<(Namespace, BlockKey)>,
}

/// A held block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockEntry {
    /// Whose it is.
    pub namespace: Namespace,
    /// Key.
    pub key: BlockKey,
    /// Tier that it is read from.
    pub tier: String,
    /// What it is doing.
    pub state: BlockState,
    /// Bytes of its tiles.
    pub bytes: u64,
    /// Views that pin it.
    pub views: u64,
    /// Milliseconds for which it is kept from eviction anyway.
    pub lease_ms: u64,
    /// In memory, and on disk as well.
    pub on_disk_too: bool,
    /// What places it, where that is known.
    pub place: Option<BlockPlace>,
    /// Number of this holding of the block in its shard.
    pub generation: u64,
    /// Whether its tiles match their checksums; `None`: not checked.
    pub sound: Option<bool>,
    /// CRC-32C of its tiles by layer, where it was checked.
    pub checksums: Vec<u32>,
}

/// What a held block is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockState {
    /// It lies where it is.
    Sealed,
    /// It is being written to the tier below.
    Leaving,
    /// It is being read into the tier above.
    Rising,
}

/// A round of the scrubber that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScrubStarted {
    /// It is done when so many rounds are.
    pub round: u64,
    /// Bytes a second that it reads.
    pub bytes_per_second: u64,
}

/// A damaged block that the scrubber found and dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScrubFinding {
    /// Block.
    pub key: BlockKey,
    /// Tier that it was on.
    pub tier: String,
}

/// Why blocks went, or did not come, since start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DepartureStats {
    /// Made room in memory and are nowhere since.
    pub evicted_memory_total: u64,
    /// Made room on disk.
    pub evicted_disk_total: u64,
    /// Their bytes failed a check.
    pub condemned_total: u64,
    /// Their owners hold them.
    pub moved_total: u64,
    /// Were never complete.
    pub incomplete_total: u64,
    /// Found no room when they came.
    pub no_space_total: u64,
    /// Came although they were held.
    pub duplicate_total: u64,
}

/// Tiles that came and went over one lane, since start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LaneStats {
    /// `local`, `shm` or `grpc`.
    pub name: String,
    /// Bytes that came in put streams.
    pub received_bytes_total: u64,
    /// Bytes that went out in get streams.
    pub sent_bytes_total: u64,
    /// Put streams.
    pub puts_total: u64,
    /// Get streams.
    pub gets_total: u64,
}

/// How the copies of a shard's blocks stand.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CopyStats {
    /// Copies that each block should have.
    pub wanted: u32,
    /// Copies that must be confirmed before a block counts as stored.
    pub write_acks: u32,
    /// Copies that the last search found missing and did not send, of blocks of which the shard is the first holder.
    pub short: u64,
    /// Blocks of which nobody said what places them.
    pub unplaced_blocks: u64,
    /// Blocks of which `short` says nothing yet.
    pub unsearched_blocks: u64,
}

/// How the tenants of a shard, which are namespaces to it, share what there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TenantStats {
    /// Tenants with views, streams or incomplete blocks.
    pub tenants: u64,
    /// Bytes of blocks that nothing may evict.
    pub kept_bytes: u64,
    /// The most of that which one tenant has.
    pub most_kept_bytes: u64,
    /// What was refused because one tenant would have taken too much, since start.
    pub refused_total: u64,
    /// Blocks dropped before their promise ended, since start.
    pub broken_promises_total: u64,
    /// Streams ended because they made no progress, since start.
    pub stalled_streams_total: u64,
}

/// How a shard that is drained hands its blocks over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DrainStats {
    /// It was asked to.
    pub draining: bool,
    /// Every block has all its copies on other shards, and none came since.
    pub drained: bool,
    /// It still takes new blocks, for want of other shards.
    pub takes_blocks: bool,
    /// Blocks that the last whole search looked at: the sum of the next four.
    pub blocks: u64,
    /// Have all their copies elsewhere.
    pub moved_blocks: u64,
    /// Are under way.
    pub waiting_blocks: u64,
    /// Found no room on their owners without driving others out.
    pub no_room_blocks: u64,
    /// Have a copy on every other host, of which there are too few.
    pub too_few_hosts_blocks: u64,
}

fn cursor(bytes: &[u8], field: &str) -> Result<Option<(Namespace, BlockKey)>, WireError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let bytes: [u8; CURSOR_BYTES] = check::exact(bytes, field)?;
    let (mut namespace, mut key) = ([0; 32], [0; 16]);
    namespace.copy_from_slice(&bytes[..32]);
    key.copy_from_slice(&bytes[32..]);
    Ok(Some((Namespace::from_bytes(namespace), BlockKey(key))))
}

fn cursor_bytes(cursor: Option<(Namespace, BlockKey)>) -> Bytes {
    cursor.map_or_else(Bytes::new, |(namespace, key)| [&namespace.as_bytes()[..], &key.0].concat().into())
}

/// Refuses what is no beginning of a hexadecimal number of `digits_max` digits.
fn hex_prefix(text: &str, digits_max: usize, field: &str) -> Result<(), WireError> {
    check::at_most(text.len(), digits_max, "digits", field)?;
    if !text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(WireError::invalid(field, "must be hexadecimal digits, lower case"));
    }
    Ok(())
}

impl TryFrom<v1::ListBlocksRequest> for ListBlocks {
    type Error = WireError;

    fn try_from(wire: v1::ListBlocksRequest) -> Result<Self, WireError> {
        hex_prefix(&wire.namespace_prefix, 64, "namespace_prefix")?;
        hex_prefix(&wire.key_prefix, 32, "key_prefix")?;
        if wire.limit > LIST_BLOCKS_MAX {
            let problem = format!("is {}, must be at most {LIST_BLOCKS_MAX}", wire.limit);
            return Err(WireError::invalid("limit", problem));
        }
        Ok(Self {
            after: cursor(&wire.after, "after")?,
            namespace_prefix: wire.namespace_prefix,
            key_prefix: wire.key_prefix,
            limit: if wire.limit == 0 { LIST_BLOCKS } else { wire.limit },
            check: wire.check,
        })
    }
}

impl From<ListBlocks> for v1::ListBlocksRequest {
    fn from(list: ListBlocks) -> Self {
        Self {
            namespace_prefix: list.namespace_prefix,
            key_prefix: list.key_prefix,
            after: cursor_bytes(list.after),
            limit: list.limit,
            check: list.check,
        }
    }
}

impl TryFrom<v1::ListBlocksResponse> for BlockPage {
    type Error = WireError;

    fn try_from(wire: v1::ListBlocksResponse) -> Result<Self, WireError> {
        check::at_most(wire.blocks.len(), LIST_BLOCKS_MAX as usize, "entries", "blocks")?;
        Ok(Self { blocks: check::each(wire.blocks, "blocks")?, next: cursor(&wire.next, "next")? })
    }
}

impl From<BlockPage> for v1::ListBlocksResponse {
    fn from(page: BlockPage) -> Self {
        Self { blocks: page.blocks.into_iter().map(Into::into).collect(), next: cursor_bytes(page.next) }
    }
}

impl TryFrom<v1::BlockEntry> for BlockEntry {
    type Error = WireError;

    fn try_from(wire: v1::BlockEntry) -> Result<Self, WireError> {
        let state = match v1::BlockState::try_from(wire.state) {
            Ok(v1::BlockState::Sealed) => BlockState::Sealed,
            Ok(v1::BlockState::Leaving) => BlockState::Leaving,
            Ok(v1::BlockState::Rising) => BlockState::Rising,
            Ok(v1::BlockState::Unspecified) | Err(_) => {
                let problem = format!("is {}, which is no known state", wire.state);
                return Err(WireError::invalid("state", problem));
            }
        };
        let sound = match v1::BlockCheck::try_from(wire.check) {
            Ok(v1::BlockCheck::Unspecified) => None,
            Ok(v1::BlockCheck::Sound) => Some(true),
            Ok(v1::BlockCheck::Damaged) => Some(false),
            Err(_) => {
                let problem = format!("is {}, which is no known outcome", wire.check);
                return Err(WireError::invalid("check", problem));
            }
        };
        let place = match wire.stripe_seed.is_empty() {
            true => None,
            false => {
                let stripe_seed = check::exact(&wire.stripe_seed, "stripe_seed")?;
                Some(BlockPlace { stripe_seed, index: wire.block_index })
            }
        };
        Ok(Self {
            namespace: Namespace::from_bytes(check::exact(&wire.namespace, "namespace")?),
            key: BlockKey(check::exact(&wire.key, "key")?),
            tier: wire.tier,
            state,
            bytes: wire.bytes,
            views: wire.views,
            lease_ms: wire.lease_ms,
            on_disk_too: wire.on_disk_too,
            place,
            generation: wire.generation,
            sound,
            checksums: wire.checksums,
        })
    }
}

impl From<BlockEntry> for v1::BlockEntry {
    fn from(entry: BlockEntry) -> Self {
        let state = match entry.state {
            BlockState::Sealed => v1::BlockState::Sealed,
            BlockState::Leaving => v1::BlockState::Leaving,
            BlockState::Rising => v1::BlockState::Rising,
        };
        let check = match entry.sound {
            None => v1::BlockCheck::Unspecified,
            Some(true) => v1::BlockCheck::Sound,
            Some(false) => v1::BlockCheck::Damaged,
        };
        let seed = |place: BlockPlace| Bytes::copy_from_slice(&place.stripe_seed);
        Self {
            namespace: Bytes::copy_from_slice(entry.namespace.as_bytes()),
            key: Bytes::copy_from_slice(&entry.key.0),
            tier: entry.tier,
            state: state.into(),
            bytes: entry.bytes,
            views: entry.views,
            lease_ms: entry.lease_ms,
            on_disk_too: entry.on_disk_too,
            stripe_seed: entry.place.map_or_else(Bytes::new, seed),
            block_index: entry.place.map_or(0, |place| place.index),
            generation: entry.generation,
            check: check.into(),
            checksums: entry.checksums,
        }
    }
}

impl From<v1::StartScrubResponse> for ScrubStarted {
    fn from(wire: v1::StartScrubResponse) -> Self {
        Self { round: wire.round, bytes_per_second: wire.bytes_per_second }
    }
}

impl From<ScrubStarted> for v1::StartScrubResponse {
    fn from(started: ScrubStarted) -> Self {
        Self { round: started.round, bytes_per_second: started.bytes_per_second }
    }
}

impl ScrubFinding {
    /// `None` for what is no key: a figure that cannot be read spoils no others.
    pub(super) fn from_wire(wire: v1::ScrubFinding) -> Option<Self> {
        let key = BlockKey(check::exact(&wire.key, "key").ok()?);
        Some(Self { key, tier: wire.tier })
    }
}

impl From<ScrubFinding> for v1::ScrubFinding {
    fn from(finding: ScrubFinding) -> Self {
        Self { key: Bytes::copy_from_slice(&finding.key.0), tier: finding.tier }
    }
}

/// Conversions of messages that are plain numbers, field by field.
macro_rules! numbers {
    ($name:ident { $($field:ident),* $(,)? }) => {
        impl From<v1::$name> for $name {
            fn from(wire: v1::$name) -> Self {
                Self { $($field: wire.$field),* }
            }
        }

        impl From<$name> for v1::$name {
            fn from(own: $name) -> Self {
                Self { $($field: own.$field),* }
            }
        }
    };
}

numbers!(DepartureStats {
    evicted_memory_total,
    evicted_disk_total,
    condemned_total,
    moved_total,
    incomplete_total,
    no_space_total,
    duplicate_total,
});
numbers!(LaneStats { name, received_bytes_total, sent_bytes_total, puts_total, gets_total });
numbers!(CopyStats { wanted, write_acks, short, unplaced_blocks, unsearched_blocks });
numbers!(TenantStats {
    tenants,
    kept_bytes,
    most_kept_bytes,
    refused_total,
    broken_promises_total,
    stalled_streams_total,
});
numbers!(DrainStats {
    draining,
    drained,
    takes_blocks,
    blocks,
    moved_blocks,
    waiting_blocks,
    no_room_blocks,
    too_few_hosts_blocks,
});
