//! Selection on the device: which blocks of its prefix a query tile visits, which pages a decode step reads. The rules are those of
//! `longshore_attention`'s policies.

mod blocks;
mod lists;
mod pages;
mod scores;

pub use blocks::{BlockSelector, SelectCall, SelectGuards, Selector};
pub use lists::{ListBuilder, ListCall};
pub use pages::{PageScoreCall, PageScoreItem, PageScorer};
pub use scores::{BlockScorer, ScoreCall};
