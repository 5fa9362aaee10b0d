//! The walk through the layers that prefill and decode share: qkv → local and remote attention → merge → finish, and what
//! both need around it: sequences whose blocks lie on shards or here, links to the shards, storing and fetching tiles.
//! Must never know which service it runs in, nor let the place of a block change a bit of the result.

mod attend;
mod error;
mod events;
mod health;
mod intake;
mod patience;
mod readers;
mod sequence;
mod shards;
mod step;
mod store;
#[cfg(feature = "testing")]
pub mod testing;

pub use attend::{AttendTimes, RemoteVisits};
pub use error::Error;
pub use events::{EventSender, SendOutcome, event_channel};
pub use intake::{Limits, TokenIntake, WorkerParts, close_queue, within};
pub use readers::ReadCounts;
pub use sequence::{AnswerVisits, LocalBlock, Sequence};
pub use shards::{ShardDirectory, ShardLink, ShardLinks};
pub use step::{
    AttentionProbe, Engine, EngineOptions, Logits, StepInput, StepObserver, StepOutput, wire_tile_shape,
};
pub use store::{PutStreams, Stored, Unstored, fetch_blocks, store_block, store_copies};
