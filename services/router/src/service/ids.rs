//! Names and seeds for requests that bring none.

use std::sync::atomic::{AtomicU64, Ordering};

/// Draws names and seeds from a counter and what makes this start of the process different from others.
#[derive(Debug)]
pub(crate) struct Ids {
    nonce: u64,
    next: AtomicU64,
}

impl Ids {
    /// `nonce` differs from start to start.
    pub(crate) fn new(nonce: u64) -> Self {
        Self { nonce, next: AtomicU64::new(0) }
    }

    /// A name that no other request of this process has.
    pub(crate) fn request(&self) -> String {
        let count = self.next.fetch_add(1, Ordering::Relaxed);
        format!("req-{:08x}-{count}", mix(self.nonce) as u32)
    }

    /// A seed for sampling.
    pub(crate) fn seed(&self) -> u64 {
        let count = self.next.fetch_add(1, Ordering::Relaxed);
        mix(self.nonce ^ mix(count))
    }
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood 2014): neighbouring inputs give unrelated outputs.
fn mix(input: u64) -> u64 {
    let word = input.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_and_seeds_do_not_repeat() {
        let (one, other) = (Ids::new(1), Ids::new(2));
        let names: HashSet<String> = (0..100).flat_map(|_| [one.request(), other.request()]).collect();
        assert_eq!(names.len(), 200);
        let seeds: HashSet<u64> = (0..100).flat_map(|_| [one.seed(), other.seed()]).collect();
        assert_eq!(seeds.len(), 200);
    }
}
