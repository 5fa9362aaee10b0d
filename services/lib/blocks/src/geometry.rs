//! How positions map to blocks and stripes.

use crate::Error;

/// Block and stripe sizes of a deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    block_tokens: u32,
    stripe_blocks: u32,
}

impl Geometry {
    /// `block_tokens` is a power of two from 16 to 256, `stripe_blocks` from 1 to 1,024.
    pub fn new(block_tokens: u32, stripe_blocks: u32) -> Result<Self, Error> {
        if !block_tokens.is_power_of_two() || !(16..=256).contains(&block_tokens) {
            return Err(Error::Invalid {
                field: "block_tokens",
                problem: format!("is {block_tokens}, must be a power of two from 16 to 256"),
            });
        }
        if !(1..=1024).contains(&stripe_blocks) {
            return Err(Error::Invalid {
                field: "stripe_blocks",
                problem: format!("is {stripe_blocks}, must be from 1 to 1024"),
            });
        }
        Ok(Self { block_tokens, stripe_blocks })
    }

    /// Token positions of a block.
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// Consecutive blocks that are placed together.
    pub fn stripe_blocks(&self) -> u32 {
        self.stripe_blocks
    }

    /// Full blocks among the first `tokens` positions.
    pub fn full_blocks(&self, tokens: u64) -> u64 {
        tokens / u64::from(self.block_tokens)
    }

    /// Stripe of a block.
    pub fn stripe_of(&self, block_index: u64) -> u64 {
        block_index / u64::from(self.stripe_blocks)
    }

    /// Blocks that the store must hold before a sequence of `tokens` can be decoded: every full block except that at
    /// least one token is left for the decode worker, whose logits start the answer.
    pub fn stored_blocks(&self, tokens: u64) -> u64 {
        self.full_blocks(tokens.saturating_sub(1))
    }
}

impl Default for Geometry {
    fn default() -> Self {
        Self { block_tokens: 64, stripe_blocks: 32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_sizes_out_of_range_by_name() {
        for (block, stripe, field) in [
            (0, 32, "block_tokens"),
            (8, 32, "block_tokens"),
            (48, 32, "block_tokens"),
            (512, 32, "block_tokens"),
            (64, 0, "stripe_blocks"),
            (64, 1025, "stripe_blocks"),
        ] {
            let error = Geometry::new(block, stripe).unwrap_err();
            assert!(matches!(error, Error::Invalid { field: named, .. } if named == field), "{error}");
        }
        assert!(Geometry::new(16, 1).is_ok() && Geometry::new(256, 1024).is_ok());
    }

    #[test]
    fn one_token_at_least_is_left_for_the_decode_worker() {
        let geometry = Geometry::default();
        let stored = |tokens| geometry.stored_blocks(tokens);
        assert_eq!([0, 1, 64, 65, 128, 129].map(stored), [0, 0, 0, 1, 1, 2]);
        for tokens in 1..1000 {
            let rest = tokens - stored(tokens) * 64;
            assert!((1..=64).contains(&rest), "{rest} of {tokens} tokens are left");
        }
    }

    #[test]
    fn stripes_follow_blocks() {
        let geometry = Geometry::new(16, 3).unwrap();
        assert_eq!([0, 2, 3, 5, 6].map(|block| geometry.stripe_of(block)), [0, 0, 1, 1, 2]);
        assert_eq!([0, 15, 16, 33].map(|tokens| geometry.full_blocks(tokens)), [0, 0, 1, 2]);
    }
}
