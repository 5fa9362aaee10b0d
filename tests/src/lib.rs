//! What the integration tests share: the tree as text, and the real program as a child process.

pub mod client;
pub mod draws;
pub mod fleet;
pub mod house;
pub mod mortal;
pub mod relay;
pub mod server;
pub mod store_client;
pub mod tree;
pub mod truth;
