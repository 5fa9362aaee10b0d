//! The wire: schemas, generated types, and our own types with checked conversions between the two.

#[allow(
    missing_docs,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::use_self,
    clippy::str_to_string,
    unreachable_pub,
    rust_2018_idioms,
    unused_lifetimes,
    missing_debug_implementations,
    reason = "generated code"
)]
/// Generated messages, clients and servers of `longshore.v1`.
pub mod v1 {
    tonic::include_proto!("longshore.v1");

    /// Encoded `FileDescriptorSet` of the schemas, for server reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/longshore.v1.bin"));
}

mod error;
pub mod types;

pub use error::{Kind, WireError};
