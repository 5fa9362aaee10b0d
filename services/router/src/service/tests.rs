//! The router in front of fakes.

mod answers;
mod failures;
mod limits;
