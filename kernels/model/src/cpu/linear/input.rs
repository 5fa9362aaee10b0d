//! Rows of activations as the kernels read them: cut into blocks of at most 12 rows, the numbers of a block's rows beside one
//! another, quantised to int8 where the weights are quantised.

mod fine;

use std::cell::RefCell;

use longshore_compute::{ComputePool, DisjointSlice, InstructionSet};

use super::kernel;
use super::panels::GROUP;
use crate::cpu::versions::versions;

/// Rows of the largest block: 12 rows of integer and of f32 sums leave room for weights in 32 vector registers.
pub(super) const BLOCK_ROWS: usize = 12;
/// Words of a row and group: 8 of four quants each, the scale, scale times sum, and the negated sums of all inputs and of
/// the lower 16.
pub(super) const WORDS: usize = 12;
/// Where those lie.
pub(super) const SCALE: usize = 8;
pub(super) const SCALED_SUM: usize = 9;
pub(super) const NEGATED_SUM: usize = 10;
pub(super) const NEGATED_LOWER_SUM: usize = 11;

/// Elements that are worth a task of their own.
const TASK_ELEMENTS: usize = 16 * 1024;

/// What matrices want to read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::cpu) struct Forms {
    pub(in crate::cpu) int8: bool,
    pub(in crate::cpu) float: bool,
}

impl Forms {
    /// What either wants.
    pub(in crate::cpu) fn with(self, other: Self) -> Self {
        Self { int8: self.int8 || other.int8, float: self.float || other.float }
    }
}

/// Rows that are multiplied together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Block {
    /// First row.
    pub(super) first: usize,
    /// Rows; the rest up to `size` are zero.
    pub(super) rows: usize,
    /// Rows that the layout has room for: 1, 2, 3, 4, 6, 8 or 12.
    pub(super) size: usize,
}

/// Rows ready to be multiplied; keeps its memory from call to call.
#[derive(Debug, Default)]
pub(in crate::cpu) struct Input {
    pub(super) inputs: usize,
    pub(super) rows: usize,
    pub(super) forms: Forms,
    pub(super) blocks: Vec<Block>,
    /// `[block][plane][group][WORDS][size]`.
    int8: Vec<i32>,
    /// `[row][group]`, of which a block uses the first row: whether the second plane of the group counts.
    fine: Vec<bool>,
    /// `[block][inputs][size]`.
    float: Vec<f32>,
}

/// The quantised rows of a block: quants, and where a row needs them finer ones of what those leave.
#[derive(Debug, Clone, Copy)]
pub(super) struct Planes<'a> {
    /// `[plane][group][WORDS][size]`.
    words: &'a [i32],
    /// Of each group, whether the second plane counts.
    fine: &'a [bool],
}

impl<'a> Planes<'a> {
    /// The words of each group, the finer ones where they count; a group has `len` in each plane.
    #[inline(always)]
    pub(super) fn groups(self, len: usize) -> impl Iterator<Item = (&'a [i32], Option<&'a [i32]>)> {
        let (coarse, finer) = self.words.split_at(self.words.len() / 2);
        let finer = finer.chunks_exact(len).zip(self.fine).map(|(words, fine)| fine.then_some(words));
        coarse.chunks_exact(len).zip(finer)
    }
}

/// Where rows come from.
pub(in crate::cpu) trait Rows: Sync {
    /// The row with this index, perhaps written into `buffer`, which is as long as a row.
    fn row<'a>(&'a self, row: usize, buffer: &'a mut [f32]) -> &'a [f32];
}

/// Rows that lie in memory, f32 `[rows, width]`.
pub(in crate::cpu) struct Plain<'a> {
    pub(in crate::cpu) x: &'a [f32],
    pub(in crate::cpu) width: usize,
}

impl Rows for Plain<'_> {
    fn row<'a>(&'a self, row: usize, _buffer: &'a mut [f32]) -> &'a [f32] {
        &self.x[row * self.width..][..self.width]
    }
}

/// Rows that `.0(row, out)` computes.
pub(in crate::cpu) struct Computed<F>(pub(in crate::cpu) F);

impl<F: Fn(usize, &mut [f32]) + Sync> Rows for Computed<F> {
    fn row<'a>(&'a self, row: usize, buffer: &'a mut [f32]) -> &'a [f32] {
        (self.0)(row, buffer);
        buffer
    }
}

/// Cuts rows into blocks.
fn blocks(rows: usize) -> Vec<Block> {
    let mut blocks = Vec::with_capacity(rows.div_ceil(BLOCK_ROWS) + 1);
    let mut first = 0;
    while first < rows {
        let rest = rows - first;
        let size = match rest {
            0..=4 => rest,
            5 | 6 => 6,
            // 13 to 16 rows are two blocks of about the same size rather than a full one and a poor one.
            7 | 8 | 13..=16 => 8,
            _ => BLOCK_ROWS,
        };
        blocks.push(Block { first, rows: rest.min(size), size });
        first += size;
    }
    blocks
}

