//! Attention on the device.

mod decode;
mod merge;
mod prefill;

pub use decode::{DecodeAttention, DecodeCall, DecodeItem, split_keys};
pub use merge::{MergeItem, PartialMerger};
pub use prefill::{DenseKeys, KeyColumn, KeyLists, KeyVisit, MeanPages, PrefillAttention, PrefillCall};
