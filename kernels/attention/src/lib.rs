//! The attention primitive on CPU: queries × KV tiles × work list → partials, and their merge.
//! Knows no network, no clock, no async. Architecture, section 3.

mod error;
mod executor;
mod exp2;
mod partial;
mod policy;
mod shape;
mod simd;
mod sparse;
mod summaries;
mod tile;
mod tiles;
mod work;

pub use error::{Error, Kind};
pub use executor::{AttendItem, CpuExecutor, Executor, PagedKv, attend_by_lists};
pub use partial::Partials;
pub use policy::{
    BlockChoice, BlockChooser, BlockSelection, BudgetLevel, Cosines, GatesCut, HeadBudgets, HeadPattern,
    HeadPlan, PlanInput, PolicyReads, PrefillPolicy, RuleCall, Streaming,
};
pub use shape::{HeadShape, KvDtype, LAYOUT_CPU_PANELS, LAYOUT_ROWS, TileShape};
pub use sparse::{Pairs, QUERY_TILE, SparseItem, SparseWork, Visit};
pub use summaries::{Mean, PromisedMeans, Spreads, Summaries};
pub use tile::{Promise, Tile};
pub use tiles::Tiles;
pub use work::{Column, ExactBlock, Queries, SummaryKey, WorkList};
