//! What there is for GPUs: driver, devices, libraries.

use longshore_cuda::{CudaDevice, Driver, Error, Library, Nccl, Nvrtc, locate};
use serde::Serialize;

use super::findings::Problem;
use crate::{
    config::Config,
    device::{self, Choice},
};

/// Driver, devices, libraries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Gpu {
    driver: Part,
    devices: Vec<String>,
    nvrtc: Part,
    cublaslt: Part,
    nccl: Part,
    /// Why the device that the configuration asks for cannot be used.
    unusable: Option<String>,
}

/// Something that is there, or why it is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Part {
    Found(String),
    Missing(String),
}

impl Part {
    fn of(found: Result<String, Error>) -> Self {
        found.map_or_else(|error| Self::Missing(error.to_string()), Self::Found)
    }

    fn text(&self) -> String {
        match self {
            Self::Found(what) => what.clone(),
            Self::Missing(_) => "none".to_owned(),
        }
    }
}

impl Gpu {
    /// Looks at everything; takes nothing of a device.
    pub(super) fn look(config: &Config) -> Self {
        let options = config.cuda.options();
        let folders = &options.library_path;
        let driver = Driver::open(folders);
        let version = driver.as_ref().ok().map(Driver::version);
        let devices = driver.as_ref().ok().and_then(|driver| driver.devices().ok()).unwrap_or_default();
        let nvrtc =
            Nvrtc::open(folders, version).map(|nvrtc| format!("{} at {}", nvrtc.version(), nvrtc.path()));
        let nccl = Nccl::open(folders).map(|nccl| format!("{} at {}", nccl.version_name(), nccl.path()));
        let asked = device::choice(config);
        let unusable = match asked {
            Choice::Cpu => None,
            Choice::Auto | Choice::Cuda(_) => {
                CudaDevice::examine(asked.gpu(), &options).err().map(|e| e.to_string())
            }
        };
        Self {
            driver: Part::of(driver.map(|driver| format!("for CUDA {}", driver.version()))),
            devices: devices.iter().map(|d| format!("cuda:{} {}", d.index, d.description())).collect(),
            nvrtc: Part::of(nvrtc),
            cublaslt: Part::of(locate(Library::CublasLt, folders)),
            nccl: Part::of(nccl),
            unusable,
        }
    }

    /// For people.
    pub(super) fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = match self.devices.is_empty() {
            true => vec![("GPU", "none".to_owned())],
            false => self.devices.iter().map(|device| ("GPU", device.clone())).collect(),
        };
        lines.push(("GPU driver", self.driver.text()));
        let libraries = [("NVRTC", &self.nvrtc), ("cuBLASLt", &self.cublaslt), ("NCCL", &self.nccl)];
        lines.extend(libraries.map(|(name, part)| (name, part.text())));
        lines
    }

    /// Appends what is wrong: nothing is, where no GPU is asked for.
    pub(super) fn problems(&self, config: &Config, problems: &mut Vec<Problem>) {
        if let Some(unusable) = &self.unusable {
            let asked = device::asked(config);
            // Errors of the GPU half end with their remedy.
            let (problem, remedy) =
                unusable.split_once("; hint: ").unwrap_or((unusable, "use `--device cpu`"));
            problems.push(Problem::new(format!("{asked}: {problem}"), remedy));
        }
    }
}
