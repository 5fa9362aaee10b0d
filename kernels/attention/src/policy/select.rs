//! Selectors: which of the scored blocks a tile visits, by their energies (log2 of what they weigh).
//!
//! Where order matters it is total: the larger energy first, of equals the later block.

use crate::exp2::exp2;

use super::Selector;
use super::log2::log2;

/// Marks what `selector` keeps of the blocks with these energies, the `most` heaviest of it; `blocks` begins with them.
pub(super) fn select(selector: Selector, most: usize, energies: &[f32], blocks: &mut [bool]) {
    match selector {
        Selector::Alpha(alpha) => self::alpha(alpha, most, energies, blocks),
        Selector::Mass(gamma) => mass(gamma, most, energies, blocks),
        Selector::TopK(k) => top_k(k.min(most), energies, blocks),
    }
}

/// The blocks within `alpha` of the heaviest.
fn alpha(alpha: f32, most: usize, energies: &[f32], blocks: &mut [bool]) {
    let limit = largest(energies) + log2(alpha);
    // What cannot be compared is visited.
    let near = |energy: &f32| *energy >= limit || (energy - limit).is_nan();
    if energies.iter().filter(|energy| near(energy)).count() > most {
        return top_k(most, energies, blocks);
    }
    blocks.iter_mut().zip(energies).for_each(|(block, energy)| *block |= near(energy));
}

