//! Partial results of attention and their merge: the one place where two partials become one.

use longshore_compute::{ComputePool, InstructionSet};

use crate::Error;
use crate::exp2::exp2;
use crate::simd::{Kernel, Simd, dispatch};

/// Attention of some rows over some keys: per (row, query head) the running maximum `m` (base 2), the sum `l` and the
/// un-normalised output `o`. The empty key set is (−∞, 0, 0), the identity of [`Partials::merge`].
#[derive(Debug, Clone, PartialEq)]
pub struct Partials {
    rows: usize,
    heads: usize,
    head_dim: usize,
    m: Vec<f32>,
    l: Vec<f32>,
    o: Vec<f32>,
}

/// How one row takes in a partial of later keys.
///
/// Scaled values become `fma(later, x_later, earlier * x_earlier)`, both factors being `exp2(m_x - m)`; a −∞ maximum never
/// enters any arithmetic, so the identity changes no bit on either side.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fold {
    /// The later keys are none.
    Keep,
    /// The earlier keys are none.
    Replace,
    /// Both are rescaled to the larger maximum.
    Scale {
        /// Factor of the earlier partial.
        earlier: f32,
        /// Factor of the later partial.
        later: f32,
    },
}

impl Fold {
    /// The fold of a later partial (`m`, `l`) onto an earlier one, whose `m` and `l` it updates.
    #[inline(always)]
    pub(crate) fn begin(m: &mut f32, l: &mut f32, later_m: f32, later_l: f32) -> Self {
        if later_m == f32::NEG_INFINITY {
            return Self::Keep;
        }
        if *m == f32::NEG_INFINITY {
            (*m, *l) = (later_m, later_l);
            return Self::Replace;
        }
        let top = if later_m > *m { later_m } else { *m };
        let (earlier, later) = (exp2(*m - top), exp2(later_m - top));
        *m = top;
        *l = later.mul_add(later_l, earlier * *l);
        Self::Scale { earlier, later }
    }

    /// Folds some elements of the output.
    #[inline(always)]
    pub(crate) fn output(self, o: &mut [f32], later_o: &[f32]) {
        match self {
            Self::Keep => {}
            Self::Replace => o.copy_from_slice(later_o),
            Self::Scale { earlier, later } => {
                for (o, &later_o) in o.iter_mut().zip(later_o) {
                    *o = later.mul_add(later_o, earlier * *o);
                }
            }
        }
    }
}

impl Partials {
    /// The identity: no keys seen.
    pub fn identity(rows: usize, heads: usize, head_dim: usize) -> Self {
        let n = rows * heads;
        Self {
            rows,
            heads,
            head_dim,
            m: vec![f32::NEG_INFINITY; n],
            l: vec![0.0; n],
            o: vec![0.0; n * head_dim],
        }
    }

    /// Merges `other` (keys that come later) into self: both are rescaled to the larger maximum. Bit for bit, merging
    /// the identity changes nothing. Errors when the shapes differ.
    pub fn merge(&mut self, other: &Self) -> Result<(), Error> {
        self.check_same_shape(other)?;
        let head_dim = self.head_dim;
        dispatch(
            InstructionSet::detect(),
            Merge { head_dim, earlier: self.parts_mut(), later: other, first: 0 },
        );
        Ok(())
    }

    fn check_same_shape(&self, other: &Self) -> Result<(), Error> {
        if self.shape() == other.shape() {
            return Ok(());
        }
        let problem = format!(
            "has shape {:?}, must be {:?} (rows, query heads, head size)",
            other.shape(),
            self.shape()
        );
        Err(Error::Invalid { field: "partials", problem })
    }

