//! Regions of products: which task computes which outputs of which rows, and what happens to the outputs.
//!
//! A task takes some consecutive panels and goes through the blocks of its rows with each before it takes the next, so that
//! weights come from memory once and wait in the first-level cache, and the rows of a task in the second.

use std::ops::Range;

use longshore_compute::{ComputePool, DisjointSlice, InstructionSet};

use super::input::{BLOCK_ROWS, Input};
use super::matrix::PackedMatrix;
use super::panels::PANEL;
use crate::cpu::rows;

/// Rows of a task; in int8, 128 rows of 4,096 inputs are 768 KiB.
const TASK_BLOCKS: usize = 11;
/// Multiply-adds that are worth a task of their own, about 5 µs of one core where weights come from memory.
const TASK_MACS: usize = 100 * 1024;
/// Tasks for each thread, where there is enough to do: what a thread may wait at the end of a region is a share of that.
const TASKS_A_THREAD: usize = 8;
/// Multiply-adds of each thread in one region, some milliseconds, after which other callers of the pool may take their turn.
const REGION_MACS: usize = 500_000_000;

/// What becomes of the outputs of a matrix.
pub(in crate::cpu) enum Then<'a> {
    /// They fill f32 `[rows, outputs]`.
    Store(&'a mut [f32]),
    /// They are added to f32 `[rows, outputs]`.
    Add(&'a mut [f32]),
    /// They are gates: with the outputs of this second matrix of the same shape, `silu(gate) * up` fills f32
    /// `[rows, outputs]`.
    Gate(&'a PackedMatrix, &'a mut [f32]),
}

/// A product of a region.
struct Product<'a> {
    matrix: &'a PackedMatrix,
    up: Option<&'a PackedMatrix>,
    add: bool,
    out: DisjointSlice<'a, f32>,
}