fn largest(energies: &[f32]) -> f32 {
    energies.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The fewest blocks whose weights reach the share `gamma` of all; a share of 1 keeps all, however little they weigh.
fn mass(gamma: f32, most: usize, energies: &[f32], blocks: &mut [bool]) {
    if gamma >= 1.0 {
        return top_k(most, energies, blocks);
    }
    let top = largest(energies);
    let weight = |block: usize| f64::from(exp2(energies[block] - top));
    let wanted = f64::from(gamma) * (0..energies.len()).map(weight).sum::<f64>();
    let mut order = Places::of(energies);
    let (mut reached, mut kept, mut size) = (0.0, 0, FEW);
    loop {
        let next = order.heaviest(size);
        if next.len() == 0 {
            return;
        }
        for block in next {
            if reached >= wanted || kept == most {
                return;
            }
            reached += weight(block);
            kept += 1;
            blocks[block] = true;
        }
        size *= 4;
    }
}

fn top_k(k: usize, energies: &[f32], blocks: &mut [bool]) {
    for block in heaviest(k, energies) {
        blocks[block as usize] = true;
    }
}

/// The `k` heaviest, in no order.
pub(super) fn heaviest(k: usize, weights: &[f32]) -> Vec<u32> {
    let mut places = Places::of(weights).0;
    if k == 0 {
        places.clear();
    } else if k < places.len() {
        places.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
        places.truncate(k);
    }
    places.into_iter().map(|place| place as u32).collect()
}

/// How many of the heaviest blocks are looked at first: a selection leaves out most.
const FEW: usize = 64;

/// Blocks that were not taken yet. Each is a number, its weight above its index, so that the order of numbers is the order of
/// blocks.
struct Places(Vec<u64>);

impl Places {
    fn of(weights: &[f32]) -> Self {
        let place = |(block, weight): (usize, &f32)| {
            // What cannot be compared comes first, whatever its sign.
            let bits = if weight.is_nan() { f32::NAN.to_bits() } else { weight.to_bits() };
            // As `f32::total_cmp` orders them.
            let ordered = bits ^ if bits >> 31 == 1 { u32::MAX } else { 1 << 31 };
            u64::from(ordered) << 32 | block as u64
        };
        Self(weights.iter().enumerate().map(place).collect())
    }

    /// Takes the `count` heaviest, in order: the rest, often thousands, is never sorted.
    fn heaviest(&mut self, count: usize) -> impl ExactSizeIterator<Item = usize> {
        let first = self.0.len().saturating_sub(count);
        if first > 0 {
            self.0.select_nth_unstable(first);
        }
        let mut heaviest = self.0.split_off(first);
        heaviest.sort_unstable_by(|a, b| b.cmp(a));
        heaviest.into_iter().map(|place| place as u32 as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::{Selector, select};

    #[track_caller]
    fn check(selector: Selector, energies: &[f32], kept: &[usize]) {
        check_most(selector, usize::MAX, energies, kept);
    }

    #[track_caller]
    fn check_most(selector: Selector, most: usize, energies: &[f32], kept: &[usize]) {
        let mut blocks = vec![false; energies.len()];
        select(selector, most, energies, &mut blocks);
        let found: Vec<usize> = (0..blocks.len()).filter(|&block| blocks[block]).collect();
        assert_eq!(found, kept, "{selector:?}, at most {most} of {energies:?}");
    }

    #[test]
    fn alpha_keeps_what_is_near_the_largest() {
        check(Selector::Alpha(0.25), &[3.0, 1.0, 0.9, 2.0], &[0, 1, 3]);
        check(Selector::Alpha(1.0), &[3.0, 1.0, 3.0], &[0, 2]);
        check(Selector::Alpha(0.0), &[3.0, -1e30, f32::NEG_INFINITY], &[0, 1, 2]);
        check(Selector::Alpha(0.5), &[], &[]);
        check(Selector::Alpha(0.5), &[f32::NAN, 1.0, 0.0, -0.1], &[0, 1, 2]);
    }

    #[test]
    fn mass_keeps_the_fewest() {
        // Weights 8, 1, 4, 2 of 15.
        let energies = [3.0, 0.0, 2.0, 1.0];
        check(Selector::Mass(0.5), &energies, &[0]);
        check(Selector::Mass(0.6), &energies, &[0, 2]);
        check(Selector::Mass(0.9), &energies, &[0, 2, 3]);
        check(Selector::Mass(0.0), &energies, &[]);
        check(Selector::Mass(1.0), &[0.0, -500.0], &[0, 1]);
        check(Selector::Mass(0.3), &[1.0; 4], &[2, 3]);
    }

    /// More than are looked at first, against a full sort.
    #[test]
    fn many_blocks_are_kept_as_if_all_were_sorted() {
        for (step, count) in [(7, 64), (7, 65), (31, 300), (11, 1500)] {
            let energies: Vec<f32> = (0..count).map(|i| ((i * step % 97) as f32 - 60.0) / 8.0).collect();
            let top = energies.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weight = |block: usize| f64::from(crate::exp2::exp2(energies[block] - top));
            let mut order: Vec<usize> = (0..count).collect();
            order.sort_by(|&a, &b| energies[b].total_cmp(&energies[a]).then(b.cmp(&a)));
            let all: f64 = (0..count).map(weight).sum();
            for gamma in [0.01_f32, 0.5, 0.9, 0.999] {
                let mut reached = 0.0;
                let below = |block: &usize| {
                    let wanted = reached < f64::from(gamma) * all;
                    reached += weight(*block);
                    wanted
                };
                let mut kept: Vec<usize> = order.iter().copied().take_while(below).collect();
                kept.sort_unstable();
                check(Selector::Mass(gamma), &energies, &kept);
            }
            for k in [1, 64, 200] {
                let mut kept: Vec<usize> = order.iter().copied().take(k).collect();
                kept.sort_unstable();
                check(Selector::TopK(k), &energies, &kept);
            }
        }
        check(Selector::TopK(3), &[-0.0, 0.0, f32::NEG_INFINITY, f32::NAN, -1.0], &[0, 1, 3]);
    }

    #[test]
    fn the_heaviest_stay_where_more_are_kept_than_may_be() {
        let energies = [3.0, 1.0, 0.9, 2.0];
        for (most, kept) in [(0, &[][..]), (1, &[0]), (2, &[0, 3]), (3, &[0, 1, 3]), (4, &[0, 1, 3])] {
            check_most(Selector::Alpha(0.25), most, &energies, kept);
        }
        check_most(Selector::Mass(0.99), 2, &energies, &[0, 3]);
        check_most(Selector::Mass(0.1), 2, &energies, &[0]);
        check_most(Selector::Mass(1.0), 1, &energies, &[0]);
        check_most(Selector::TopK(4), 1, &energies, &[0]);
        check_most(Selector::Alpha(0.5), 1, &[f32::NAN, 1.0], &[0]);
        check_most(Selector::Alpha(0.5), 1, &[-f32::NAN, 1.0], &[0]);
        check_most(Selector::Mass(0.9), 2, &[0.0; 90], &[88, 89]);
    }

    #[test]
    fn top_k_prefers_later_blocks() {
        check(Selector::TopK(2), &[1.0, 5.0, 1.0, 1.0], &[1, 3]);
        check(Selector::TopK(9), &[1.0, 2.0], &[0, 1]);
        check(Selector::TopK(0), &[1.0], &[]);
    }
}
