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
