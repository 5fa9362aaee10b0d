//! Greedy tokens of a whole model: forward pass, attention and choice on the device, against the same on the CPU.

use std::sync::{Arc, OnceLock};

use longshore_attention::{CpuExecutor, Executor, KvDtype};
use longshore_compute::ComputePool;
use longshore_model::{
    Backend as _, CpuBackend, CpuOptions, Error, KeptAttention, Linear, LoadedModel, Sampler, SamplerParams,
    WantedRow,
};

use super::Case;
use super::walk::{Walk, likeliest};
use crate::model::checks::told;
use crate::{CudaBackend, CudaExecutor, Device, ModelOptions, PageShape, Precision};

/// Bytes of the device for copies of tiles.
const PAGE_BYTES: usize = 256 << 20;

/// A model, a prompt for it, and how many tokens are to follow.
#[derive(Clone)]
pub struct Greedy {
    /// Weights as their files have them.
    pub model: Arc<LoadedModel>,
    /// Tokens; at least one.
    pub prompt: Vec<u32>,
    /// Tokens that are generated, whatever ends a text.
    pub count: usize,
    /// Computes what is right.
    pub pool: Arc<ComputePool>,
}

/// A way to compute a model on a device.
#[derive(Clone, Copy)]
struct Way {
    /// `None`: the precision of the weights, as servers take it.
    precision: Option<Precision>,
    kv: KvDtype,
}

impl Greedy {
    /// Names of [`Self::cases`].
    pub const NAMES: [&str; 2] =
        ["greedy tokens, f32 with KV in f32", "greedy tokens, as served with KV in f16"];

    /// Tokens of the device that are not the CPU's: with all in f32, and as servers compute, in the precision of the weights with KV in
    /// f16. The CPU's linear layers are f32; tokens are chosen on the device. From the first one that differs on all may.
    pub fn cases(&self) -> Vec<Case> {
        let ways = [
            Way { precision: Some(Precision::F32), kv: KvDtype::F32 },
            Way { precision: None, kv: KvDtype::F16 },
        ];
        let case = |(name, way): (&str, Way)| {
            let (own, wanted) = (self.clone(), OnceLock::new());
            Case::new(name, 0.0, move |device| {
                let wanted = match wanted.get() {
                    Some(wanted) => wanted,
                    None => {
                        let tokens = own.on_cpu(way.kv).map_err(told)?;
                        wanted.get_or_init(|| tokens)
                    }
                };
                let found = own.on_device(device, way).map_err(told)?;
                Ok(found.iter().zip(wanted).filter(|(found, wanted)| found != wanted).count() as f64)
            })
        };
        Self::NAMES.into_iter().zip(ways).map(case).collect()
    }

    /// The CPU's tokens.
    fn on_cpu(&self, kv: KvDtype) -> Result<Vec<u32>, Error> {
        let options = CpuOptions { pool: Arc::clone(&self.pool), linear: Linear::F32 };
        let LoadedModel { info, weights } = &*self.model;
        let backend = CpuBackend::new(info.config.clone(), weights, options, &|_| ())?;
        let executor = CpuExecutor::new(Arc::clone(&self.pool));
        let mut walk = Walk::new(&backend, &executor, (kv, 0));
        self.generate(|tokens| {
            let logits = walk.logits(tokens)?;
            Ok(likeliest(&logits[logits.len() - info.config.vocabulary..]))
        })
    }

    /// The device's, each chosen there.
    fn on_device(&self, device: &Arc<dyn Device>, way: Way) -> Result<Vec<u32>, Error> {
        let options = ModelOptions { precision: way.precision, ..ModelOptions::new(Arc::clone(&self.pool)) };
        let LoadedModel { info, weights } = &*self.model;
        let backend = CudaBackend::load(Arc::clone(device), info.config.clone(), weights, &options, &|_| ())?;
        let cpu = CpuExecutor::new(Arc::clone(&self.pool));
        let heads = info.config.heads;
        // Heads that no kernel has are the CPU's: the forward pass is compared all the same.
        let kernels_have_it = heads.head_dim.is_multiple_of(16) && heads.head_dim <= PageShape::HEAD_DIM_MAX;
        let gpu = kernels_have_it.then(|| CudaExecutor::new(Arc::clone(device), cpu.clone(), PAGE_BYTES));
        let executor = gpu.as_ref().map_or(&cpu as &dyn Executor, |gpu| gpu);
        let kept = gpu.as_ref().map(|gpu| gpu as &dyn KeptAttention);
        let mut walk = Walk::new(&backend, executor, (way.kv, 0)).with_kept(kept);
        let sampler = Sampler::new(SamplerParams::greedy())?;
        let (vocabulary, candidates) = (info.config.vocabulary, sampler.candidates(info.config.vocabulary));
        self.generate(|tokens| {
            let x = walk.append(tokens)?;
            let rows = backend.candidates(&x, &[WantedRow { row: x.rows() - 1, candidates }])?;
            Ok(sampler.sample_row(&rows[0], vocabulary, 0)?.token)
        })
    }

    fn generate(&self, mut next: impl FnMut(&[u32]) -> Result<u32, Error>) -> Result<Vec<u32>, Error> {
        let mut tokens = Vec::with_capacity(self.count);
        while tokens.len() < self.count {
            let token = next(tokens.last().map_or(&self.prompt[..], std::slice::from_ref))?;
            tokens.push(token);
        }
        Ok(tokens)
    }
}

impl std::fmt::Debug for Greedy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Greedy")
            .field("model", &self.model.info.config.name)
            .field("prompt", &self.prompt.len())
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use longshore_model::testing::TinyOptions;

    use super::*;
    use crate::model::checks::tiny;

    /// The tiny model that the tests compare on the emulator: its tokens must depend on what came before.
    #[test]
    fn a_tiny_model_does_not_say_the_same_over_and_over() {
        let options = TinyOptions { head_dim: 64, query_heads: 2, kv_heads: 1, ..TinyOptions::default() };
        let model = Arc::new(tiny::open(&options).unwrap());
        let greedy = |prompt: std::ops::Range<u32>| {
            let model = Arc::clone(&model);
            let greedy = Greedy { model, prompt: prompt.collect(), count: 64, pool: ComputePool::serial() };
            greedy.on_cpu(KvDtype::F32).unwrap()
        };
        let tokens = greedy(3..40);
        let mut different = tokens.clone();
        different.sort_unstable();
        different.dedup();
        assert!(tokens.len() == 64 && different.len() >= 8, "{tokens:?}");
        assert!(tokens != greedy(4..40), "{tokens:?}");
    }
}