/// Computes the products of one input with several matrices in one region (more where they take long).
pub(in crate::cpu) fn multiply(
    pool: &ComputePool,
    set: InstructionSet,
    input: &Input,
    products: Vec<(&PackedMatrix, Then<'_>)>,
) {
    let products: Vec<Product<'_>> =
        products.into_iter().map(|(matrix, then)| Product::new(input, matrix, then)).collect();
    if input.rows == 0 {
        return;
    }
    let (tasks, macs) = tasks(pool.threads(), input, &products);
    let tasks_a_region = (tasks.len() * pool.threads() * REGION_MACS / macs.max(1)).max(1);
    for tasks in tasks.chunks(tasks_a_region) {
        pool.run(tasks.len(), |task| {
            let task = &tasks[task];
            run(set, input, &products[task.product], task);
        });
    }
}

impl<'a> Product<'a> {
    fn new(input: &Input, matrix: &'a PackedMatrix, then: Then<'a>) -> Self {
        let (up, add, out) = match then {
            Then::Store(out) => (None, false, out),
            Then::Add(out) => (None, true, out),
            Then::Gate(up, out) => (Some(up), false, out),
        };
        for matrix in [Some(matrix), up].into_iter().flatten() {
            let (forms, ready) = (matrix.forms(), input.forms);
            assert!(ready.int8 >= forms.int8 && ready.float >= forms.float, "the input has the form");
            assert_eq!(matrix.inputs(), input.inputs, "the matrix takes this input");
        }
        assert!(up.is_none_or(|up| up.outputs() == matrix.outputs()), "gate and up have one shape");
        assert_eq!(out.len(), input.rows * matrix.outputs(), "`out` is [rows, outputs]");
        Self { matrix, up, add, out: DisjointSlice::new(out) }
    }

    /// Multiply-adds of one panel and row.
    fn macs(&self) -> usize {
        PANEL * self.matrix.inputs() * if self.up.is_some() { 2 } else { 1 }
    }
}

/// Some panels of a product over some blocks of rows.
struct Task {
    product: usize,
    panels: Range<usize>,
    blocks: Range<usize>,
}

/// All tasks, and all multiply-adds.
fn tasks(threads: usize, input: &Input, products: &[Product<'_>]) -> (Vec<Task>, usize) {
    let macs: usize =
        products.iter().map(|product| product.matrix.panels() * product.macs() * input.rows).sum();
    let wanted = (macs / (TASK_MACS * threads)).clamp(1, TASKS_A_THREAD) * threads;
    let mut tasks = Vec::new();
    for (index, product) in products.iter().enumerate() {
        let (panels, blocks) = (product.matrix.panels(), input.blocks.len());
        let row_parts = blocks.div_ceil(TASK_BLOCKS);
        let share = panels * product.macs() * input.rows * wanted / macs.max(1) / row_parts;
        let panel_parts = share.clamp(1, panels.div_ceil(2).max(1));
        // Pairs of panels stay together.
        let pairs = panels.div_ceil(2);
        for part in 0..panel_parts {
            let first = pairs * part / panel_parts * 2;
            let end = panels.min(pairs * (part + 1) / panel_parts * 2);
            for rows in 0..row_parts {
                let blocks = blocks * rows / row_parts..blocks * (rows + 1) / row_parts;
                tasks.push(Task { product: index, panels: first..end, blocks });
            }
        }
    }
    (tasks, macs)
}

fn run(set: InstructionSet, input: &Input, product: &Product<'_>, task: &Task) {
    let mut sums = [[[0.0; PANEL]; BLOCK_ROWS]; 2];
    let mut ups = [[[0.0; PANEL]; BLOCK_ROWS]; 2];
    for first in task.panels.clone().step_by(2) {
        let count = (task.panels.end - first).min(2);
        for block in &input.blocks[task.blocks.clone()] {
            let columns = first * PANEL..product.matrix.outputs().min((first + count) * PANEL);
            for row in block.first..block.first + block.rows {
                prefetch(part(product, row, columns.clone()));
            }
            product.matrix.multiply(set, first, input, *block, &mut sums[..count]);
            if let Some(up) = product.up {
                up.multiply(set, first, input, *block, &mut ups[..count]);
                for (gates, ups) in sums[..count].iter_mut().zip(&ups) {
                    let (gates, ups) = (&mut gates[..block.rows], &ups[..block.rows]);
                    rows::swiglu(set, gates.as_flattened_mut(), ups.as_flattened());
                }
            }
            for row in 0..block.rows {
                for (i, sums) in sums[..count].iter().enumerate() {
                    write(product, block.first + row, first + i, &sums[row]);
                }
            }
        }
    }
}

/// Writes the outputs of one panel and row.
fn write(product: &Product<'_>, row: usize, panel: usize, sums: &[f32; PANEL]) {
    let columns = panel * PANEL..product.matrix.outputs().min((panel + 1) * PANEL);
    let out = part(product, row, columns);
    if product.add {
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
    } else {
        out.copy_from_slice(&sums[..out.len()]);
    }
}

/// Some outputs of a row that belong to the running task.
#[expect(clippy::mut_from_ref, reason = "tasks own disjoint parts of the output")]
fn part<'a>(product: &'a Product<'_>, row: usize, columns: Range<usize>) -> &'a mut [f32] {
    let start = row * product.matrix.outputs();
    #[expect(unsafe_code, reason = "each task has its own panels and rows")]
    // SAFETY: the tasks of `tasks` share no panel and row of a product, and a task holds one part at a time.
    unsafe {
        product.out.range(start + columns.start..start + columns.end)
    }
}

/// Asks for the cache lines of outputs that will be written when their products are done; rows lie too far apart for the
/// machine to guess.
fn prefetch(part: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in part.chunks(16) {
        #[expect(unsafe_code, reason = "the intrinsic takes a pointer")]
        // SAFETY: prefetching reads nothing, and every x86-64 machine has the instruction or takes it for none.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_ET0 }>(line.as_ptr().cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = part;
}
