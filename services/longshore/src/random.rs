//! Reproducible numbers (SplitMix64): the same seed gives the same choices on every machine.

/// A stream of numbers that its seed fixes.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// The stream of a seed.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The stream of a sample of a task: streams of different tasks, lengths or samples have nothing in common.
    pub(crate) fn of(task: &str, numbers: &[u64]) -> Self {
        let mut random = Self(0x6c6f_6e67_7368_6f72);
        for word in task.bytes().map(u64::from).chain(numbers.iter().copied()) {
            random.0 ^= word;
            random.0 = random.next();
        }
        random
    }

    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 to `count - 1`, about uniform; `count` > 0.
    pub(crate) fn below(&mut self, count: usize) -> usize {
        ((u128::from(self.next()) * count as u128) >> 64) as usize
    }

    /// Uniform in [0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Of mean 0 and deviation 1 (Box and Muller).
    pub(crate) fn normal(&mut self) -> f32 {
        let (length, turns) = (1.0 - self.unit(), self.unit());
        ((-2.0 * length.ln()).sqrt() * (turns * std::f64::consts::TAU).cos()) as f32
    }

    /// One of some; there must be one.
    pub(crate) fn choose<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// Brings them into random order.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for end in (1..items.len()).rev() {
            items.swap(end, self.below(end + 1));
        }
    }

    /// `count` different numbers below `limit`, in random order; `count` ≤ `limit`.
    pub(crate) fn distinct(&mut self, count: usize, limit: usize) -> Vec<usize> {
        assert!(count <= limit, "{count} different numbers below {limit}");
        let mut seen = std::collections::HashSet::with_capacity(count);
        let mut chosen = Vec::with_capacity(count);
        // Floyd's: each of the last `count` numbers admits one more.
        for top in limit - count..limit {
            let candidate = self.below(top + 1);
            let number = if seen.insert(candidate) { candidate } else { top };
            seen.insert(number);
            chosen.push(number);
        }
        self.shuffle(&mut chosen);
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_fixed_and_in_range() {
        let mut random = Random::of("needle", &[4096, 0]);
        assert_eq!(random.clone().next(), random.clone().next());
        assert_ne!(random.next(), Random::of("needle", &[4096, 1]).next());
        assert_ne!(Random::of("a", &[]).next(), Random::of("b", &[]).next());
        for _ in 0..1000 {
            assert!(random.below(7) < 7 && (0.0..1.0).contains(&random.unit()));
        }
        let normal: Vec<f64> = (0..20_000).map(|_| f64::from(random.normal())).collect();
        let moment = |power| normal.iter().map(|x| x.powi(power)).sum::<f64>() / normal.len() as f64;
        assert!(moment(1).abs() < 0.03 && (moment(2) - 1.0).abs() < 0.05, "{} {}", moment(1), moment(2));
        for count in [0, 1, 5, 10] {
            let mut chosen = random.distinct(count, 10);
            chosen.sort_unstable();
            chosen.dedup();
            assert!(chosen.len() == count && chosen.iter().all(|&n| n < 10));
        }
    }
}