    /// Merges `later`, in order, and finishes, rows shared out over `pool`: the same bits as [`Self::merge`] one after the other
    /// and [`Self::finish`]. Errors when the shapes differ.
    pub fn merge_and_finish(mut self, later: &[Self], pool: &ComputePool) -> Result<Vec<f32>, Error> {
        later.iter().try_for_each(|part| self.check_same_shape(part))?;
        let mut output = std::mem::take(&mut self.o);
        if output.is_empty() {
            return Ok(output);
        }
        let (head_dim, set) = (self.head_dim, InstructionSet::detect());
        pool.run_chunks(&mut output, TASK_ROWS * head_dim, |task, o| {
            let first = task * TASK_ROWS;
            let rows = first..first + o.len() / head_dim;
            let (mut m, mut l) = (self.m[rows.clone()].to_vec(), self.l[rows].to_vec());
            for later in later {
                let earlier = Parts { m: &mut m, l: &mut l, o: &mut *o };
                dispatch(set, Merge { head_dim, earlier, later, first });
            }
            finish(o, &l, head_dim);
        });
        Ok(output)
    }

    /// Puts a partial of fewer rows and heads in place of what was there, from row `first_row` and head `first_head` on. Errors
    /// when it does not fit.
    pub fn place(&mut self, first_row: usize, first_head: usize, part: &Self) -> Result<(), Error> {
        let fits = part.head_dim == self.head_dim
            && first_row.checked_add(part.rows).is_some_and(|end| end <= self.rows)
            && first_head.checked_add(part.heads).is_some_and(|end| end <= self.heads);
        if !fits {
            let (found, whole) = (part.shape(), self.shape());
            let problem = format!(
                "of shape {found:?} do not fit {whole:?} (rows, query heads, head size) from row {first_row}, head {first_head}"
            );
            return Err(Error::Invalid { field: "partials", problem });
        }
        let dim = self.head_dim;
        for row in 0..part.rows {
            let (from, to) = (row * part.heads, (first_row + row) * self.heads + first_head);
            self.m[to..to + part.heads].copy_from_slice(&part.m[from..from + part.heads]);
            self.l[to..to + part.heads].copy_from_slice(&part.l[from..from + part.heads]);
            let (from, to, elements) = (from * dim, to * dim, part.heads * dim);
            self.o[to..to + elements].copy_from_slice(&part.o[from..from + elements]);
        }
        Ok(())
    }

    /// `O = o / l`, f32 `[rows, heads * head_dim]`; rows without keys are 0.
    pub fn finish(self) -> Vec<f32> {
        let mut output = self.o;
        if self.head_dim == 0 {
            return output;
        }
        finish(&mut output, &self.l, self.head_dim);
        output
    }

    /// Wire form, f32 `[rows, heads, 2 + head_dim]` as (m, l, o...).
    pub fn to_interleaved(&self) -> Vec<f32> {
        let mut data = Vec::with_capacity(self.m.len() * (2 + self.head_dim));
        for (row, (&m, &l)) in self.m.iter().zip(&self.l).enumerate() {
            data.extend([m, l]);
            data.extend_from_slice(&self.o[row * self.head_dim..][..self.head_dim]);
        }
        data
    }

    /// Reads the wire form; refuses a wrong length, NaN anywhere, negative or infinite `l`, `m` = +∞, infinite `o`, and rows
    /// where `m` and `l` disagree on whether there are any keys.
    pub fn from_interleaved(rows: usize, heads: usize, head_dim: usize, data: &[f32]) -> Result<Self, Error> {
        Self::read(rows, heads, head_dim, data, check_row)
    }

    /// Reads the wire form as an executor wrote it. Refuses a wrong length alone: keys that are no finite numbers give what they give,
    /// and whoever asked looks for it.
    pub fn from_executor(rows: usize, heads: usize, head_dim: usize, data: &[f32]) -> Result<Self, Error> {
        Self::read(rows, heads, head_dim, data, |_| Ok(()))
    }

