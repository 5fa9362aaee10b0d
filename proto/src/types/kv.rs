//! Tensors, tiles, views and attention.

use bytes::Bytes;
use longshore_blocks::{BlockKey, BlockPlace, Deployment, Namespace};

pub use data::{ForeignBytes, TileData, TileMemory, TileRoom};

use super::operations::{CopyStats, DepartureStats, DrainStats, LaneStats, ScrubFinding, TenantStats};

mod attend;
mod convert;
mod data;
mod heads;
mod inventory;
mod nccl;
mod store;
mod summaries;

pub use attend::RUNS_MAX;
pub use heads::HeadPart;
pub use nccl::{NCCL_ID_BYTES, NCCL_MEMBER_BYTES, NcclBytes, NcclEpoch, NcclInvitation, NcclLease};

/// Element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    F16,
    /// 2 bytes.
    Bf16,
    /// 1 byte, without its share of a scale.
    Int8,
}

/// A dense row-major tensor whose length matched its shape and whose bytes matched their checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Element type.
    pub dtype: Dtype,
    /// Extents, outermost first, at most 4.
    pub shape: Vec<u64>,
    /// Elements, little-endian.
    pub data: Bytes,
}

/// What KV depends on, and the placement epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Deployment without tenant salt.
    pub deployment: Deployment,
    /// Deployment with tenant salt.
    pub namespace: Namespace,
    /// Epoch of the shard map.
    pub shard_map_epoch: u64,
}

/// Shape of every tile of a deployment; ranges are checked where it becomes an attention shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WireTileShape {
    /// Token positions of a block.
    pub block_tokens: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Elements of one head.
    pub head_dim: u32,
    /// Element type.
    pub dtype: Dtype,
    /// Layout id.
    pub layout: u32,
    /// Layers of the model.
    pub layers: u32,
}

/// Blocks to look up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lookup {
    /// What the KV depends on.
    pub identity: Identity,
    /// Keys, at most 65,536.
    pub keys: Vec<BlockKey>,
    /// The answer promises nothing: blocks are neither kept for it nor counted as used.
    pub peek: bool,
}

/// K and V of one block in one layer. Lanes do not verify the checksum: whoever uses the bytes does, over its own copy of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TileMessage {
    /// Block.
    pub key: BlockKey,
    /// Layer.
    pub layer: u32,
    /// Body.
    pub data: TileData,
    /// CRC-32C of the body, as its sender tells it.
    pub crc32c: u32,
    /// What places the block; `None` where it does not matter or nobody knows.
    pub place: Option<BlockPlace>,
}

/// Outcome of storing one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PutOutcome {
    /// Stored and verified.
    Stored,
    /// The shard held it already.
    Duplicate,
    /// A checksum, key, layer or size was wrong.
    Corrupt,
    /// No room.
    NoSpace,
}

/// What became of one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PutAck {
    /// Block.
    pub key: BlockKey,
    /// Outcome.
    pub outcome: PutOutcome,
    /// Why it was refused, else empty.
    pub message: String,
}

/// Tiles to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetBlocks {
    /// What the KV depends on.
    pub identity: Identity,
    /// Keys.
    pub keys: Vec<BlockKey>,
    /// First layer.
    pub first_layer: u32,
    /// Layers to read; `None` means all from `first_layer` on.
    pub layers: Option<u32>,
    /// Which tiles come first.
    pub order: TileOrder,
}

impl GetBlocks {
    /// All layers of blocks, block by block.
    pub fn whole(identity: Identity, keys: Vec<BlockKey>) -> Self {
        Self { identity, keys, first_layer: 0, layers: None, order: TileOrder::Blocks }
    }
}

/// The order of tiles in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TileOrder {
    /// All layers of the first key, then of the next.
    #[default]
    Blocks,
    /// The first layer of all keys, then the next.
    Layers,
}

/// Blocks to open as a view, or to append to one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenView {
    /// What the KV depends on.
    pub identity: Identity,
    /// (index in the sequence, key), ascending by index.
    pub blocks: Vec<(u64, BlockKey)>,
    /// View to append to; `None` opens a new one.
    pub append_to: Option<u64>,
    /// Milliseconds after the last use when the view may be reclaimed.
    pub lease_ms: u32,
}

/// Answer to [`OpenView`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpenedView {
    /// All blocks are there and kept.
    Open {
        /// Name of the view on its shard.
        view_id: u64,
    },
    /// Nothing was opened because these are not held.
    Missing(Vec<BlockKey>),
}

