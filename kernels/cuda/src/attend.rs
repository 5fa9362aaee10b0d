//! Attention on the device.

mod decode;
mod merge;
mod prefill;

use crate::Kernel;

pub use decode::{DecodeAttention, DecodeCall, DecodeItem, split_keys};
pub use merge::{MergeItem, PartialMerger};
pub use prefill::{DenseKeys, KeyColumn, KeyLists, KeyVisit, MeanPages, PrefillAttention, PrefillCall};

/// Kernels of decode attention and merges.
pub(crate) fn kernels() -> Vec<Kernel> {
    [decode::all_kernels(), merge::all_kernels()].concat()
}
