//! Members and models.

use super::WireTileShape;

mod convert;

/// What a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Front door.
    Router,
    /// Computes KV.
    Prefill,
    /// Generates.
    Decode,
    /// Holds KV.
    KvStore,
}

/// One process of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Unique in the cluster.
    pub id: String,
    /// What it does.
    pub role: Role,
    /// `http://host:port`, or `local:id`.
    pub address: String,
    /// Changes with every start.
    pub incarnation: u64,
    /// Share of blocks; only for shards.
    pub weight: u32,
    /// Whether the observer can reach it.
    pub healthy: bool,
    /// Machine that it fails with; empty: one of its own.
    pub host: String,
    /// Part of the site that it fails with; empty: none that is known.
    pub zone: String,
}

/// A model and its shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelDescription {
    /// Name to ask for.
    pub name: String,
    /// Architecture as the weights name it.
    pub architecture: String,
    /// Positions that the deployment accepts.
    pub max_context_tokens: u64,
    /// Entries of the vocabulary.
    pub vocabulary: u32,
    /// Shape of its tiles.
    pub tile_shape: WireTileShape,
    /// KV bytes of one token over all layers.
    pub kv_bytes_per_token: u64,
    /// What its KV depends on.
    pub deployment: longshore_blocks::Deployment,
}

/// A process and its view of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Describe {
    /// This process.
    pub this: Member,
    /// Everybody that it knows.
    pub members: Vec<Member>,
    /// Epoch of its membership.
    pub epoch: u64,
    /// Models that it serves.
    pub models: Vec<ModelDescription>,
    /// Version of the program.
    pub version: String,
}
