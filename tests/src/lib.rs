//! What the integration tests share: the tree as text, and clusters in one process.

pub mod tree;
