//! Tiny models for tests, in this crate and in others: real GGUF files with random weights, written in milliseconds.
//!
//! Nothing here belongs to the product; it lies in the library so that the tests of every crate can reach it.

mod gguf;
mod tiny;

pub use gguf::{GgufWriter, MetadataValue, StoredType, WrittenTensor};
pub use tiny::{TinyArchitecture, TinyOptions, tiny_gguf, write_tiny_gguf};
