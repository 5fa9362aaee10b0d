//! Sparse attention: lists against the f64 reference, against the dense path bit for bit, and hostile ones.

mod bits;
mod case;
mod reference;
mod refusals;
mod skip;
mod speed;
