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
    /// Whether tiles can go from GPU to GPU.
    nccl_lane: Part,
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
        let nccl = Part::of(nccl);
        let nccl_lane = lane((asked, unusable.as_deref()), &nccl, config.cuda.nccl_lane);
        Self {
            driver: Part::of(driver.map(|driver| format!("for CUDA {}", driver.version()))),
            devices: devices.iter().map(|d| format!("cuda:{} {}", d.index, d.description())).collect(),
            nvrtc: Part::of(nvrtc),
            cublaslt: Part::of(locate(Library::CublasLt, folders)),
            nccl,
            nccl_lane,
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
        lines.push(match &self.nccl_lane {
            Part::Found(how) => ("nccl lane", how.clone()),
            Part::Missing(why) => ("nccl lane", format!("none: {why}")),
        });
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
        if let Part::Missing(why) = &self.nccl_lane
            && config.cuda.nccl_lane
        {
            let (problem, remedy) = why.split_once("; hint: ").unwrap_or((why, "leave it out"));
            problems.push(Problem::new(format!("`cuda.nccl_lane` is set: {problem}"), remedy));
        }
    }
}

/// Whether this process can have the lane `nccl`: on the device that is asked for, unless that cannot be used, with this library.
fn lane((asked, unusable): (Choice, Option<&str>), nccl: &Part, on: bool) -> Part {
    let missing = |why: &str| Part::Missing(why.to_owned());
    match (asked, unusable, nccl) {
        (Choice::Cpu, _, _) => missing("computing on the CPU; hint: pass `--device cuda`"),
        (_, Some(why), _) => missing(why),
        (_, None, Part::Missing(why)) => missing(why),
        (_, None, Part::Found(_)) if on => Part::Found("on; never run on a GPU yet".to_owned()),
        (_, None, Part::Found(_)) => Part::Found("off; `cuda.nccl_lane` turns it on".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lane_needs_a_gpu_and_the_library() {
        let there = Part::Found("2.27.3".to_owned());
        let gone = Part::Missing("no NCCL; hint: install it".to_owned());
        let told = |asked, unusable, nccl, on| lane((asked, unusable), nccl, on);
        assert!(
            matches!(told(Choice::Cuda(0), None, &there, true), Part::Found(how) if how.starts_with("on"))
        );
        assert!(
            matches!(told(Choice::Auto, None, &there, false), Part::Found(how) if how.starts_with("off"))
        );
        assert!(
            matches!(told(Choice::Cpu, None, &there, true), Part::Missing(why) if why.contains("--device"))
        );
        assert_eq!(
            told(Choice::Cuda(0), Some("no driver"), &there, true),
            Part::Missing("no driver".to_owned())
        );
        assert_eq!(told(Choice::Cuda(0), None, &gone, true), gone);
    }
}
