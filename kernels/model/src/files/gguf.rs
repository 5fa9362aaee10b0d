//! GGUF files, versions 2 and 3: header, metadata and the table of tensors. Every length, offset and count is checked
//! against the file before anything is allocated or read; the result borrows from the file.

mod config;
mod read;

use std::collections::BTreeMap;

use super::dequantize::TensorType;
use super::fault::{Fault, quote};
use super::weights::StoredTensor;
use read::{Cursor, ValueKind};

pub(crate) use config::model_config;
pub(crate) use read::{Array, Value};

const MAGIC: &[u8; 4] = b"GGUF";
const ALIGNMENT_KEY: &str = "general.alignment";
const ALIGNMENT_DEFAULT: u64 = 32;
const ALIGNMENT_MAX: u64 = 1 << 20;
const KEY_BYTES_MAX: u64 = 65_535;
const NAME_BYTES_MAX: u64 = 1_024;
const METADATA_COUNT_MAX: u64 = 65_536;
const TENSOR_COUNT_MAX: u64 = 1 << 20;
const DIMENSIONS_MAX: u32 = 4;

/// What the head of a GGUF file says.
#[derive(Debug)]
pub(crate) struct Gguf<'a> {
    pub(crate) metadata: Metadata<'a>,
    /// Ranges lie within the file, do not overlap, and have the size of their shape and type.
    pub(crate) tensors: BTreeMap<String, StoredTensor>,
}

impl<'a> Gguf<'a> {
    /// Reads the head of a whole file.
    pub(crate) fn parse(file: &'a [u8]) -> Result<Self, Fault> {
        let mut cursor = Cursor::new(file);
        let magic = cursor.take(4, "magic")?;
        if magic != MAGIC {
            let problem =
                format!("is `{}`, where `GGUF` is expected", quote(&String::from_utf8_lossy(magic)));
            return Err(Fault::corrupt("magic", problem));
        }
        check_version(cursor.u32("version")?)?;
        // A tensor takes at least its name's length, dimensions, one size, type and offset; an entry its key, type, value.
        let tensor_count =
            limited(cursor.count(8 + 4 + 8 + 4 + 8, "tensor_count")?, TENSOR_COUNT_MAX, "tensor_count")?;
        let metadata_count =
            limited(cursor.count(8 + 4 + 1, "metadata_kv_count")?, METADATA_COUNT_MAX, "metadata_kv_count")?;
        let metadata = Metadata::read(&mut cursor, metadata_count)?;
        let headers = (0..tensor_count)
            .map(|index| TensorHeader::read(&mut cursor, index))
            .collect::<Result<Vec<_>, _>>()?;
        let alignment = metadata.alignment()?;
        let data_start = (cursor.position() as u64).next_multiple_of(alignment);
        let tensors = place(headers, data_start, alignment, file.len() as u64)?;
        Ok(Self { metadata, tensors })
    }
}

fn check_version(version: u32) -> Result<(), Fault> {
    const HINT: &str = "convert the model to a little-endian GGUF of version 2 or 3";
    match version {
        2 | 3 => Ok(()),
        1 => Err(Fault::unsupported("GGUF version 1", HINT)),
        swapped if matches!(swapped.swap_bytes(), 1..=3) => Err(Fault::unsupported("big-endian GGUF", HINT)),
        other => Err(Fault::corrupt("version", format!("is {other}, where 2 or 3 is expected"))),
    }
}

fn limited(count: u64, max: u64, field: &str) -> Result<u64, Fault> {
    if count > max {
        return Err(Fault::corrupt(field, format!("is {count}, where {max} is the limit")));
    }
    Ok(count)
}

/// The key-value pairs of a GGUF file.
#[derive(Debug, Default)]
pub(crate) struct Metadata<'a> {
    values: BTreeMap<&'a str, Value<'a>>,
}

impl<'a> Metadata<'a> {
    fn read(cursor: &mut Cursor<'a>, count: u64) -> Result<Self, Fault> {
        let mut values = BTreeMap::new();
        for index in 0..count {
            let key = cursor.text(KEY_BYTES_MAX, &format!("key of metadata entry {index}"))?;
            let shown = quote(key);
            let kind = ValueKind::read(cursor, &shown)?;
            let value = cursor.value(kind, &shown)?;
            if values.insert(key, value).is_some() {
                return Err(Fault::corrupt(shown, "is there twice"));
            }
        }
        Ok(Self { values })
    }

    fn alignment(&self) -> Result<u64, Fault> {
        let alignment = self.unsigned(ALIGNMENT_KEY)?.unwrap_or(ALIGNMENT_DEFAULT);
        if !alignment.is_power_of_two() || !(8..=ALIGNMENT_MAX).contains(&alignment) {
            let problem =
                format!("is {alignment}, where a power of two from 8 to {ALIGNMENT_MAX} is expected");
            return Err(Fault::corrupt(ALIGNMENT_KEY, problem));
        }
        Ok(alignment)
    }

