//! Selection against slow rules, and a whole plan against the CPU's.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::{
    BlockSelector, Buffer, Device, Error, ListBuilder, ListCall, SelectCall, SelectGuards, Selector,
};

use super::material::{Random, differing};

/// A selector, and the most that it may keep.
pub(super) type Rule = (Selector, u32);

/// Levels of energies of which some are NaN.
pub(super) const WITH_NAN: usize = 7;

/// Lists of one comparison: energies of some tiles of some heads.
struct Lists {
    kv_heads: usize,
    /// (scored, seen) of each tile.
    ends: Vec<(usize, usize)>,
    stride: usize,
    energies: Vec<f32>,
    peaks: Vec<f32>,
    always: Vec<u32>,
}

impl Lists {
    /// Energies of so many levels, 0: all different; some −∞, and at [`WITH_NAN`] some NaN.
    fn random(kv_heads: usize, ends: Vec<(usize, usize)>, levels: usize) -> Self {
        let mut random = Random(51 + levels as u64);
        let most = ends.iter().map(|end| end.1).max().unwrap_or(0);
        let (stride, words) = (most + 3, most.div_ceil(32));
        let count = kv_heads * ends.len() * stride;
        let mut energies: Vec<f32> = match levels {
            0 => random.numbers(count, 12.0),
            levels => (0..count).map(|_| random.below(levels) as f32 - 2.0).collect(),
        };
        energies.iter_mut().step_by(37).for_each(|energy| *energy = f32::NEG_INFINITY);
        if levels == WITH_NAN {
            let nan = |index| if index % 2 == 0 { f32::NAN } else { -f32::NAN };
            energies.iter_mut().step_by(41).zip(0..).for_each(|(energy, index)| *energy = nan(index));
        }
        let peaks = random.numbers(count, 4.0);
        let always =
            (0..kv_heads * words).map(|_| (random.next() & random.next() & random.next()) as u32).collect();
        Self { kv_heads, ends, stride, energies, peaks, always }
    }

    fn words(&self) -> usize {
        // One more than needed, so that what lies behind a list is seen to be empty.
        self.ends.iter().map(|end| end.1).max().unwrap_or(0).div_ceil(32)
    }

    /// Which blocks a list visits, by the rules as they are written.
    fn wanted(&self, list: usize, (selector, most): Rule, guards: &SelectGuards) -> Vec<u32> {
        let (scored, seen) = self.ends[list % self.ends.len()];
        let energies = &self.energies[list * self.stride..][..scored];
        let peaks = &self.peaks[list * self.stride..][..scored];
        let always = &self.always[list / self.ends.len() * self.words()..][..self.words()];
        let mut blocks: BTreeSet<usize> = kept(selector, energies).into_iter().take(most as usize).collect();
        blocks.extend((0..scored).filter(|&block| {
            block < guards.sink as usize
                || block + guards.local as usize >= scored
                || guards.peak.is_some_and(|share| peaks[block] >= share.log2())
                || always[block / 32] >> (block % 32) & 1 == 1
        }));
        blocks.extend(scored..seen);
        blocks.into_iter().map(|block| block as u32).collect()
    }
}

/// What a selector keeps, the heaviest first: sorts, adds up. What cannot be compared is the heaviest.
fn kept(selector: Selector, energies: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..energies.len()).collect();
    let weight = |block: usize| if energies[block].is_nan() { f32::NAN } else { energies[block] };
    order.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)).then(b.cmp(&a)));
    let largest = energies.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    match selector {
        Selector::Alpha(alpha) => {
            let least = largest + alpha.log2();
            order.retain(|&block| energies[block] >= least || (energies[block] - least).is_nan());
            order
        }
        Selector::TopK(count) => {
            order.truncate(count as usize);
            order
        }
        Selector::Mass(share) if share >= 1.0 => order,
        Selector::Mass(share) => {
            let weight = |block: usize| f64::from(energies[block] - largest).exp2();
            let wanted = f64::from(share) * order.iter().map(|&block| weight(block)).sum::<f64>();
            let mut reached = 0.0;
            order.retain(|&block| {
                // What cannot be weighed is visited.
                let more = wanted.is_nan() || reached < wanted;
                reached += weight(block);
                more
            });
            order
        }
    }
}