/// Which summaries of a view's blocks to read. Mean keys always come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetSummaries {
    /// What the KV depends on.
    pub identity: Identity,
    /// View.
    pub view_id: u64,
    /// First layer.
    pub first_layer: u32,
    /// Layers to read; `None` means all from `first_layer` on.
    pub layers: Option<u32>,
    /// Mean values too.
    pub values: bool,
    /// Variances of the elements of the keys too.
    pub spreads: bool,
    /// Mean cosines of the keys with their mean too.
    pub cosines: bool,
}

/// Summaries of consecutive blocks of a view in one layer, f32; shapes agree with each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SummariesMessage {
    /// Layer.
    pub layer: u32,
    /// Number of the first of these blocks among those of the view.
    pub first: u64,
    /// Mean keys `[blocks, kv_heads, head_dim]`.
    pub keys: Tensor,
    /// Mean values, shaped like `keys`.
    pub values: Option<Tensor>,
    /// Variances of the elements of the keys, shaped like `keys`.
    pub spreads: Option<Tensor>,
    /// Mean cosines `[blocks, kv_heads]`.
    pub cosines: Option<Tensor>,
}

/// Attention of some query rows over some views, one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct AttendQuery {
    /// Unique in its stream.
    pub query_id: u64,
    /// What the KV depends on. Items of different tenants go into different queries.
    pub identity: Identity,
    /// Layer.
    pub layer: u32,
    /// One per sequence.
    pub items: Vec<AttendItem>,
}

/// Query rows of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct AttendItem {
    /// View.
    pub view_id: u64,
    /// Absolute position of the first row.
    pub first_position: u64,
    /// f32 `[rows, query_heads, head_dim]`.
    pub queries: Tensor,
    /// Softmax scale.
    pub scale: f32,
    /// What to visit instead of every block of the view.
    pub sparse: Option<SparseVisits>,
}

/// Blocks that the rows of an item visit, for the query heads of one KV head: `queries` and partials have those heads only, and
/// only stripes with a visited block have a partial.
#[derive(Debug, Clone, PartialEq)]
pub struct SparseVisits {
    /// KV head.
    pub kv_head: u32,
    /// Blocks of the sequence: runs that are not empty, ascend and do not touch.
    pub runs: Vec<std::ops::Range<u64>>,
    /// Margin of skip-softmax, base 2, positive and finite.
    pub skip_below: Option<f32>,
}

/// One message of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum AttendAnswer {
    /// Some of the partials, ascending by item and stripe.
    Partials {
        /// The query.
        query_id: u64,
        /// Partials.
        partials: Vec<AttendPartial>,
        /// No more messages for this query.
        last: bool,
    },
    /// The query failed.
    Failed {
        /// The query.
        query_id: u64,
        /// A `google.rpc.Code`, never 0.
        code: u32,
        /// What failed.
        message: String,
    },
}

/// Attention of one item's rows over one stripe.
#[derive(Debug, Clone, PartialEq)]
pub struct AttendPartial {
    /// Index of the item in the query.
    pub item: u32,
    /// Stripe.
    pub stripe: u64,
    /// f32 `[rows, query_heads, 2 + head_dim]`.
    pub partial: Tensor,
}

/// Occupancy and counters of one shard.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShardStats {
    /// Shard id.
    pub shard_id: String,
    /// Bytes that tiles and summaries may occupy.
    pub capacity_bytes: u64,
    /// Bytes that tiles and summaries occupy, incomplete blocks included.
    pub used_bytes: u64,
    /// Complete blocks.
    pub blocks: u64,
    /// Complete blocks that a view keeps.
    pub pinned_blocks: u64,
    /// Blocks still being written.
    pub open_blocks: u64,
    /// Open views.
    pub views: u64,
    /// Views that were closed and that somebody still reads.
    pub closed_views: u64,
    /// Pieces of work that wait for a thread.
    pub waiting_turns: u64,
    /// Blocks stored since start.
    pub stored_total: u64,
    /// Blocks evicted since start.
    pub evicted_total: u64,
    /// Blocks refused since start.
    pub corrupt_total: u64,
    /// Lookup hits since start.
    pub hits_total: u64,
    /// Lookup misses since start.
    pub misses_total: u64,
    /// Attention queries answered since start.
    pub attend_total: u64,
    /// The tiers, memory first.
    pub tiers: Vec<TierStats>,
    /// The scrubber.
    pub scrub: ScrubStats,
    /// Start of the process; 0 when it is not known.
    pub incarnation: u64,
    /// Epoch of the shard map that it sees.
    pub shard_map_epoch: u64,
    /// How it keeps up the copies of its blocks.
    pub repair: RepairStats,
    /// Bytes of blocks that it could take without losing any.
    pub room_bytes: u64,
    /// Bytes of summaries beside its blocks; part of `used_bytes`.
    pub summary_bytes: u64,
    /// Milliseconds since the start of the shard.
    pub uptime_ms: u64,
    /// Open put streams.
    pub writers: u64,
    /// Damaged blocks that wait for their views to end.
    pub condemned_blocks: u64,
    /// Why blocks went, or did not come.
    pub departures: DepartureStats,
    /// Tiles by lane.
    pub lanes: Vec<LaneStats>,
    /// How the copies of its blocks stand.
    pub copies: CopyStats,
    /// How far it is in handing its blocks over.
    pub drain: DrainStats,
    /// What the last rounds of the scrubber found damaged, the newest last.
    pub scrub_findings: Vec<ScrubFinding>,
    /// How tenants share it.
    pub tenants: TenantStats,
}