    fn read(
        rows: usize,
        heads: usize,
        head_dim: usize,
        data: &[f32],
        check: impl Fn(&[f32]) -> Result<(), String>,
    ) -> Result<Self, Error> {
        let width = head_dim.checked_add(2);
        let wanted = rows.checked_mul(heads).and_then(|n| n.checked_mul(width?));
        let (Some(wanted), Some(width)) = (wanted, width) else {
            return Err(invalid(format!("cannot have {rows} rows of {heads} heads of {head_dim} elements")));
        };
        if data.len() != wanted {
            let problem = format!("has {} elements, {rows} rows of {heads} heads need {wanted}", data.len());
            return Err(invalid(problem));
        }
        let mut partials = Self {
            rows,
            heads,
            head_dim,
            m: Vec::with_capacity(rows * heads),
            l: Vec::with_capacity(rows * heads),
            o: Vec::with_capacity(rows * heads * head_dim),
        };
        for (index, row) in data.chunks_exact(width).enumerate() {
            check(row).map_err(|problem| {
                invalid(format!("{problem} in row {}, query head {}", index / heads, index % heads))
            })?;
            partials.m.push(row[0]);
            partials.l.push(row[1]);
            partials.o.extend_from_slice(&row[2..]);
        }
        Ok(partials)
    }

    /// Rows, query heads and head size.
    pub fn shape(&self) -> (usize, usize, usize) {
        (self.rows, self.heads, self.head_dim)
    }

    /// `m`, `l` and `o` (`head_dim` elements) of one row and query head.
    pub fn row(&self, row: usize, head: usize) -> (f32, f32, &[f32]) {
        let index = row * self.heads + head;
        (self.m[index], self.l[index], &self.o[index * self.head_dim..][..self.head_dim])
    }

    /// All `m` and `l` `[rows, heads]` and `o` `[rows, heads, head_dim]`.
    pub(crate) fn parts_mut(&mut self) -> Parts<'_> {
        Parts { m: &mut self.m, l: &mut self.l, o: &mut self.o }
    }
}

/// The contents of [`Partials`].
pub(crate) struct Parts<'a> {
    pub(crate) m: &'a mut [f32],
    pub(crate) l: &'a mut [f32],
    pub(crate) o: &'a mut [f32],
}

/// Rows and heads that are merged by one task: what the second-level cache holds of some partials.
const TASK_ROWS: usize = 256;

/// Divides outputs by their sums.
fn finish(o: &mut [f32], l: &[f32], head_dim: usize) {
    for (row, &l) in o.chunks_exact_mut(head_dim).zip(l) {
        if l == 0.0 {
            row.fill(0.0);
        } else {
            row.iter_mut().for_each(|o| *o /= l);
        }
    }
}

/// The merge of some rows and heads, compiled once per instruction set.
struct Merge<'a> {
    head_dim: usize,
    earlier: Parts<'a>,
    later: &'a Partials,
    /// Where those of `earlier` begin in `later`.
    first: usize,
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { head_dim: dim, earlier, later, first } = self;
        for row in 0..earlier.m.len() {
            let of = first + row;
            let fold = Fold::begin(&mut earlier.m[row], &mut earlier.l[row], later.m[of], later.l[of]);
            fold.output(&mut earlier.o[row * dim..][..dim], &later.o[of * dim..][..dim]);
        }
    }
}

/// Checks one row (m, l, o...) of the wire form; the answer is what is wrong.
fn check_row(row: &[f32]) -> Result<(), String> {
    let (m, l, o) = (row[0], row[1], &row[2..]);
    if m.is_nan() || m == f32::INFINITY {
        return Err(format!("has maximum {m}"));
    }
    if !l.is_finite() || l < 0.0 {
        return Err(format!("has sum {l}"));
    }
    if (m == f32::NEG_INFINITY) != (l == 0.0) {
        return Err(format!("has sum {l} under maximum {m}"));
    }
    match o.iter().find(|o| !o.is_finite()) {
        Some(o) => Err(format!("has output {o}")),
        None if l == 0.0 && o.iter().any(|&o| o != 0.0) => Err("has output without keys".to_owned()),
        None => Ok(()),
    }
}

fn invalid(problem: String) -> Error {
    Error::Invalid { field: "partials", problem }
}

#[cfg(test)]
mod tests;
