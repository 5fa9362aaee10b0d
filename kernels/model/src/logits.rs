//! Logits on their way from a backend to the sampler: whole rows, or what a device chose of them.

use crate::{Backend, Error};

/// A row whose logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WantedRow {
    /// Which one.
    pub row: usize,
    /// So many of its likeliest tokens are enough ([`crate::Sampler::candidates`]); `None`: the choice takes all logits.
    pub candidates: Option<usize>,
}

/// What a choice needs of a row of logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Likeliest {
    /// The likeliest tokens with their logits, best first; of equals the one with the lowest id first.
    pub best: Vec<(u32, f32)>,
    /// `ln Σ exp(logit)` over all of them.
    pub log_sum_exp: f64,
}

/// Logits of a row, or what was chosen of them.
#[derive(Debug, Clone, PartialEq)]
pub enum RowLogits {
    /// f32 `[vocabulary]`.
    All(Vec<f32>),
    /// As many of the likeliest as were asked for, or more.
    Likeliest(Likeliest),
}

impl RowLogits {
    /// All of them.
    ///
    /// # Panics
    /// When only the likeliest are here: then candidates were asked for.
    pub fn into_all(self) -> Vec<f32> {
        match self {
            Self::All(logits) => logits,
            Self::Likeliest(_) => panic!("all logits come where no candidates were asked for"),
        }
    }
}

/// [`Backend::candidates`] of a backend whose logits are in host memory: whole rows, out of one product.
pub(crate) fn whole_rows<B: Backend + ?Sized>(
    backend: &B,
    x: &crate::Activations,
    wanted: &[WantedRow],
) -> Result<Vec<RowLogits>, Error> {
    let rows: Vec<usize> = wanted.iter().map(|wanted| wanted.row).collect();
    let mut logits = backend.logits(x, &rows)?;
    let vocabulary = backend.config().vocabulary;
    // From the back: the first row, of most steps the only one, stays where it is.
    let split = |row: usize| RowLogits::All(logits.split_off(row * vocabulary));
    let mut all: Vec<RowLogits> = (0..rows.len()).rev().map(split).collect();
    all.reverse();
    Ok(all)
}
