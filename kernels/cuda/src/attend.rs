//! Attention on the device.

mod decode;
mod merge;

pub use decode::{DecodeAttention, DecodeCall, DecodeItem, split_keys};
pub use merge::{MergeItem, PartialMerger};