/// Occupancy and counters of one tier of a shard.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TierStats {
    /// `dram` or `disk`.
    pub name: String,
    /// Bytes that blocks may occupy.
    pub capacity_bytes: u64,
    /// Bytes that blocks occupy.
    pub used_bytes: u64,
    /// Blocks that are read from this tier.
    pub blocks: u64,
    /// Blocks of a higher tier that this one keeps as well.
    pub copies: u64,
    /// Blocks on their way to the tier below.
    pub leaving_blocks: u64,
    /// Blocks on their way to the tier above.
    pub rising_blocks: u64,
    /// Lookups of blocks of this tier, since start.
    pub hits_total: u64,
    /// Blocks evicted from this tier and held nowhere since, since start.
    pub evicted_total: u64,
    /// Blocks that came from the tier above, since start.
    pub spilled_total: u64,
    /// Blocks that went to the tier above, since start.
    pub promoted_total: u64,
    /// Blocks that a start found.
    pub restored_total: u64,
    /// Reads and writes that failed, since start.
    pub io_errors_total: u64,
    /// Reads and writes that took longer than somebody waits, since start.
    pub slow_total: u64,
    /// Blocks from above that the admission filter did not want, since start.
    pub refused_total: u64,
    /// Blocks from above that found no room, or came while writing paused, since start.
    pub skipped_total: u64,
}

/// How far the scrubber of a shard is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScrubStats {
    /// Blocks of this round that were checked.
    pub done_blocks: u64,
    /// Blocks of this round.
    pub round_blocks: u64,
    /// Rounds finished since start.
    pub rounds_total: u64,
    /// Blocks checked since start.
    pub checked_total: u64,
    /// Damaged blocks found since start.
    pub bad_total: u64,
}

/// How a shard keeps up the copies of its blocks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RepairStats {
    /// Blocks that the running search did not look at yet.
    pub unchecked_blocks: u64,
    /// Copies that it found missing and is to send.
    pub backlog_blocks: u64,
    /// Copies sent since start.
    pub sent_total: u64,
    /// Bytes of copies sent since start.
    pub sent_bytes_total: u64,
    /// Copies that other shards did not take since start.
    pub failed_total: u64,
    /// Own copies dropped because their owners hold theirs, since start.
    pub dropped_total: u64,
    /// Searches that went through all blocks since start.
    pub passes_total: u64,
    /// Other shards that it does not reach.
    pub peers_down: u64,
}

/// Where to begin in the events of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchInventory {
    /// What the KV depends on; blocks of its namespace only.
    pub identity: Identity,
    /// Incarnation and sequence number of the last event that was taken; `None` to begin with all blocks.
    pub after: Option<(u64, u64)>,
}

/// Some events of a shard, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InventoryNews {
    /// Start of the shard.
    pub incarnation: u64,
    /// Forget all that is known of this shard: the events begin anew.
    pub reset: bool,
    /// (sequence number, block, what happened), ascending.
    pub events: Vec<(u64, BlockKey, InventoryChange)>,
    /// Sequence number up to which everything was told.
    pub told: u64,
    /// Blocks of the namespace that are held; as of `told` in a message without events.
    pub blocks: u64,
    /// Exclusive or of the first 8 bytes, little endian, of their keys.
    pub digest: u64,
}

/// What happened to a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InventoryChange {
    /// It is held and complete.
    Stored,
    /// It made room for another one.
    Evicted,
    /// Its bytes failed a check.
    Condemned,
    /// Its owners hold it, so the shard dropped it.
    Moved,
}
