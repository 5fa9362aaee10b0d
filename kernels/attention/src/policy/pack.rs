//! Query rows in the order that the inner loops read them.

use crate::Queries;
use crate::executor::microkernel::GROUP;

use std::ops::Range;

/// Rows in groups of nearly equal size, at most [`GROUP`], each group `[head_dim][rows of the group]`.
#[derive(Debug, Default)]
pub(super) struct Packed {
    pub(super) q: Vec<f32>,
    pub(super) rows: usize,
    pub(super) dim: usize,
}

impl Packed {
    /// Packs rows of `dim` elements; `row(r)` is one of them.
    pub(super) fn fill<'a>(&mut self, rows: usize, dim: usize, row: impl Fn(usize) -> &'a [f32]) {
        (self.rows, self.dim) = (rows, dim);
        self.q.clear();
        self.q.resize(rows * dim, 0.0);
        for range in groups(rows) {
            let packed = &mut self.q[range.start * dim..range.end * dim];
            for (lane, from) in range.clone().map(&row).enumerate() {
                for (to, &from) in packed[lane..].iter_mut().step_by(range.len()).zip(from) {
                    *to = from;
                }
            }
        }
    }
}

impl Packed {
    /// Squares all elements.
    pub(super) fn square(&mut self) {
        self.q.iter_mut().for_each(|x| *x *= *x);
    }
}

/// Rows in groups of nearly equal size.
#[inline(always)]
pub(super) fn groups(rows: usize) -> impl Iterator<Item = Range<usize>> {
    let count = rows.div_ceil(GROUP);
    (0..count).map(move |group| group * rows / count..(group + 1) * rows / count)
}

/// The elements of a query head in a row of the call.
pub(super) fn head<'a>(queries: &Queries<'a>, row: usize, query_head: usize) -> &'a [f32] {
    let dim = queries.shape.head_dim;
    &queries.data[(row * queries.shape.query_heads() + query_head) * dim..][..dim]
}

/// Means of the rows `rows` of each of `heads`, appended to `to`. Sums are taken row by row, from 0.
pub(super) fn mean_queries(
    queries: &Queries<'_>,
    rows: Range<usize>,
    heads: Range<usize>,
    together: bool,
    to: &mut Vec<f32>,
) {
    let dim = queries.shape.head_dim;
    to.clear();
    to.resize(if together { dim } else { heads.len() * dim }, 0.0);
    let count = rows.len() * if together { heads.len() } else { 1 };
    for row in rows {
        for (index, query_head) in heads.clone().enumerate() {
            let sums = &mut to[if together { 0 } else { index * dim }..][..dim];
            for (sum, &x) in sums.iter_mut().zip(head(queries, row, query_head)) {
                *sum += x;
            }
        }
    }
    to.iter_mut().for_each(|sum| *sum /= count as f32);
}
