//! A prompt and some greedy tokens through a tiny model.

use std::sync::Arc;

use longshore_attention::{CpuExecutor, KvDtype};
use longshore_compute::ComputePool;
use longshore_model::testing::{StoredType, TinyOptions, tiny_gguf};
use longshore_model::{Backend, CpuBackend, CpuOptions, Error as ModelError, Linear};

use super::Twin;
use super::file::Arrays;
use crate::model::checks::{distance, tiny, told, wide};
use crate::selftest::walk::{Walk, likeliest};
use crate::{Device, Error, Precision};

const PROMPT: usize = 37;
const GENERATED: usize = 6;

/// In a precision, with weights of that type.
pub(super) struct Forward(pub(super) Precision);

impl Forward {
    fn options(&self) -> TinyOptions {
        let stored = match self.0 {
            Precision::F32 => StoredType::F32,
            Precision::F16 => StoredType::F16,
            Precision::Bf16 => StoredType::Bf16,
        };
        TinyOptions {
            seed: 74,
            stored,
            hidden: 32,
            query_heads: 2,
            kv_heads: 1,
            ffn: 48,
            ..TinyOptions::default()
        }
    }

    /// Logits of the last row of the prompt and of `steps` tokens that follow; `next` chooses them.
    fn run(
        backend: &dyn Backend,
        prompt: &[u32],
        mut next: impl FnMut(usize, &[f32]) -> u32,
    ) -> Result<Vec<f32>, ModelError> {
        let (executor, vocabulary) = (CpuExecutor::serial(), backend.config().vocabulary);
        let mut walk = Walk::new(backend, &executor, (KvDtype::F32, 0));
        let (mut all, mut tokens) = (Vec::new(), prompt.to_vec());
        for step in 0..=GENERATED {
            let logits = walk.logits(&tokens)?;
            let last = &logits[logits.len() - vocabulary..];
            all.extend_from_slice(last);
            tokens = vec![next(step, last)];
        }
        Ok(all)
    }
}

impl Twin for Forward {
    fn inputs(&self) -> Result<Arrays, Error> {
        let tokens: Vec<u32> = (0..PROMPT as u32).map(|index| index * 37 % 200).collect();
        Ok(Arrays::default().with("model", &tiny_gguf(&self.options()).bytes()).with("prompt", &tokens))
    }

    fn on_cpu(&self, inputs: &Arrays) -> Result<Arrays, Error> {
        let model = tiny::open_bytes(&inputs.get::<u8>("model")?).map_err(told)?;
        let options = CpuOptions { pool: ComputePool::serial(), linear: Linear::F32 };
        let backend = CpuBackend::new(model.info.config.clone(), &model.weights, options, &|_| ());
        let mut greedy = Vec::new();
        let logits = Self::run(&backend.map_err(told)?, &inputs.get::<u32>("prompt")?, |_, logits| {
            greedy.push(likeliest(logits));
            likeliest(logits)
        });
        Ok(Arrays::default().with("logits", &logits.map_err(told)?).with("greedy", &greedy))
    }

    /// Distance of the logits, given the recorded tokens; infinite where, in f32, another token is the likeliest.
    fn on_device(&self, device: &Arc<dyn Device>, inputs: &Arrays, results: &Arrays) -> Result<f64, Error> {
        let model = tiny::open_bytes(&inputs.get::<u8>("model")?).map_err(told)?;
        let backend = tiny::backend(device, &model, self.0).map_err(told)?;
        let (greedy, mut others) = (results.get::<u32>("greedy")?, 0);
        let logits = Self::run(&backend, &inputs.get::<u32>("prompt")?, |step, logits| {
            others += u32::from(likeliest(logits) != greedy[step]);
            greedy[step]
        });
        if others > 0 && self.0 == Precision::F32 {
            return Ok(f64::INFINITY);
        }
        Ok(distance(&logits.map_err(told)?, &wide(&results.get::<f32>("logits")?)))
    }

    fn limit(&self) -> f64 {
        self.0.bound()
    }
}
