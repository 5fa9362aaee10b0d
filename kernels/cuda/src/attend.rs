//! Attention on the device.

mod decode;
mod merge;

use crate::Kernel;

pub use decode::{DecodeAttention, DecodeCall, DecodeItem, split_keys};
pub use merge::{MergeItem, PartialMerger};

/// Kernels of decode attention and merges.
pub(crate) fn kernels() -> Vec<Kernel> {
    [decode::all_kernels(), merge::all_kernels()].concat()
}
