//! Selectors: which of the scored blocks a tile visits, by their energies (log2 of what they weigh).
//!
//! Where order matters it is total: the larger energy first, of equals the later block.

use crate::exp2::exp2;

use super::Selector;
use super::log2::log2;

/// Marks what `selector` keeps of the blocks with these energies; `blocks` begins with them.
pub(super) fn select(selector: Selector, energies: &[f32], blocks: &mut [bool]) {
    match selector {
        Selector::Alpha(alpha) => {
            let limit = largest(energies) + log2(alpha);
            for (block, &energy) in blocks.iter_mut().zip(energies) {
                // What cannot be compared is visited.
                *block |= energy >= limit || (energy - limit).is_nan();
            }
        }
        Selector::Mass(gamma) => mass(gamma, energies, blocks),
        Selector::TopK(k) => top_k(k, energies, blocks),
    }
}

fn largest(energies: &[f32]) -> f32 {
    energies.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The fewest blocks whose weights reach the share `gamma` of all; a share of 1 keeps all, however little they weigh.
fn mass(gamma: f32, energies: &[f32], blocks: &mut [bool]) {
    if gamma >= 1.0 {
        return blocks[..energies.len()].fill(true);
    }
    let top = largest(energies);
    let weight = |block: usize| f64::from(exp2(energies[block] - top));
    let wanted = f64::from(gamma) * (0..energies.len()).map(weight).sum::<f64>();
    let mut order: Vec<usize> = (0..energies.len()).collect();
    order.sort_unstable_by(|&a, &b| heavier(energies, a, b));
    let mut reached = 0.0;
    for block in order {
        if reached >= wanted {
            return;
        }
        reached += weight(block);
        blocks[block] = true;
    }
}

fn top_k(k: usize, energies: &[f32], blocks: &mut [bool]) {
    for block in heaviest(k, energies) {
        blocks[block as usize] = true;
    }
}

/// The `k` heaviest, in no order.
pub(super) fn heaviest(k: usize, weights: &[f32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..weights.len() as u32).collect();
    if k == 0 {
        order.clear();
    } else if k < order.len() {
        order.select_nth_unstable_by(k - 1, |&a, &b| heavier(weights, a as usize, b as usize));
        order.truncate(k);
    }
    order
}

fn heavier(weights: &[f32], a: usize, b: usize) -> std::cmp::Ordering {
    weights[b].total_cmp(&weights[a]).then(b.cmp(&a))
}

#[cfg(test)]
mod tests {
    use super::{Selector, select};

    #[track_caller]
    fn check(selector: Selector, energies: &[f32], kept: &[usize]) {
        let mut blocks = vec![false; energies.len()];
        select(selector, energies, &mut blocks);
        let found: Vec<usize> = (0..blocks.len()).filter(|&block| blocks[block]).collect();
        assert_eq!(found, kept, "{selector:?} of {energies:?}");
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

    #[test]
    fn top_k_prefers_later_blocks() {
        check(Selector::TopK(2), &[1.0, 5.0, 1.0, 1.0], &[1, 3]);
        check(Selector::TopK(9), &[1.0, 2.0], &[0, 1]);
        check(Selector::TopK(0), &[1.0], &[]);
    }
}
