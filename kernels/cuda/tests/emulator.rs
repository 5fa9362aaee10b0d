//! The emulator finds what it is there to find, and its instructions do what the PTX manual says.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the whole file is test code, its helpers too"
)]

#[path = "emulator/compiler.rs"]
mod compiler;
#[path = "emulator/conversions.rs"]
mod conversions;
#[path = "emulator/device.rs"]
mod device;
#[path = "emulator/faults.rs"]
mod faults;
#[path = "emulator/groups.rs"]
mod groups;
#[path = "emulator/instructions.rs"]
mod instructions;
#[path = "emulator/queues.rs"]
mod queues;
