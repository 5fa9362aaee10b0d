//! How often keys were seen lately, in little room.

use crate::BlockKey;

const ROWS: usize = 4;
/// Largest count: 4 bits.
const COUNT_MAX: u8 = 15;
/// Keys counted between two agings, for each counter of a row.
const PERIOD_PER_COUNTER: u64 = 8;

/// A count-min sketch (Cormode and Muthukrishnan 2005) with counters of 4 bits that are halved from time to time, as TinyLFU
/// does: what was seen long ago fades. Counts are never too low before they are halved, too high when keys collide in all rows, and
/// at most 15.
#[derive(Debug, Clone)]
pub struct Sketch {
    /// Two counters a byte, row after row.
    counters: Vec<u8>,
    /// Counters of a row, a power of two.
    width: usize,
    seed: u64,
    added: u64,
}

impl Sketch {
    /// For about `keys` different keys at a time: between 2 and 4 bytes for each.
    pub fn new(keys: usize, seed: u64) -> Self {
        let width = keys.clamp(16, 1 << 40).next_power_of_two();
        Self { counters: vec![0; ROWS * width / 2], width, seed, added: 0 }
    }

    /// Counts a key once.
    pub fn add(&mut self, key: &BlockKey) {
        let places = self.places(key);
        let least = places.map(|place| self.at(place)).into_iter().min().unwrap_or(0);
        // Only the lowest counters of a key grow: those above it count others too.
        for place in places {
            if self.at(place) == least && least < COUNT_MAX {
                self.counters[place / 2] += 1 << (place % 2 * 4);
            }
        }
        self.added += 1;
        if self.added >= self.width as u64 * PERIOD_PER_COUNTER {
            self.age();
        }
    }

    /// About how often a key was seen lately.
    pub fn count(&self, key: &BlockKey) -> u8 {
        self.places(key).map(|place| self.at(place)).into_iter().min().unwrap_or(0)
    }

    /// Bytes of the counters.
    pub fn bytes(&self) -> usize {
        self.counters.len()
    }

    fn age(&mut self) {
        self.counters.iter_mut().for_each(|pair| *pair = (*pair >> 1) & 0x77);
        self.added /= 2;
    }

    fn at(&self, place: usize) -> u8 {
        self.counters[place / 2] >> (place % 2 * 4) & COUNT_MAX
    }

    fn places(&self, key: &BlockKey) -> [usize; ROWS] {
        let (low, high) = key.0.split_at(8);
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        let mixed = mix(word(low) ^ mix(word(high) ^ self.seed));
        std::array::from_fn(|row| {
            let hash = mix(mixed.wrapping_add(row as u64));
            row * self.width + (hash as usize & (self.width - 1))
        })
    }
}

/// The finaliser of SplitMix64.
fn mix(word: u64) -> u64 {
    let mut z = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
