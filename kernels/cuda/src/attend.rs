//! Attention on the device.

mod decode;
mod merge;
mod prefill;

use crate::Kernel;

pub use decode::{DecodeAttention, DecodeCall, DecodeItem, split_keys};
pub use merge::{MergeItem, PartialMerger};
pub use prefill::{
    CountedLists, CountedTile, DenseKeys, KeyColumn, KeyLists, KeyVisit, MeanPages, PrefillAttention,
    PrefillCall,
};

/// Kernels of attention and merges on devices of a compute capability.
pub(crate) fn kernels(capability: u32) -> Vec<Kernel> {
    [decode::kernels(capability), merge::all_kernels(), prefill::kernels(capability)].concat()
}