/// Blocks, counts and offsets of lists that differ from the rules'.
pub(super) fn select(device: &Arc<dyn Device>, rule: Rule, levels: usize) -> Result<f64, Error> {
    let ends = vec![(0, 1), (1, 3), (31, 33), (32, 33), (257, 259), (600, 603)];
    let lists = Lists::random(2, ends, levels);
    let guards = SelectGuards { sink: 2, local: 3, peak: Some(0.9) };
    let plain = SelectGuards { sink: 0, local: 0, peak: None };
    Ok(differing_lists(device, &lists, rule, &guards, true)?
        + differing_lists(device, &lists, rule, &plain, false)?)
}

fn differing_lists(
    device: &Arc<dyn Device>,
    lists: &Lists,
    (selector, most): Rule,
    guards: &SelectGuards,
    with_always: bool,
) -> Result<f64, Error> {
    let (tiles, words) = (lists.ends.len(), lists.words() + 1);
    let count = lists.kv_heads * tiles;
    // The device's rows of words are one longer.
    let mut always = Vec::new();
    for head in lists.always.chunks_exact(lists.words()) {
        always.extend(head.iter().map(|&word| if with_always { word } else { 0 }));
        always.push(0);
    }
    let cleared = Lists {
        always: lists.always.iter().map(|&word| if with_always { word } else { 0 }).collect(),
        ends: lists.ends.clone(),
        energies: lists.energies.clone(),
        peaks: lists.peaks.clone(),
        ..*lists
    };
    let wanted: Vec<Vec<u32>> =
        (0..count).map(|list| cleared.wanted(list, (selector, most), guards)).collect();
    let total: usize = wanted.iter().map(Vec::len).sum();
    let energies = Buffer::from_slice(device, &lists.energies)?;
    let peaks = Buffer::from_slice(device, &lists.peaks)?;
    let always = Buffer::from_slice(device, &always)?;
    let ends: Vec<u32> = lists.ends.iter().flat_map(|end| [end.0 as u32, end.1 as u32]).collect();
    let ends = Buffer::from_slice(device, &ends)?;
    let bits = Buffer::from_slice(device, &vec![u32::MAX; count * words])?;
    let counts = Buffer::from_slice(device, &vec![u32::MAX; count])?;
    let offsets = Buffer::from_slice(device, &vec![u64::MAX; count + 1])?;
    let blocks = Buffer::from_slice(device, &vec![u32::MAX; count * lists.stride])?;
    BlockSelector::new(device).launch(&SelectCall {
        energies: energies.whole(),
        peaks: Some(peaks.whole()),
        always: with_always.then(|| always.whole()),
        ends: ends.whole(),
        bits: bits.whole(),
        counts: counts.whole(),
        kv_heads: lists.kv_heads,
        tiles,
        stride: lists.stride,
        words,
        selector,
        most,
        guards: *guards,
    })?;
    let builder = ListBuilder::new(device);
    let call = ListCall { counts: counts.whole(), bits: bits.whole(), lists: count, words };
    builder.offsets(&call, offsets.whole())?;
    builder.blocks(&call, offsets.whole(), blocks.whole())?;
    let mut off =
        differing(&counts.to_vec::<u32>()?, &wanted.iter().map(|list| list.len() as u32).collect::<Vec<_>>());
    let mut expected = vec![0_u64];
    expected.extend(wanted.iter().scan(0, |end, list| {
        *end += list.len() as u64;
        Some(*end)
    }));
    off += differing(&offsets.to_vec::<u64>()?, &expected);
    let set: u32 = bits.to_vec::<u32>()?.iter().map(|word| word.count_ones()).sum();
    off += f64::from(set.abs_diff(total as u32));
    let found = blocks.to_vec::<u32>()?;
    Ok(off + differing(&found[..total], &wanted.concat()))
}
