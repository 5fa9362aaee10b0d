//! Kernels to machine code: from the cache where it has them, else by NVRTC.

use std::path::PathBuf;

use crate::{
    Architecture, Error, Kernel, Nvrtc, Source, Version,
    cache::{Cache, Key},
    nvrtc::OPTIONS,
};

/// What comes before every source, and what sources may include.
pub const HEADERS: &[Source] = &[
    Source { name: "ptx.cuh", text: include_str!("../source/ptx.cuh") },
    Source { name: "sums.cuh", text: include_str!("../source/sums.cuh") },
    Source { name: "visits.cuh", text: include_str!("../source/visits.cuh") },
    Source { name: "warpgroup.cuh", text: include_str!("../source/warpgroup.cuh") },
];

/// Where libraries are found and code is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CudaOptions {
    /// Folders that are searched first for CUDA's libraries: folders of libraries, or Python's `site-packages` with NVIDIA's wheels.
    pub library_path: Vec<PathBuf>,
    /// Folder of compiled kernels; `None`: they are compiled anew by each process.
    pub cache_path: Option<PathBuf>,
}

/// Compiles kernels.
#[derive(Debug)]
pub struct Compiler {
    nvrtc: Nvrtc,
    cache: Option<Cache>,
    headers: &'static [Source],
}

impl Compiler {
    /// A compiler for a driver of CUDA `driver`; `None`: the newest that NVRTC makes code for.
    pub fn open(options: &CudaOptions, driver: Option<Version>) -> Result<Self, Error> {
        let nvrtc = Nvrtc::open(&options.library_path, driver)?;
        let cache = options.cache_path.as_deref().map(Cache::open).transpose()?;
        Ok(Self { nvrtc, cache, headers: HEADERS })
    }

    /// NVRTC.
    pub fn nvrtc(&self) -> &Nvrtc {
        &self.nvrtc
    }

    /// Machine code of the source of `kernel` with its constants.
    pub fn cubin(&self, kernel: &Kernel, architecture: Architecture) -> Result<Vec<u8>, Error> {
        let key = self.key(kernel, architecture);
        if let Some(found) = self.cache.as_ref().and_then(|cache| cache.get(&key)) {
            return Ok(found);
        }
        let compiled = self.nvrtc.compile(kernel, self.headers, architecture)?;
        if let Some(cache) = &self.cache {
            cache.put(&key, &compiled.cubin);
        }
        Ok(compiled.cubin)
    }

    /// Digest of everything that the code depends on. The entry is left out: the code has all entries of its source.
    fn key(&self, kernel: &Kernel, architecture: Architecture) -> Key {
        let mut hasher = blake3::Hasher::new();
        // With its length, so that no two lists of texts look the same.
        let mut add = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        };
        let version = self.nvrtc.version();
        [format!("NVRTC {version}"), architecture.to_string()].iter().for_each(|text| add(text));
        OPTIONS.iter().for_each(|option| add(option));
        for source in std::iter::once(&kernel.source).chain(self.headers) {
            add(source.name);
            add(source.text);
        }
        for (name, value) in &kernel.constants {
            add(name);
            add(&value.to_string());
        }
        *hasher.finalize().as_bytes()
    }
}
