//! A trace for machines that have no recorded one.

use super::read::{Request, Trace, TraceError};
use crate::random::Random;

/// Blocks that all prompts begin with.
const SYSTEM_BLOCKS: usize = 2;
/// Half of all turns that are followed by another one are within this time: people read and write.
const THINK_MS: f64 = 120_000.0;
/// Mean time between new sessions.
const ARRIVAL_MS: f64 = 400.0;

/// Sessions that share a system prompt; the more turns a session has, the likelier it has another one, longer by an answer and a question.
/// The same seed gives the same trace.
pub(super) fn generate(requests: usize, block_tokens: u64, seed: u64) -> Result<Trace, TraceError> {
    let mut random = Random::of("bench trace", &[seed]);
    let mut last_block = SYSTEM_BLOCKS as u64 - 1;
    let mut made: Vec<Request> = Vec::with_capacity(requests);
    let mut now = 0.0;
    let mut turns: Vec<Request> = Vec::new();
    // Enough sessions that cutting the last turns off leaves the number that was asked for.
    while made.len() < requests {
        now += -ARRIVAL_MS * (1.0 - random.unit()).ln();
        let mut blocks: Vec<u64> = (0..SYSTEM_BLOCKS as u64).collect();
        let mut at = now;
        let mut growth = 1 + (8.0 * -(1.0 - random.unit()).ln()) as usize;
        loop {
            blocks.extend((0..growth).map(|step| last_block + 1 + step as u64));
            last_block += growth as u64;
            let input_tokens = blocks.len() as u64 * block_tokens;
            turns.push(Request { timestamp_ms: at as u64, input_tokens, blocks: blocks.clone() });
            if random.unit() > (0.15 + 0.15 * turns.len() as f64).min(0.65) {
                break;
            }
            at += -THINK_MS * (1.0 - random.unit()).ln() / std::f64::consts::LN_2;
            growth = 1 + random.below(4);
        }
        made.append(&mut turns);
    }
    made.sort_by_key(|request| request.timestamp_ms);
    made.truncate(requests);
    Trace::of(made, block_tokens)
}
