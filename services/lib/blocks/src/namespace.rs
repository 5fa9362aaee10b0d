//! Digests of everything that a KV value depends on.

/// What the KV of a deployment depends on, before any tenant salt.
#[derive(Debug, Clone, Copy)]
pub struct DeploymentParts<'a> {
    /// Digest of weights, tokenizer and the model's own configuration.
    pub model: &'a [u8; 32],
    /// Position policy: RoPE scaling as it is applied, in a stable text form.
    pub position: &'a str,
    /// KV representation, for example `f16`.
    pub representation: &'a str,
    /// Token positions of a block.
    pub block_tokens: u32,
    /// Stripe size; the order of summation depends on it.
    pub stripe_blocks: u32,
    /// Fingerprint of the prefill policy, for example `exact`.
    pub prefill_policy: &'a str,
}

/// Digest of [`DeploymentParts`]. Processes of unequal deployment refuse each other.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Deployment([u8; 32]);

/// A deployment mixed with a tenant salt: the root of that tenant's block keys.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Namespace([u8; 32]);

impl Deployment {
    /// Hashes the parts, each with its length in front.
    pub fn new(parts: &DeploymentParts<'_>) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("longshore.v1 deployment");
        field(&mut hasher, parts.model);
        field(&mut hasher, parts.position.as_bytes());
        field(&mut hasher, parts.representation.as_bytes());
        field(&mut hasher, &parts.block_tokens.to_le_bytes());
        field(&mut hasher, &parts.stripe_blocks.to_le_bytes());
        field(&mut hasher, parts.prefill_policy.as_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    /// Wraps a digest that came over the wire.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The digest.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The namespace of the tenant with this salt; an empty salt is the tenant of everybody without one.
    pub fn namespace(&self, tenant_salt: &[u8]) -> Namespace {
        let mut hasher = blake3::Hasher::new_derive_key("longshore.v1 namespace");
        field(&mut hasher, &self.0);
        field(&mut hasher, tenant_salt);
        Namespace(*hasher.finalize().as_bytes())
    }
}

impl Namespace {
    /// Wraps a digest that came over the wire.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The digest.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

fn field(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

impl std::fmt::Debug for Deployment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Deployment({:02x}{:02x}{:02x}{:02x}…)", self.0[0], self.0[1], self.0[2], self.0[3])
    }
}

impl std::fmt::Debug for Namespace {
    /// Never prints the whole digest: it keys the tenant's hashes.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Namespace({:02x}{:02x}…)", self.0[0], self.0[1])
    }
}
