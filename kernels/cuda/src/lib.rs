//! The same operations on the GPU: kernels in CUDA C++ (`kernels/cuda/source`), compiled at run time, and what starts them.
//! Knows no network, no async. Design: `docs/cuda.md`.

mod attend;
mod buffer;
mod device;
mod error;
mod kernel;
mod select;
pub mod selftest;
mod tile;

pub use attend::{
    DecodeAttention, DecodeCall, DecodeItem, DenseKeys, KeyColumn, KeyLists, KeyVisit, MeanPages, MergeItem,
    PartialMerger, PrefillAttention, PrefillCall, split_keys,
};
pub use buffer::Buffer;
pub use device::Device;
pub use error::{Error, Kind};
pub use kernel::{Kernel, Launch, Source};
pub use select::{
    BlockScorer, BlockSelector, ListBuilder, ListCall, PageScoreCall, PageScoreItem, PageScorer, ScoreCall,
    SelectCall, SelectGuards, Selector,
};
pub use tile::{
    Checksums, MeanBuilder, MeanOutputs, PageElement, PageQuantiser, PageShape, PageTranscoder, page_of,
    tile_of,
};
