//! Writes GGUF files, well-formed unless asked otherwise.

use half::{bf16, f16};

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum MetadataValue {
    /// 32-bit integer.
    U32(u32),
    /// 64-bit integer.
    U64(u64),
    /// 32-bit signed integer.
    I32(i32),
    /// Number.
    F32(f32),
    /// Boolean.
    Bool(bool),
    /// String.
    Text(String),
    /// Array of strings.
    Texts(Vec<String>),
    /// Array of numbers.
    Floats(Vec<f32>),
    /// Array of signed integers.
    Integers(Vec<i32>),
}

impl From<&str> for MetadataValue {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<u32> for MetadataValue {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}

impl From<f32> for MetadataValue {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}

impl MetadataValue {
    /// Number of the type in the file.
    fn kind(&self) -> u32 {
        match self {
            Self::U32(_) => 4,
            Self::I32(_) => 5,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::Text(_) => 8,
            Self::Texts(_) | Self::Floats(_) | Self::Integers(_) => 9,
            Self::U64(_) => 10,
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        let array = |out: &mut Vec<u8>, kind: u32, count: usize| {
            out.extend(kind.to_le_bytes());
            out.extend((count as u64).to_le_bytes());
        };
        match self {
            Self::U32(x) => out.extend(x.to_le_bytes()),
            Self::U64(x) => out.extend(x.to_le_bytes()),
            Self::I32(x) => out.extend(x.to_le_bytes()),
            Self::F32(x) => out.extend(x.to_le_bytes()),
            Self::Bool(x) => out.push(u8::from(*x)),
            Self::Text(x) => text(out, x),
            Self::Texts(x) => {
                array(out, 8, x.len());
                x.iter().for_each(|x| text(out, x));
            }
            Self::Floats(x) => {
                array(out, 6, x.len());
                out.extend(x.iter().flat_map(|x| x.to_le_bytes()));
            }
            Self::Integers(x) => {
                array(out, 5, x.len());
                out.extend(x.iter().flat_map(|x| x.to_le_bytes()));
            }
        }
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Element types that the writer can store from f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredType {
    /// 32-bit float.
    F32,
    /// 16-bit float.
    F16,
    /// bfloat16.
    Bf16,
    /// Blocks of 32 signed bytes with a scale.
    Q8_0,
}

impl StoredType {
    /// Number in the file.
    pub fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 8,
            Self::Bf16 => 30,
        }
    }

    /// Bytes of some elements.
    pub fn encode(self, data: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => data.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Self::F16 => data.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
            Self::Bf16 => data.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            Self::Q8_0 => data.chunks(32).flat_map(encode_q8_0).collect(),
        }
    }
}

fn encode_q8_0(block: &[f32]) -> Vec<u8> {
    let most = block.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let scale = f16::from_f32(most / 127.0);
    let divisor = if scale.to_f32() > 0.0 { scale.to_f32() } else { 1.0 };
    let mut bytes = scale.to_le_bytes().to_vec();
    bytes.extend(block.iter().map(|x| (x / divisor).round().clamp(-127.0, 127.0) as i8 as u8));
    bytes
}

/// A tensor to write.
#[derive(Debug, Clone)]
pub struct WrittenTensor {
    /// Name.
    pub name: String,
    /// Sizes, fastest first as the file has them.
    pub sizes: Vec<u64>,
    /// Number of the element type.
    pub kind: u32,
    /// Content.
    pub bytes: Vec<u8>,
}

/// Collects metadata and tensors and lays them out as a file.
#[derive(Debug, Clone, Default)]
pub struct GgufWriter {
    /// Metadata in order; nothing keeps a key from being there twice.
    pub metadata: Vec<(String, MetadataValue)>,
    /// Tensors in order; nothing keeps them from contradicting themselves.
    pub tensors: Vec<WrittenTensor>,
}

impl GgufWriter {
    const ALIGNMENT: usize = 32;

    /// Sets a metadata value, replacing one of the same key.
    pub fn set(&mut self, key: &str, value: impl Into<MetadataValue>) {
        self.metadata.retain(|(name, _)| name != key);
        self.metadata.push((key.to_owned(), value.into()));
    }

    /// Removes a metadata value.
    pub fn unset(&mut self, key: &str) {
        self.metadata.retain(|(name, _)| name != key);
    }

    /// Adds a tensor; `shape` has the slowest dimension first.
    pub fn tensor(&mut self, name: &str, shape: &[usize], kind: StoredType, data: &[f32]) {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "the data of `{name}` fills its shape");
        self.tensors.push(WrittenTensor {
            name: name.to_owned(),
            sizes: shape.iter().rev().map(|size| *size as u64).collect(),
            kind: kind.id(),
            bytes: kind.encode(data),
        });
    }

    /// The file, with a boundary after each field of the head: what a truncation test cuts at.
    pub fn bytes_and_boundaries(&self) -> (Vec<u8>, Vec<usize>) {
        let mut out = b"GGUF".to_vec();
        let mut boundaries = vec![0, out.len()];
        let mut mark = |out: &Vec<u8>| boundaries.push(out.len());
        out.extend(3u32.to_le_bytes());
        mark(&out);
        out.extend((self.tensors.len() as u64).to_le_bytes());
        mark(&out);
        out.extend((self.metadata.len() as u64).to_le_bytes());
        mark(&out);
        for (key, value) in &self.metadata {
            text(&mut out, key);
            mark(&out);
            out.extend(value.kind().to_le_bytes());
            mark(&out);
            value.write(&mut out);
            mark(&out);
        }
        let mut offset = 0usize;
        for tensor in &self.tensors {
            text(&mut out, &tensor.name);
            mark(&out);
            out.extend((tensor.sizes.len() as u32).to_le_bytes());
            mark(&out);
            out.extend(tensor.sizes.iter().flat_map(|size| size.to_le_bytes()));
            mark(&out);
            out.extend(tensor.kind.to_le_bytes());
            mark(&out);
            out.extend((offset as u64).to_le_bytes());
            mark(&out);
            offset = (offset + tensor.bytes.len()).next_multiple_of(Self::ALIGNMENT);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(Self::ALIGNMENT), 0);
            out.extend(&tensor.bytes);
        }
        (out, boundaries)
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes_and_boundaries().0
    }
}