impl Input {
    /// Takes `rows` rows of `inputs` elements in the wanted forms; few rows on the calling thread.
    pub(in crate::cpu) fn fill(
        &mut self,
        pool: &ComputePool,
        set: InstructionSet,
        [rows, inputs]: [usize; 2],
        forms: Forms,
        source: &impl Rows,
    ) {
        (self.rows, self.inputs, self.forms) = (rows, inputs, forms);
        self.blocks = blocks(rows);
        let room = self.blocks.iter().map(|block| block.size).sum::<usize>();
        let grow = |len: usize, wanted: bool| if wanted { len } else { 0 };
        let int8_len = grow(room * int8_words(inputs), forms.int8);
        if self.int8.len() < int8_len {
            self.int8 = vec![0; int8_len];
        }
        let float_len = grow(room * inputs, forms.float);
        if self.float.len() < float_len {
            self.float = vec![0.0; float_len];
        }
        let groups = inputs / GROUP;
        let fine_len = grow(room * groups, forms.int8);
        if self.fine.len() < fine_len {
            self.fine = vec![false; fine_len];
        }
        let (int8, float) = (DisjointSlice::new(&mut self.int8), DisjointSlice::new(&mut self.float));
        let (fine, groups) = (DisjointSlice::new(&mut self.fine), grow(groups, forms.int8));
        let blocks = &self.blocks;
        let blocks_a_task = (TASK_ELEMENTS / (BLOCK_ROWS * inputs)).max(1);
        pool.run(blocks.len().div_ceil(blocks_a_task), |task| {
            for block in blocks.iter().skip(task * blocks_a_task).take(blocks_a_task) {
                let words = int8_words(inputs);
                let int8_len = if forms.int8 { block.size * words } else { 0 };
                let float_len = if forms.float { block.size * inputs } else { 0 };
                #[expect(unsafe_code, reason = "each block has its own part")]
                // SAFETY: blocks follow one another without overlap and each is filled by one task.
                let (int8, fine, float) = unsafe {
                    let (a, b) = (
                        block.first * words * usize::from(forms.int8),
                        block.first * inputs * usize::from(forms.float),
                    );
                    let first = block.first * groups;
                    (
                        int8.range(a..a + int8_len),
                        fine.range(first..first + groups),
                        float.range(b..b + float_len),
                    )
                };
                fill_block(set, *block, inputs, source, (int8, fine), float);
            }
        });
    }

    /// The quantised rows of a block.
    pub(super) fn int8(&self, block: Block) -> Planes<'_> {
        let (words, groups) = (int8_words(self.inputs), self.inputs / GROUP);
        Planes {
            words: &self.int8[block.first * words..][..block.size * words],
            fine: &self.fine[block.first * groups..][..groups],
        }
    }

    /// The rows of a block, f32 `[inputs][size]`.
    pub(super) fn float(&self, block: Block) -> &[f32] {
        &self.float[block.first * self.inputs..][..block.size * self.inputs]
    }
}

/// Words of a row's whole groups in both planes; a rest that fills no group is never asked for.
fn int8_words(inputs: usize) -> usize {
    2 * (inputs / GROUP) * WORDS
}

