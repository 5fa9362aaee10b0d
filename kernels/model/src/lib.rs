//! Models: weights, tokenizer, chat template, the forward pass cut at attention, and the sampler. Knows no network, no
//! clock, no async. Architecture, section 4.

mod backend;
mod chat;
mod config;
mod cpu;
mod error;
mod files;
mod kept;
mod logits;
mod rope;
mod sampler;
#[doc(hidden)]
pub mod testing;
mod tokenizer;

pub use backend::{Activations, Backend, DeviceRead, DeviceRows, KeptQkv, Qkv, RowsRead};
pub use chat::ChatTemplate;
pub use config::{ModelConfig, RopeConfig, RopeScaling, RopeStyle};
pub use cpu::{CpuBackend, CpuOptions, Linear, LinearLayer, QuantisedGroup};
pub use error::{Error, Kind};
pub use files::{
    LayerWeight, LoadProgress, LoadedModel, Matrix, ModelInfo, StoredMatrix, TensorType, WeightName, Weights,
};
pub use kept::{KeptAppend, KeptAttention, KeptMeans, KeptPart, KeptVisits, Promised};
pub use logits::{Likeliest, RowLogits, WantedRow};
pub use rope::{Rope, Rotation};
pub use sampler::{Sampled, Sampler, SamplerParams};
pub use tokenizer::{SpecialTokens, TextStream, Tokenizer};
