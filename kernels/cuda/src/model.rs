//! The forward pass on a device: [`CudaBackend`]. Rows stay there between calls; nothing waits for the device but `qkv` and `logits`, which
//! bring results to the host.
//!
//! # Arithmetic
//!
//! The residual stream, queries, keys and values are f32. Linear layers take rows and weights in the backend's [`Precision`] and add
//! up in f32. A row's bits depend on nothing but the row: every kernel works on rows by themselves, and a linear layer has one order
//! of addition, whichever kernel computes it (ADR 17); a library, where one is used, gives that up.

mod activations;
mod backend;
pub(crate) mod checks;
mod choose;
mod compute;
mod cublaslt;
mod heads;
mod layer;
mod linear;
mod load;
mod pack;
mod programs;
mod rotations;
mod rows;
mod scratch;
mod upload;

pub use activations::KeptRows;
pub use backend::CudaBackend;
pub use cublaslt::CublasLt;
pub use heads::Append;
pub use layer::CudaLinear;
pub use linear::{Product, Products};
pub use load::ModelOptions;
pub use programs::Precision;

pub(crate) use programs::kernels;

use crate::Error;

/// A fault of the device, for callers of a backend.
fn failed(error: Error) -> longshore_model::Error {
    longshore_model::Error::Device { exhausted: error.retryable(), source: Box::new(error) }
}

fn invalid(field: &str, problem: String) -> longshore_model::Error {
    longshore_model::Error::Invalid { field: field.to_owned(), problem }
}