    /// The value, if any.
    pub(crate) fn get(&self, key: &str) -> Option<Value<'a>> {
        self.values.get(key).copied()
    }

    fn typed<T>(
        &self,
        key: &str,
        want: &str,
        read: impl Fn(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, Fault> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let typed = read(value);
        typed
            .map(Some)
            .ok_or_else(|| Fault::corrupt(key, format!("is {}, where {want} is expected", value.describe())))
    }

    /// A non-negative integer.
    pub(crate) fn unsigned(&self, key: &str) -> Result<Option<u64>, Fault> {
        self.typed(key, "a non-negative integer", |value| value.unsigned())
    }

    /// A number.
    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>, Fault> {
        self.typed(key, "a number", |value| value.float())
    }

    /// A string.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, Fault> {
        self.typed(key, "a string", |value| match value {
            Value::Text(text) => Some(text),
            _ => None,
        })
    }

    /// A boolean.
    pub(crate) fn boolean(&self, key: &str) -> Result<Option<bool>, Fault> {
        self.typed(key, "a boolean", |value| match value {
            Value::Bool(flag) => Some(flag),
            _ => None,
        })
    }

    /// An array.
    pub(crate) fn array(&self, key: &str) -> Result<Option<Array<'a>>, Fault> {
        self.typed(key, "an array", |value| match value {
            Value::Array(array) => Some(array),
            _ => None,
        })
    }
}

/// An entry of the tensor table, before its place in the file is checked.
struct TensorHeader {
    name: String,
    /// Slowest dimension first.
    shape: Vec<usize>,
    kind: TensorType,
    bytes: u64,
    offset: u64,
}

impl TensorHeader {
    fn read(cursor: &mut Cursor<'_>, index: u64) -> Result<Self, Fault> {
        let name = cursor.text(NAME_BYTES_MAX, &format!("name of tensor {index}"))?.to_owned();
        let shown = quote(&name);
        let dimensions = cursor.u32(&shown)?;
        if !(1..=DIMENSIONS_MAX).contains(&dimensions) {
            let problem = format!("has {dimensions} dimensions, where 1 to {DIMENSIONS_MAX} are expected");
            return Err(Fault::corrupt(shown, problem));
        }
        let mut sizes = Vec::with_capacity(DIMENSIONS_MAX as usize);
        for _ in 0..dimensions {
            sizes.push(cursor.u64(&shown)?);
        }
        let kind = tensor_type(cursor.u32(&shown)?, &shown)?;
        let offset = cursor.u64(&shown)?;
        let bytes = stored_bytes(&sizes, kind).ok_or_else(|| {
            let problem =
                format!("has sizes {sizes:?}, which are not whole {} blocks of a real tensor", kind.name());
            Fault::corrupt(&shown, problem)
        })?;
        let shape = sizes.iter().rev().map(|size| *size as usize).collect();
        Ok(Self { name, shape, kind, bytes, offset })
    }
}

/// Bytes of a tensor; `None` for empty tensors, rows of broken blocks, and sizes that overflow.
fn stored_bytes(sizes: &[u64], kind: TensorType) -> Option<u64> {
    let (block_elements, block_bytes) = kind.block();
    let elements = sizes.iter().try_fold(1u64, |product, size| product.checked_mul(*size))?;
    usize::try_from(elements.checked_mul(4)?).ok()?;
    if elements == 0 || !sizes[0].is_multiple_of(block_elements as u64) {
        return None;
    }
    (elements / block_elements as u64).checked_mul(block_bytes as u64)
}

/// The type with this number in the file.
fn tensor_type(id: u32, tensor: &str) -> Result<TensorType, Fault> {
    Ok(match id {
        0 => TensorType::F32,
        1 => TensorType::F16,
        2 => TensorType::Q4_0,
        3 => TensorType::Q4_1,
        6 => TensorType::Q5_0,
        7 => TensorType::Q5_1,
        8 => TensorType::Q8_0,
        12 => TensorType::Q4K,
        13 => TensorType::Q5K,
        14 => TensorType::Q6K,
        30 => TensorType::Bf16,
        other => {
            let name =
                UNSUPPORTED_TYPES.iter().find(|(id, _)| *id == other).map_or("unknown", |(_, name)| name);
            let supported = TensorType::ALL.map(TensorType::name).join(", ");
            return Err(Fault::unsupported(
                format!("tensor `{tensor}` of type {other} ({name})"),
                format!("supported types are {supported}"),
            ));
        }
    })
}

/// Types that exist and are not implemented, for messages.
const UNSUPPORTED_TYPES: [(u32, &str); 17] = [
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
];

/// Finds every tensor's range in the file.
fn place(
    headers: Vec<TensorHeader>,
    data_start: u64,
    alignment: u64,
    file_bytes: u64,
) -> Result<BTreeMap<String, StoredTensor>, Fault> {
    let mut tensors = BTreeMap::new();
    let mut ranges = Vec::with_capacity(headers.len());
    for header in headers {
        let shown = quote(&header.name);
        if !header.offset.is_multiple_of(alignment) {
            let problem = format!("lies at offset {}, which is no multiple of {alignment}", header.offset);
            return Err(Fault::corrupt(shown, problem));
        }
        let start = data_start.checked_add(header.offset);
        let Some((start, end)) = start
            .and_then(|start| Some((start, start.checked_add(header.bytes)?)))
            .filter(|(_, end)| *end <= file_bytes)
        else {
            let problem = format!(
                "takes {} bytes at offset {} of the data, beyond the end of the file",
                header.bytes, header.offset
            );
            return Err(Fault::corrupt(shown, problem));
        };
        let tensor = StoredTensor {
            file: 0,
            start: start as usize,
            bytes: header.bytes as usize,
            kind: header.kind,
            shape: header.shape,
        };
        ranges.push((start, end, header.name.clone()));
        if tensors.insert(header.name, tensor).is_some() {
            return Err(Fault::corrupt(shown, "is there twice"));
        }
    }
    super::refuse_overlaps(ranges)?;
    Ok(tensors)
}

#[cfg(test)]
mod tests;
