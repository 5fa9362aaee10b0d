//! Selection on the device: which blocks of its prefix a query tile visits, which pages a decode step reads. The rules are those of
//! `longshore_attention`'s policies.

mod blocks;
mod lists;
mod pages;
mod scores;
mod visits;

use crate::Kernel;

pub use blocks::{BlockSelector, SelectCall, SelectGuards, Selector};
pub use lists::{ListBuilder, ListCall};
pub use pages::{PageScoreCall, PageScoreItem, PageScorer};
pub use scores::{BlockScorer, ScoreCall};
pub use visits::{StripeMeans, VisitBuilder, VisitCall, most_visits};

pub(crate) use visits::kernels as visit_kernels;

/// Kernels of selection.
pub(crate) fn kernels() -> Vec<Kernel> {
    let (select, lists) = (vec![blocks::kernel()], lists::kernels().to_vec());
    [scores::all_kernels(), select, lists, visits::kernels().to_vec(), pages::all_kernels()].concat()
}
