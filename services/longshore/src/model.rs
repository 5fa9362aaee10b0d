//! Model references, the per-user cache, and the `longshore model` commands.

mod cache;
mod pull;
mod recall;
mod reference;
mod show;

pub(crate) use cache::Cache;
pub(crate) use pull::{ensure, pull};
pub(crate) use recall::{RecallOptions, RecallVocabulary, make_recall};
pub(crate) use reference::{DEFAULT_MODEL, ModelRef};
pub(crate) use show::{kv_bytes_per_token, list, show};
