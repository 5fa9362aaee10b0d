//! The same operations on the GPU: kernels in CUDA C++ (`kernels/cuda/source`), compiled at run time, and what starts them.
//! Knows no network, no async. Design: `docs/cuda.md`.

#[cfg(test)]
mod addresses;
mod architecture;
mod attend;
mod buffer;
mod cache;
mod compiler;
mod cubin;
mod cuda;
mod departure;
mod device;
mod driver;
mod error;
mod executor;
mod kernel;
mod launch;
mod library;
mod mark;
mod model;
mod nccl;
mod nvrtc;
mod page_cache;
mod rates;
mod registry;
mod select;
pub mod selftest;
mod tile;
mod version;

pub use architecture::{Architecture, CAPABILITY_MIN, capability_name};
pub use attend::{
    CountedLists, CountedTile, DecodeAttention, DecodeCall, DecodeItem, DenseKeys, KeyColumn, KeyLists,
    KeyVisit, MeanPages, MergeItem, PartialMerger, PrefillAttention, PrefillCall, split_keys,
};
pub use buffer::{Buffer, Memory, Span};
pub use compiler::{Compiler, CudaOptions, HEADERS};
pub use cubin::{Resources, argument_bytes, resources};
pub use cuda::CudaDevice;
pub use departure::Departure;
pub use device::{Device, Queue};
pub use driver::{DeviceInfo, Driver};
pub use error::{Error, Kind};
pub use executor::{CudaExecutor, ExecutorStats, FallbackStats, Shortage};
pub use kernel::{Kernel, Launch, Source};
pub use launch::check as check_launch;
pub use library::{Library, locate, require_cublaslt};
pub use mark::Mark;
pub use model::{
    Append, CublasLt, CudaBackend, CudaLinear, KeptRows, ModelOptions, Precision, Product, Products,
};
pub use nccl::{
    Communicator, Convener, Invitation, LaneState, Nccl, NcclConvener, NcclLane, Part, Ranks, TileLane,
    UniqueId,
};
pub use nvrtc::{Compiled, Nvrtc};
pub use page_cache::{FreshPage, PageCache, PageStats, Pinned};
pub use rates::{Rate, Rates};
pub use registry::{BUDGETS, Budget, kernels, kernels_for};
pub use select::{
    BlockScorer, BlockSelector, ListBuilder, ListCall, PageScoreCall, PageScoreItem, PageScorer, ScoreCall,
    SelectCall, SelectGuards, Selector, StripeMeans, VisitBuilder, VisitCall, most_visits,
};
pub use tile::{
    AppendCall, Checksums, MeanBuilder, MeanOutputs, PageElement, PageQuantiser, PageShape, PageTranscoder,
    RowAppender, page_of, tile_of,
};
pub use version::Version;
