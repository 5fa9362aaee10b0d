//! Decides where work goes: which prefix is already in the cluster, which worker takes a request, whether queries travel to KV
//! or KV to queries. Pure: no I/O, no clock, no randomness; time is an argument in milliseconds.

mod error;
mod index;
mod load;
mod prefix;
mod transfer;

pub use error::{Error, Kind};
pub use index::{InventoryIndex, News, Untaken};
pub use load::{Cost, LoadLimits, LoadTable, Phase, Ticket, WorkerLoad};
pub use prefix::{KEYS_MAX, Likely, PrefixPlan, ShardLookup, likely_prefix, placement_bytes, plan_lookup};
pub use transfer::{Choice, TransferShape, ship_or_fetch};
