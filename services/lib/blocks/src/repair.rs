//! What the holder of a block does about its other copies: nothing, push it to owners that lack it, or drop its own. Each shard
//! decides by itself from what it was told; nobody coordinates. Pure: time is an argument, and whoever asks and sends lives
//! elsewhere.

#[cfg(test)]
mod tests;

/// What is known of a block on one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holding {
    /// It said that it holds the block.
    Held,
    /// It said that it does not.
    Lacking,
    /// It gave no answer.
    Unknown,
}

/// What to do about one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// As many copies as wanted lie where they belong, or somebody else sees to it.
    Nothing,
    /// Send it to these shards.
    Push(Vec<usize>),
    /// Drop the own copy: all owners hold theirs.
    Drop,
}

/// What holder `me` of a block does. `owners` are where its copies belong now, best first, among the shards that live;
/// `asked` are all shards that were asked about it, best first, owners included; `copies` is how many there should be.
///
/// The first holder in the order of `asked` pushes, so that one shard sends and not all of them. A shard drops its copy only
/// when `copies` shards that come before it said that they hold theirs: whatever different shards believe of who lives, the
/// first `copies` holders of a block never drop it.
pub fn next_step(
    me: usize,
    owners: &[usize],
    asked: &[usize],
    copies: usize,
    holding: impl Fn(usize) -> Holding,
) -> Step {
    let others = || owners.iter().copied().filter(|&owner| owner != me);
    let lacking: Vec<usize> = others().filter(|&owner| holding(owner) == Holding::Lacking).collect();
    if !lacking.is_empty() {
        let first = asked.iter().copied().find(|&shard| shard == me || holding(shard) == Holding::Held);
        return if first.is_none_or(|first| first == me) { Step::Push(lacking) } else { Step::Nothing };
    }
    let surplus = !owners.contains(&me) && owners.len() >= copies;
    if surplus && others().all(|owner| holding(owner) == Holding::Held) { Step::Drop } else { Step::Nothing }
}

/// Bytes per second that background work may take, with a burst of one second.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    bytes_per_second: u64,
    /// When what was taken so far is paid for, microseconds.
    paid_at_us: u64,
}

impl Rate {
    /// A rate of at least 1.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), paid_at_us: 0 }
    }

    /// Takes `bytes` at `now_us` (microseconds from any fixed start) and says how long to wait, in microseconds, before they may be
    /// sent. A single request larger than the burst waits for what came before it, never for itself.
    pub fn take(&mut self, bytes: u64, now_us: u64) -> u64 {
        const BURST_US: u64 = 1_000_000;
        let wait_us = self.paid_at_us.saturating_sub(now_us.saturating_add(BURST_US));
        let cost_us = u128::from(bytes) * 1_000_000 / u128::from(self.bytes_per_second);
        let cost_us = u64::try_from(cost_us).unwrap_or(u64::MAX);
        self.paid_at_us = self.paid_at_us.max(now_us).saturating_add(cost_us);
        wait_us
    }
}
