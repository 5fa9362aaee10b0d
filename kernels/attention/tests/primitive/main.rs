//! The primitive seen from outside: against an obvious reference, bit for bit under every division of the work, and under
//! hostile input.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "the whole file is test code, its helpers too")]

mod bits;
mod case;
mod reference;
mod refusals;
mod sparse;
mod speed;
