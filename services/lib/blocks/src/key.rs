//! Block keys: a keyed hash chain over token ids. They name what is stored, so their bytes never change.

#[cfg(test)]
mod tests;

use crate::{Geometry, Namespace};

/// 128-bit keyed BLAKE3 of (parent key, token ids). Equal keys mean equal KV bytes within one namespace.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockKey(pub [u8; 16]);

impl std::fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl std::fmt::Display for BlockKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// Incremental hashing of one sequence's tokens into block keys.
#[derive(Debug, Clone)]
pub struct KeyChain {
    namespace: Namespace,
    geometry: Geometry,
    keys: Vec<BlockKey>,
    pending: Vec<u32>,
}

impl KeyChain {
    /// An empty sequence.
    pub fn new(namespace: Namespace, geometry: Geometry) -> Self {
        Self { namespace, geometry, keys: Vec::new(), pending: Vec::new() }
    }

    /// Appends tokens; every block that they fill gets its key.
    pub fn push(&mut self, tokens: &[u32]) {
        let block = self.geometry.block_tokens() as usize;
        for &token in tokens {
            self.pending.push(token);
            if self.pending.len() == block {
                let key = self.next_key();
                self.keys.push(key);
                self.pending.clear();
            }
        }
    }

    fn next_key(&self) -> BlockKey {
        let mut hasher = blake3::Hasher::new_keyed(self.namespace.as_bytes());
        match self.keys.last() {
            Some(parent) => hasher.update(&parent.0),
            None => hasher.update(self.namespace.as_bytes()),
        };
        for token in &self.pending {
            hasher.update(&token.to_le_bytes());
        }
        let mut key = [0; 16];
        hasher.finalize_xof().fill(&mut key);
        BlockKey(key)
    }

    /// Keys of the full blocks so far.
    pub fn keys(&self) -> &[BlockKey] {
        &self.keys
    }

    /// Tokens so far.
    pub fn tokens(&self) -> u64 {
        self.keys.len() as u64 * u64::from(self.geometry.block_tokens()) + self.pending.len() as u64
    }

    /// Name of the stripe that block `index` lies in, from which its shard follows: the key of the last block before the
    /// stripe, or the namespace for the first one. Prompts that share a beginning thus share its shards, and a stripe
    /// can be placed before its blocks are known. The tokens before the stripe must have been pushed.
    pub fn stripe_seed(&self, index: u64) -> [u8; 32] {
        let stripe = self.geometry.stripe_of(index);
        let mut hasher = blake3::Hasher::new_keyed(self.namespace.as_bytes());
        hasher.update(b"stripe");
        if stripe > 0 {
            let last_before = stripe * u64::from(self.geometry.stripe_blocks()) - 1;
            let key = self.keys.get(last_before as usize);
            debug_assert!(
                key.is_some(),
                "block {index} is placed by the keys before its stripe, which are not known"
            );
            if let Some(key) = key {
                hasher.update(&key.0);
            }
        }
        *hasher.finalize().as_bytes()
    }
}
