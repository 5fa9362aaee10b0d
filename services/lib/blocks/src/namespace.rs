//! Digests of everything that a KV value depends on.

/// Fingerprint of the prefill policy that visits everything.
pub const EXACT_PREFILL: &str = "exact";

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
    /// Arithmetic of the linear layers, for example `int8`: K and V are results of it.
    pub linear: &'a str,
}

/// Digest of [`DeploymentParts`]. Processes of unequal deployment refuse each other.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Deployment([u8; 32]);

/// A deployment mixed with a prefill policy and a tenant salt: the root of that tenant's block keys.
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
        // The policy was part of the deployment before requests chose it; the digest stays what it was.
        field(&mut hasher, EXACT_PREFILL.as_bytes());
        // Deployments from before there was a choice computed in f32 and keep their digest.
        if parts.linear != "f32" {
            field(&mut hasher, parts.linear.as_bytes());
        }
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

    /// The namespace of what a prefill policy makes for the tenant with this salt; an empty salt is the tenant of everybody
    /// without one. Approximate KV never passes for exact: each fingerprint has its own.
    pub fn namespace(&self, policy_fingerprint: &str, tenant_salt: &[u8]) -> Namespace {
        let mut hasher = blake3::Hasher::new_derive_key("longshore.v1 namespace");
        field(&mut hasher, &self.0);
        field(&mut hasher, tenant_salt);
        // Namespaces from before there was a choice are those of exact KV and keep their digest.
        if policy_fingerprint != EXACT_PREFILL {
            field(&mut hasher, policy_fingerprint.as_bytes());
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    const PARTS: DeploymentParts<'_> = DeploymentParts {
        model: &[7; 32],
        position: "rope",
        representation: "f16",
        block_tokens: 64,
        stripe_blocks: 32,
        linear: "f32",
    };

    #[test]
    fn every_part_changes_the_deployment() {
        let others = [
            DeploymentParts { model: &[8; 32], ..PARTS },
            DeploymentParts { position: "ropef", ..PARTS },
            DeploymentParts { representation: "f32", ..PARTS },
            DeploymentParts { block_tokens: 32, ..PARTS },
            DeploymentParts { stripe_blocks: 64, ..PARTS },
            DeploymentParts { linear: "int8", ..PARTS },
            // The end of one part is not the beginning of the next.
            DeploymentParts { position: "rop", representation: "ef16", ..PARTS },
        ];
        let mut digests: Vec<_> = others.iter().map(Deployment::new).collect();
        digests.push(Deployment::new(&PARTS));
        for (at, digest) in digests.iter().enumerate() {
            assert!(!digests[..at].contains(digest), "{at}");
        }
    }

    #[test]
    fn every_salt_has_its_own_namespace_and_none_is_the_deployment() {
        let deployment = Deployment::new(&PARTS);
        let spaces =
            [&b""[..], b"a", b"b", b"aa", b"\0"].map(|salt| deployment.namespace(EXACT_PREFILL, salt));
        for (at, space) in spaces.iter().enumerate() {
            assert!(!spaces[..at].contains(space), "{at}");
            assert_ne!(space.as_bytes(), deployment.as_bytes());
        }
    }

    #[test]
    fn every_policy_has_its_own_namespace_for_every_salt() {
        let deployment = Deployment::new(&PARTS);
        // Pairs that read alike one after the other, in either order, among them.
        let pairs = [
            (EXACT_PREFILL, ""),
            (EXACT_PREFILL, "exact"),
            (EXACT_PREFILL, "balanced"),
            (EXACT_PREFILL, "ab"),
            ("", "exact"),
            ("", "ab"),
            ("balanced", ""),
            ("balanced", "exact"),
            ("a", "b"),
            ("ab", ""),
            ("b", "a"),
            ("ba", ""),
            ("a", "bc"),
            ("ab", "c"),
            ("abc", ""),
        ];
        let spaces = pairs.map(|(policy, salt)| deployment.namespace(policy, salt.as_bytes()));
        for (at, space) in spaces.iter().enumerate() {
            assert!(!spaces[..at].contains(space), "{:?}", pairs[at]);
        }
        // Not even a salt that spells out how a policy is appended.
        let mut forged = 8u64.to_le_bytes().to_vec();
        forged.extend_from_slice(b"balanced");
        assert_ne!(deployment.namespace(EXACT_PREFILL, &forged), deployment.namespace("balanced", b""));
    }

    #[test]
    fn exact_keeps_the_digests_that_it_had_before_there_was_a_choice() {
        let deployment = Deployment::new(&PARTS);
        let hex = |bytes: &[u8; 32]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(
            hex(deployment.as_bytes()),
            "8ce56d63a21a12b577d88430af8cf1b91229965a7b4f31b05de44216afeac53a"
        );
        assert_eq!(
            hex(deployment.namespace(EXACT_PREFILL, b"").as_bytes()),
            "31c864632b95b4e35ceb41b6bee21e4a97686e13afe755f41d522a9b1898d23f"
        );
        assert_eq!(
            hex(deployment.namespace(EXACT_PREFILL, b"tenant").as_bytes()),
            "1237831faa03c87983633eeb10794a73fce2e4d76a7608d7dd19d1aaf90dfb1d"
        );
    }

    #[test]
    fn logs_never_show_a_whole_namespace() {
        let shown = format!("{:?}", Deployment::new(&PARTS).namespace(EXACT_PREFILL, b"secret"));
        assert!(shown.len() < 24, "{shown}");
    }
}
