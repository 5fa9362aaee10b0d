//! Libraries and compiled kernels of GPUs.

use std::path::PathBuf;

use longshore_chassis::{Fault, Validate};
use longshore_cuda::{CAPABILITY_MIN, CudaOptions};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::model::Cache;

/// Libraries and compiled kernels of GPUs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct CudaConfig {
    /// Folders that are searched first for CUDA's libraries: folders of libraries, or Python's `site-packages` with NVIDIA's
    /// wheels. After them come the system's own and `/usr/local/cuda/lib64`.
    pub(crate) library_path: Vec<String>,
    /// Folder of compiled kernels; empty: `kernels` in the user's cache.
    pub(crate) cache_path: String,
    /// Bytes of GPU memory for copies of tiles, which attention reads; 0: three quarters of what the weights leave.
    pub(crate) page_bytes: u64,
    /// Compute capability of the deployment's GPUs, 10 × major + minor (90 for 9.0): what K and V are depends on it. 0: that of the GPU
    /// of this process; processes without one must be told.
    pub(crate) capability: u32,
    /// Whether tiles and large partials go from GPU to GPU over NCCL (lane `nccl`) where both processes have both. It was never run on a
    /// GPU: off by default.
    pub(crate) nccl_lane: bool,
    /// Whether prompts are attended to by warp groups (`wgmma`) where the GPU has them, which is on compute capability 9.0. It was never run
    /// on a GPU: off by default. Other bits than without, so all processes of a deployment must agree.
    pub(crate) wgmma: bool,
}

impl CudaConfig {
    /// What the GPU half is opened with.
    pub(crate) fn options(&self) -> CudaOptions {
        // Without any cache kernels are compiled by every process anew, which works too.
        let of_user = || Cache::of_user().ok().map(|cache| cache.kernels());
        let own = (!self.cache_path.is_empty()).then(|| PathBuf::from(&self.cache_path));
        CudaOptions {
            library_path: self.library_path.iter().map(PathBuf::from).collect(),
            cache_path: own.or_else(of_user),
        }
    }
}

impl Validate for CudaConfig {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        for folder in self.library_path.iter().filter(|folder| !PathBuf::from(folder).is_dir()) {
            faults.push(Fault::new(path, "library_path", format!("has `{folder}`, which is no folder")));
        }
        if self.capability != 0 && !(CAPABILITY_MIN..1000).contains(&self.capability) {
            let problem = format!(
                "is {}, must be 10 × major + minor of a compute capability from {CAPABILITY_MIN} on, or 0",
                self.capability
            );
            faults.push(Fault::new(path, "capability", problem));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_that_are_not_there_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().display().to_string();
        let mut config = CudaConfig { library_path: vec![there.clone()], ..CudaConfig::default() };
        let mut faults = Vec::new();
        config.faults("cuda", &mut faults);
        assert_eq!(faults, Vec::new());
        assert_eq!(config.options().library_path, [PathBuf::from(&there)]);
        config.library_path.push(format!("{there}/nowhere"));
        config.faults("cuda", &mut faults);
        assert!(faults.len() == 1 && faults[0].key == "cuda.library_path", "{faults:?}");
    }

    #[test]
    fn capabilities_that_no_kernel_is_for_are_refused() {
        for (capability, faults_wanted) in [(0, 0), (80, 0), (90, 0), (121, 0), (9, 1), (75, 1), (900_000, 1)]
        {
            let mut faults = Vec::new();
            CudaConfig { capability, ..CudaConfig::default() }.faults("cuda", &mut faults);
            assert_eq!(faults.len(), faults_wanted, "{capability}: {faults:?}");
            assert!(faults.iter().all(|fault| fault.key == "cuda.capability"), "{faults:?}");
        }
    }

    #[test]
    fn the_cache_is_the_users_unless_it_is_named() {
        let config = CudaConfig { cache_path: "/somewhere/else".to_owned(), ..CudaConfig::default() };
        assert_eq!(config.options().cache_path, Some(PathBuf::from("/somewhere/else")));
        let own = CudaConfig::default().options().cache_path;
        assert!(own.is_none_or(|path| path.ends_with("kernels")));
    }
}
