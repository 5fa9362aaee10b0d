//! Our own types of what travels: plain, validated, free of wire details. `TryFrom` the generated ones names the field.

mod check;
mod cluster;
mod generate;
mod kv;
mod operations;
mod work;

pub use check::{CHUNK_TOKENS_MAX, KEYS_MAX, REQUEST_ID_BYTES_MAX, validate_request_id};
pub use cluster::{Describe, Member, ModelDescription, Role};
pub use generate::{
    ChatMessage, FinishReason, Finished, GenerateEvent, GenerateStart, Prompt, PromptChunk, Sampling,
    ShardBytes, TextTokens, TokenChoice, TokenLogprob,
};
pub use kv::{
    AttendAnswer, AttendItem, AttendPartial, AttendQuery, Dtype, ForeignBytes, GetBlocks, GetSummaries,
    HeadPart, Identity, InventoryChange, InventoryNews, Lookup, NCCL_ID_BYTES, NCCL_MEMBER_BYTES, NcclBytes,
    NcclEpoch, NcclInvitation, NcclLease, OpenView, OpenedView, PutAck, PutOutcome, RUNS_MAX, RepairStats,
    ScrubStats, ShardStats, SparseVisits, SummariesMessage, Tensor, TierStats, TileData, TileMemory,
    TileMessage, TileOrder, TileRoom, WatchInventory, WireTileShape,
};
pub use operations::{
    BlockEntry, BlockPage, BlockState, CopyStats, DepartureStats, DrainStats, LIST_BLOCKS_MAX, LaneStats,
    ListBlocks, ScrubFinding, ScrubStarted, TenantStats,
};
pub use work::{DecodeEvent, DecodeStart, PrefillEvent, PrefillStart};

#[cfg(test)]
mod tests;
