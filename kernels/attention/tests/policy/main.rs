//! Policies seen from outside: lists against obvious definitions in f64, under every cut of the prompt, and hostile input.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "the whole file is test code, its helpers too")]

mod answers;
mod attend;
mod blocks;
mod budgets;
mod case;
mod cuts;
mod flex;
mod head_plans;
mod heads;
mod levels;
mod oracle;
mod refusals;
mod speed;
mod texts;
