//! Safetensors files: one, or several with an index.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};
use std::sync::Arc;

use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors};
use serde::Deserialize;

use super::dequantize::TensorType;
use super::fault::{Fault, quote};
use super::mapping::Mapping;
use super::weights::StoredTensor;
use crate::Error;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const SHARDS_MAX: usize = 4_096;

/// Mapped weight files and the tensors in them.
pub(crate) struct Shards {
    /// Names relative to the directory, in the order of `files`.
    pub(crate) names: Vec<String>,
    pub(crate) files: Vec<Arc<Mapping>>,
    pub(crate) tensors: BTreeMap<String, StoredTensor>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Shards {
    /// Maps the weights of a directory and reads their headers.
    pub(crate) fn open(directory: &Path) -> Result<Self, Error> {
        let index_path = directory.join(INDEX);
        let index = match index_path.try_exists() {
            Ok(true) => Some(read_index(&index_path)?),
            _ => None,
        };
        let names = match &index {
            Some(index) => index.weight_map.values().collect::<BTreeSet<_>>().into_iter().cloned().collect(),
            None => vec![SINGLE.to_owned()],
        };
        let mut shards = Self { names, files: Vec::new(), tensors: BTreeMap::new() };
        for name in shards.names.clone() {
            let path = directory.join(&name);
            shards.add(&path)?;
        }
        if let Some(index) = index {
            shards.check_index(&index).map_err(|fault| fault.at(&index_path))?;
        }
        Ok(shards)
    }

    /// Maps one more file.
    fn add(&mut self, path: &Path) -> Result<(), Error> {
        let mapping = Mapping::open(path)?;
        let tensors = parse(&mapping, self.files.len()).map_err(|fault| fault.at(path))?;
        for (name, tensor) in tensors {
            let shown = quote(&name);
            if self.tensors.insert(name, tensor).is_some() {
                return Err(Fault::corrupt(shown, "is in two files").at(path));
            }
        }
        self.files.push(Arc::new(mapping));
        Ok(())
    }

    fn check_index(&self, index: &Index) -> Result<(), Fault> {
        for (tensor, file) in &index.weight_map {
            let found = self.tensors.get(tensor).map(|tensor| &self.names[tensor.file]);
            if found != Some(file) {
                let problem = format!("is not in `{}`, where the index says it is", quote(file));
                return Err(Fault::corrupt(quote(tensor), problem));
            }
        }
        Ok(())
    }
}

fn read_index(path: &Path) -> Result<Index, Error> {
    let mapping = Mapping::open(path)?;
    let at = |fault: Fault| fault.at(path);
    let index: Index = serde_json::from_slice(&mapping).map_err(|error| {
        at(Fault::corrupt("weight_map", format!("cannot be read: {}", quote(&error.to_string()))))
    })?;
    let files: BTreeSet<&String> = index.weight_map.values().collect();
    if files.is_empty() || files.len() > SHARDS_MAX {
        let problem = format!("names {} files, where 1 to {SHARDS_MAX} are expected", files.len());
        return Err(at(Fault::corrupt("weight_map", problem)));
    }
    for file in files {
        let mut parts = Path::new(file).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == file.as_str());
        if !plain || file.contains('\\') {
            let problem = format!("names `{}`, which is no plain file name", quote(file));
            return Err(at(Fault::corrupt("weight_map", problem)));
        }
    }
    Ok(index)
}

/// Reads the header of one file. The crate checks that the tensors follow one another without gaps or overlaps, fill the
/// file to its end, and have the sizes of their shapes; what it cannot know is checked here.
pub(crate) fn parse(file: &[u8], index: usize) -> Result<BTreeMap<String, StoredTensor>, Fault> {
    let (header_bytes, metadata) = SafeTensors::read_metadata(file).map_err(header_fault)?;
    let data_start = 8 + header_bytes;
    let mut tensors = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let kind = match info.dtype {
            Dtype::F32 => TensorType::F32,
            Dtype::F16 => TensorType::F16,
            Dtype::BF16 => TensorType::Bf16,
            other => {
                let feature = format!("tensor `{}` of type {other:?}", quote(&name));
                return Err(Fault::unsupported(feature, "supported types are F32, F16 and BF16"));
            }
        };
        let (from, to) = info.data_offsets;
        let start = data_start.checked_add(from).filter(|_| from <= to);
        let start = start.filter(|_| data_start.checked_add(to).is_some_and(|end| end <= file.len()));
        let start = start.ok_or_else(|| Fault::corrupt(quote(&name), "lies beyond the end of the file"))?;
        let tensor = StoredTensor { file: index, start, bytes: to - from, kind, shape: info.shape.clone() };
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

fn header_fault(error: SafeTensorError) -> Fault {
    match error {
        SafeTensorError::InvalidOffset(tensor) => {
            Fault::corrupt(quote(&tensor), "has offsets that leave a gap, overlap, or run backwards")
        }
        SafeTensorError::TensorInvalidInfo => {
            Fault::corrupt("data_offsets", "disagree with the shape and type of a tensor")
        }
        SafeTensorError::MetadataIncompleteBuffer => Fault::corrupt(
            "data_offsets",
            "do not end where the file ends: it is truncated or has bytes too many",
        ),
        other => Fault::corrupt("header", format!("cannot be read: {}", quote(&other.to_string()))),
    }
}
