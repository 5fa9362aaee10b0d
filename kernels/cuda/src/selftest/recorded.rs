//! Recorded vectors: inputs and the CPU's results, in files of the repository that are in the binary too. They hold the CPU twins fast
//! over versions (a twin that gives other bits is found without a GPU), and are compared on whatever device there is.
//!
//! `cargo nextest run -p longshore-cuda --run-ignored only record` writes them anew: on purpose, with the change that made them others.

mod attention;
mod file;
mod forward;
mod merge;
mod selection;

use std::sync::Arc;

use self::file::Arrays;
use super::Case;
use crate::{Device, Error};

/// Something that is recorded.
trait Twin: Send + Sync {
    /// Inputs, from a seed.
    fn inputs(&self) -> Result<Arrays, Error>;
    /// What the CPU makes of them.
    fn on_cpu(&self, inputs: &Arrays) -> Result<Arrays, Error>;
    /// How far the device is from `results`, in the units of `limit`.
    fn on_device(&self, device: &Arc<dyn Device>, inputs: &Arrays, results: &Arrays) -> Result<f64, Error>;
    /// Largest distance of a device that is right.
    fn limit(&self) -> f64;
}

/// A twin and its file.
struct Recording {
    name: &'static str,
    bytes: &'static [u8],
    twin: Arc<dyn Twin>,
}

/// A recording by the name of its file.
macro_rules! recording {
    ($name:literal, $twin:expr) => {
        Recording {
            name: $name,
            bytes: include_bytes!(concat!("../../recorded/", $name, ".bin")),
            twin: Arc::new($twin),
        }
    };
}

fn all() -> Vec<Recording> {
    use crate::Precision;
    use longshore_attention::KvDtype;
    vec![
        recording!("attention-f32", attention::Attention(KvDtype::F32)),
        recording!("attention-f16", attention::Attention(KvDtype::F16)),
        recording!("attention-bf16", attention::Attention(KvDtype::Bf16)),
        recording!("attention-int8", attention::Attention(KvDtype::Int8)),
        recording!("merge", merge::Merge),
        recording!("selection", selection::Selection),
        recording!("forward-f32", forward::Forward(Precision::F32)),
        recording!("forward-f16", forward::Forward(Precision::F16)),
        recording!("forward-bf16", forward::Forward(Precision::Bf16)),
    ]
}

/// All files made anew, by name: of the same inputs, so with the same bytes as long as the CPU's results are the same.
pub fn record() -> Result<Vec<(String, Vec<u8>)>, Error> {
    let made = |Recording { name, twin, .. }: Recording| {
        let inputs = twin.inputs()?;
        let results = twin.on_cpu(&inputs)?;
        Ok((format!("{name}.bin"), file::written(&inputs, &results)))
    };
    all().into_iter().map(made).collect()
}

/// The files as they are in the binary, by name.
pub fn recorded() -> Vec<(String, &'static [u8])> {
    all().into_iter().map(|recording| (format!("{}.bin", recording.name), recording.bytes)).collect()
}

/// Of each file two comparisons: how many bytes of its results this machine's CPU makes otherwise, and how far the device is from them.
pub fn recorded_cases() -> Vec<Case> {
    all().into_iter().flat_map(|Recording { name, bytes, twin }| cases_of(name, bytes, twin)).collect()
}

/// The comparisons of a file with the bytes of another.
pub fn recorded_cases_of(name: &str, bytes: &'static [u8]) -> Option<[Case; 2]> {
    let found = all().into_iter().find(|recording| name.strip_suffix(".bin") == Some(recording.name))?;
    Some(cases_of(found.name, bytes, found.twin))
}

fn cases_of(name: &'static str, bytes: &'static [u8], twin: Arc<dyn Twin>) -> [Case; 2] {
    let (limit, own) = (twin.limit(), Arc::clone(&twin));
    let cpu = Case::new(format!("recorded {name}: this machine's CPU"), 0.0, move |_| {
        let (inputs, results) = file::read(name, bytes)?;
        Ok(results.differing(&own.on_cpu(&inputs)?))
    });
    let device = Case::new(format!("recorded {name}"), limit, move |device| {
        let (inputs, results) = file::read(name, bytes)?;
        twin.on_device(device, &inputs, &results)
    });
    [cpu, device]
}
