//! Clients of a running cluster over gRPC: `longshore generate` and `longshore chat`.

mod chat;
mod generate;
mod stream;

pub(crate) use chat::chat;
pub(crate) use generate::generate;
