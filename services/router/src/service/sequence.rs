//! The tokens of one request, their block keys and where their blocks lie.

use longshore_blocks::{Geometry, KeyChain, Namespace};
use tokio::sync::mpsc;

/// Most token ids in one chunk on the wire.
const CHUNK_TOKENS: usize = 65_536;

/// Prompt and answer so far.
#[derive(Debug)]
pub(crate) struct Sequence {
    tokens: Vec<u32>,
    prompt_tokens: usize,
    chain: KeyChain,
    geometry: Geometry,
}

impl Sequence {
    /// Hashes the whole prompt; call it off the reactor for long ones.
    pub(crate) fn new(namespace: Namespace, geometry: Geometry, prompt: Vec<u32>) -> Self {
        let mut chain = KeyChain::new(namespace, geometry);
        chain.push(&prompt);
        Self { prompt_tokens: prompt.len(), tokens: prompt, chain, geometry }
    }

    /// Appends a generated token.
    pub(crate) fn push(&mut self, token: u32) {
        self.tokens.push(token);
        self.chain.push(&[token]);
    }

    /// Tokens of the prompt.
    pub(crate) fn prompt_tokens(&self) -> u64 {
        self.prompt_tokens as u64
    }

    /// Tokens generated so far.
    pub(crate) fn generated_tokens(&self) -> u64 {
        (self.tokens.len() - self.prompt_tokens) as u64
    }

    /// Tokens in all.
    pub(crate) fn total_tokens(&self) -> u64 {
        self.tokens.len() as u64
    }

    /// Blocks that the store must hold before the next token can be decoded.
    pub(crate) fn stored_blocks(&self) -> u64 {
        self.geometry.stored_blocks(self.total_tokens())
    }

    /// Tokens of the first `blocks` blocks.
    pub(crate) fn tokens_of(&self, blocks: u64) -> u64 {
        blocks * u64::from(self.geometry.block_tokens())
    }

    /// The chain of block keys.
    pub(crate) fn chain(&self) -> &KeyChain {
        &self.chain
    }

    /// All tokens as a closed stream of chunks. They are queued at once: the queue is as long as the sequence, which the
    /// context limit bounds, and no task is needed to feed it.
    pub(crate) fn chunks(&self) -> mpsc::Receiver<Vec<u32>> {
        let (sender, receiver) = mpsc::channel(self.tokens.len().div_ceil(CHUNK_TOKENS).max(1));
        for chunk in self.tokens.chunks(CHUNK_TOKENS) {
            sender.try_send(chunk.to_vec()).expect("the queue has room for every chunk");
        }
        receiver
    }
}

#[cfg(test)]
mod tests {
    use longshore_blocks::{Deployment, EXACT_PREFILL};

    use super::*;

    fn sequence(tokens: u32) -> Sequence {
        let namespace = Deployment::from_bytes([7; 32]).namespace(EXACT_PREFILL, b"");
        Sequence::new(namespace, Geometry::new(16, 2).unwrap(), (0..tokens).collect())
    }

    #[test]
    fn leaves_the_last_token_to_the_decode_worker() {
        assert_eq!(sequence(16).stored_blocks(), 0);
        assert_eq!(sequence(17).stored_blocks(), 1);
    }

    #[tokio::test]
    async fn chunks_carry_everything_in_order() {
        let sequence = sequence(CHUNK_TOKENS as u32 + 5);
        let mut chunks = sequence.chunks();
        let mut seen = Vec::new();
        while let Some(chunk) = chunks.recv().await {
            assert!(chunk.len() <= CHUNK_TOKENS);
            seen.extend(chunk);
        }
        assert_eq!(seen, (0..CHUNK_TOKENS as u32 + 5).collect::<Vec<_>>());
    }
}
