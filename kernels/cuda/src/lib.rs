//! The same operations on the GPU: kernels in CUDA C++ (`kernels/cuda/source`), compiled at run time, and what starts them.
//! Knows no network, no async. Design: `docs/cuda.md`.

mod buffer;
mod device;
mod error;
mod kernel;
mod model;

pub use buffer::Buffer;
pub use device::Device;
pub use error::{Error, Kind};
pub use kernel::{Kernel, Launch, Source};
pub use model::checks as model_checks;
pub use model::{
    Append, CUBLASLT_SYMBOLS, CublasLt, CudaBackend, CudaLinear, KeptRows, Likeliest, ModelOptions, Precision, Product,
    Products, Stream, kernels as model_kernels,
};
