//! Models: weights, tokenizer, chat template, the forward pass cut at attention, and the sampler. Knows no network, no
//! clock, no async. Architecture, section 4.

mod backend;
mod config;
mod error;

pub use backend::{Activations, Backend, Qkv};
pub use config::{ModelConfig, RopeConfig, RopeScaling, RopeStyle};
pub use error::{Error, Kind};
