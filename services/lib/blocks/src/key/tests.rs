//! Keys as an independent implementation of BLAKE3 made them, and what must hold for all keys.

use proptest::prelude::*;

use super::*;
use crate::{Deployment, DeploymentParts, EXACT_PREFILL};

fn deployment() -> Deployment {
    Deployment::new(&DeploymentParts {
        model: &std::array::from_fn(|i| i as u8),
        position: "rope=plain",
        representation: "f16",
        block_tokens: 64,
        stripe_blocks: 32,
        linear: "f32",
    })
}

fn chain(namespace: Namespace, tokens: &[u32]) -> KeyChain {
    let mut chain = KeyChain::new(namespace, Geometry::default());
    chain.push(tokens);
    chain
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// 40 blocks of 64 tokens.
fn tokens() -> Vec<u32> {
    (0..64 * 40).map(|i: u64| (i * 2_654_435_761 % 49_152) as u32).collect()
}

#[test]
fn keys_and_seeds_never_change() {
    let deployment = deployment();
    assert_eq!(
        hex(deployment.as_bytes()),
        "5b80447d2b27dc5340ede1b3b83bdde2c3519ba84d3ecde62af7a6cd6c512c25"
    );
    let (everybody, tenant) =
        (deployment.namespace(EXACT_PREFILL, b""), deployment.namespace(EXACT_PREFILL, b"tenant"));
    assert_eq!(hex(everybody.as_bytes()), "22bf90310fe0fe5d093e088b42e84750a7248fca017926441c899c0be45f2f95");
    assert_eq!(hex(tenant.as_bytes()), "c8676cd873df17f580fb514dc848a7960769f3bd50ed5b9b9da2e63ab4f72030");

    let long = chain(everybody, &tokens());
    assert_eq!(long.keys().len(), 40);
    assert_eq!(long.keys()[0].to_string(), "14a3e8426c1cac429816f964e2b2306a");
    assert_eq!(long.keys()[1].to_string(), "2fb7ffdc657a36573d2b0d3ebad8cce0");
    assert_eq!(long.keys()[39].to_string(), "d4f4f9b9bb59b1fa4b5d9c6a3f8a9f69");
    assert_eq!(
        hex(&long.stripe_seed(31)),
        "43ed395c7902c14d0a0013b791cb77909db47996aff318a80f2efd29da6d49b1"
    );
    assert_eq!(
        hex(&long.stripe_seed(32)),
        "01f9c5489c75b36eb01f11eed0f457c33105993a3048052dc6c96d7d31d33a7c"
    );
    assert_eq!(chain(tenant, &tokens()).keys()[0].to_string(), "35a04ffcc48c44af41bddfae3dc553e9");
}

#[test]
fn a_stripe_is_placed_before_its_blocks_are_known() {
    let namespace = deployment().namespace(EXACT_PREFILL, b"");
    let (before, after) = (chain(namespace, &tokens()[..64 * 32]), chain(namespace, &tokens()));
    for block in [0, 31, 32, 39, 63] {
        assert_eq!(before.stripe_seed(block), after.stripe_seed(block), "block {block}");
    }
}

proptest! {
    #[test]
    fn chunks_make_no_difference(
        tokens in prop::collection::vec(any::<u32>(), 0..600),
        cuts in prop::collection::vec(0usize..600, 0..8),
    ) {
        let namespace = deployment().namespace(EXACT_PREFILL, b"");
        let whole = chain(namespace, &tokens);
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(tokens.len())).collect();
        cuts.extend([0, tokens.len()]);
        cuts.sort_unstable();
        let mut pieces = KeyChain::new(namespace, Geometry::default());
        cuts.windows(2).for_each(|pair| pieces.push(&tokens[pair[0]..pair[1]]));
        prop_assert_eq!(whole.keys(), pieces.keys());
        prop_assert_eq!(pieces.tokens(), tokens.len() as u64);
        prop_assert_eq!(pieces.keys().len(), tokens.len() / 64);
    }

    #[test]
    fn equal_prefixes_share_keys_and_nothing_after_a_difference_does(
        tokens in prop::collection::vec(0u32..50_000, 64..600),
        at in 0usize..600,
    ) {
        let namespace = deployment().namespace(EXACT_PREFILL, b"");
        let at = at % tokens.len();
        let mut other = tokens.clone();
        other[at] ^= 1;
        let (first, second) = (chain(namespace, &tokens), chain(namespace, &other));
        for (block, (a, b)) in first.keys().iter().zip(second.keys()).enumerate() {
            prop_assert_eq!(a == b, block < at / 64, "block {}, difference at token {}", block, at);
        }
    }

    #[test]
    fn tenants_never_share_keys_or_seeds(
        tokens in prop::collection::vec(0u32..50_000, 64..300),
        salts in prop::collection::btree_set(prop::collection::vec(any::<u8>(), 0..9), 2..6),
    ) {
        let chains: Vec<_> =
            salts.iter().map(|salt| chain(deployment().namespace(EXACT_PREFILL, salt), &tokens)).collect();
        for (at, one) in chains.iter().enumerate() {
            for other in &chains[..at] {
                prop_assert!(one.keys().iter().all(|key| !other.keys().contains(key)));
                prop_assert_ne!(one.stripe_seed(0), other.stripe_seed(0));
            }
        }
    }
}