thread_local! {
    /// A row on its way into a block.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

fn fill_block(
    set: InstructionSet,
    block: Block,
    inputs: usize,
    source: &impl Rows,
    (int8, fine): (&mut [i32], &mut [bool]),
    float: &mut [f32],
) {
    fine.fill(false);
    ROW.with_borrow_mut(|buffer| {
        buffer.resize(inputs.max(buffer.len()), 0.0);
        for slot in 0..block.size {
            let buffer = &mut buffer[..inputs];
            let x = if slot < block.rows {
                source.row(block.first + slot, buffer)
            } else {
                buffer.fill(0.0);
                buffer
            };
            if !int8.is_empty() {
                let (coarse, finer) = int8.split_at_mut(int8.len() / 2);
                quantise(set, x, coarse, slot, block.size);
                fine::refine(set, x, coarse, finer, fine, (slot, block.size));
            }
            if !float.is_empty() {
                for (column, x) in float.chunks_exact_mut(block.size).zip(x) {
                    column[slot] = *x;
                }
            }
        }
    });
}

/// Quantises a row, f32 `[inputs]`, into its slot of a block of `size` rows, `[group][WORDS][size]`.
fn quantise(set: InstructionSet, x: &[f32], words: &mut [i32], slot: usize, size: usize) {
    match set {
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx512 => kernel::quantise_avx512(x, words, slot, size),
        _ => quantise_portably(set, x, words, slot, size),
    }
}

versions! {
    /// The same in plain Rust: the specification.
    fn quantise_portably(x: &[f32], words: &mut [i32], slot: usize, size: usize) = quantise_row;
}

#[inline(always)]
fn quantise_row(x: &[f32], words: &mut [i32], slot: usize, size: usize) {
    let mut quants = [0; GROUP];
    for (x, words) in x.as_chunks::<GROUP>().0.iter().zip(words.chunks_exact_mut(WORDS * size)) {
        let scale = quantise_group(x, &mut quants);
        let (mut lower, mut upper) = (0, 0);
        for k in 0..GROUP / 2 {
            lower += quants[k];
            upper += quants[k + GROUP / 2];
        }
        let mut bytes = [0; GROUP];
        for (byte, quant) in bytes.iter_mut().zip(&quants) {
            *byte = *quant as u8;
        }
        for (word, quad) in bytes.as_chunks::<4>().0.iter().enumerate() {
            words[word * size + slot] = i32::from_le_bytes(*quad);
        }
        write_sums(words, slot, size, scale, [lower, upper]);
    }
}

/// Fills quants in [-127, 127] and returns their scale; see the module documentation of `linear`.
#[inline(always)]
pub(super) fn quantise_group(x: &[f32; GROUP], quants: &mut [i32; GROUP]) -> f32 {
    // As integers, magnitudes order like the numbers, with infinities and NaN at the top.
    let most = x.iter().fold(0, |most: u32, x| most.max(x.to_bits() & 0x7fff_ffff));
    let (scale, inverse) = scale_and_inverse(most);
    for (quant, x) in quants.iter_mut().zip(x) {
        // Where everything counts as zero, infinities and NaN among it, the inverse is no number to multiply with.
        let x = if inverse > 0.0 { x * inverse } else { 0.0 };
        *quant = (x + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    }
    scale
}

/// 1.5 × 2^23: adding it leaves the nearest integer, ties to even, in the low bits of the sum.
pub(super) const ROUND: f32 = 12_582_912.0;

/// The smallest scale, 2^-80; groups below count as zero. No product of a scale, a sum of quants and the number of a weight (a
/// half, or an integer times a half) can then vanish, so that adding zeros never changes the sign of a sum.
const SCALE_MIN: f32 = f32::from_bits((127 - 80) << 23);

/// Scale of a group, and what its numbers are multiplied with to become quants (0 where they all become 0), out of the bits of
/// its largest magnitude.
#[inline(always)]
pub(super) fn scale_and_inverse(most: u32) -> (f32, f32) {
    const INFINITE: u32 = 0x7f80_0000;
    let most_number = f32::from_bits(most);
    let scale = most_number / 127.0;
    if most >= INFINITE {
        (f32::NAN, 0.0)
    } else if scale < SCALE_MIN {
        (0.0, 0.0)
    } else {
        (scale, 127.0 / most_number)
    }
}

/// Writes what a group has beside its quants, out of the sums of its lower and upper half.
#[inline(always)]
pub(super) fn write_sums(words: &mut [i32], slot: usize, size: usize, scale: f32, [lower, upper]: [i32; 2]) {
    words[SCALE * size + slot] = scale.to_bits() as i32;
    words[SCALED_SUM * size + slot] = (scale * (lower + upper) as f32).to_bits() as i32;
    words[NEGATED_SUM * size + slot] = -(lower + upper);
    words[NEGATED_LOWER_SUM * size + slot] = -lower;
}

#[cfg(test)]
pub(super) use fine::{is_fine, refine_group};

#[cfg(test)]
mod tests {
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    #[test]
    fn blocks_cover_the_rows_in_order() {
        for rows in 0..200 {
            let blocks = blocks(rows);
            let mut next = 0;
            for (i, block) in blocks.iter().enumerate() {
                assert_eq!(block.first, next, "{rows}");
                assert!(
                    block.rows > 0
                        && block.rows <= block.size
                        && [1, 2, 3, 4, 6, 8, 12].contains(&block.size)
                );
                assert!(
                    block.rows == block.size || i + 1 == blocks.len(),
                    "only the last has room left: {rows}"
                );
                next += block.rows;
            }
            assert_eq!(next, rows);
        }
    }

    #[test]
    fn quants_are_the_nearest_ones() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        for magnitude in [1e-21f32, 1e-3, 1.0, 1e30, f32::MAX] {
            let x: [f32; GROUP] = std::array::from_fn(|_| magnitude * rng.random_range(-1.0..1.0));
            let mut quants = [99; GROUP];
            let scale = quantise_group(&x, &mut quants);
            for (q, x) in quants.into_iter().zip(x) {
                let error = (f64::from(q) * f64::from(scale) - f64::from(x)).abs();
                assert!(error <= f64::from(scale) * 0.500_02, "{magnitude}: {x} became {q} of {scale}");
            }
            assert_eq!(quants.iter().map(|q| q.abs()).max(), Some(127));
        }
        let mut quants = [99; GROUP];
        for nothing in [0.0, 1e-40, 1e-24] {
            assert_eq!((quantise_group(&[nothing; GROUP], &mut quants), quants), (0.0, [0; GROUP]));
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; GROUP];
            x[7] = bad;
            let scale = quantise_group(&x, &mut quants);
            assert!(scale.is_nan() && quants == [0; GROUP], "{bad}");
        }
    }
}
