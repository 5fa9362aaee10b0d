//! Element types of stored tensors, and how their bytes become f32.
//!
//! Quantised types store blocks along a row: 32 elements with one or two f16 constants, or 256 elements with 6-bit or
//! 8-bit scales of sub-blocks. Each function takes exactly one block and fills exactly its elements.

use half::{bf16, f16};

use crate::Error;

/// Element type of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TensorType {
    /// 32-bit float.
    F32,
    /// 16-bit float.
    F16,
    /// bfloat16.
    Bf16,
    /// Blocks of 32: 4 bits, f16 scale.
    Q4_0,
    /// Blocks of 32: 4 bits, f16 scale and minimum.
    Q4_1,
    /// Blocks of 32: 5 bits, f16 scale.
    Q5_0,
    /// Blocks of 32: 5 bits, f16 scale and minimum.
    Q5_1,
    /// Blocks of 32: 8 bits, f16 scale.
    Q8_0,
    /// Blocks of 256: 4 bits, 6-bit scales and minimums of 32 elements.
    Q4K,
    /// Blocks of 256: 5 bits, 6-bit scales and minimums of 32 elements.
    Q5K,
    /// Blocks of 256: 6 bits, 8-bit scales of 16 elements.
    Q6K,
}

impl TensorType {
    /// Every type, for messages and tests.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// Name as people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// What is wrong with `[outputs, inputs]` elements in `bytes` bytes, row by row, as a field and a verb phrase.
    pub fn fault_of_matrix(
        self,
        [outputs, inputs]: [usize; 2],
        bytes: usize,
    ) -> Option<(&'static str, String)> {
        let (elements, block_bytes) = self.block();
        if outputs == 0 || inputs == 0 || !inputs.is_multiple_of(elements) {
            let problem =
                format!("is [{outputs}, {inputs}], must be rows of one or more {self} blocks of {elements}");
            return Some(("shape", problem));
        }
        let expected = (inputs / elements * block_bytes).checked_mul(outputs);
        let problem = || format!("has {bytes}, must have {}", expected.unwrap_or(usize::MAX));
        (expected != Some(bytes)).then(|| ("bytes", problem()))
    }

    /// Elements and bytes of one block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        }
    }

    fn decode_block(self) -> fn(&[u8], &mut [f32]) {
        match self {
            Self::F32 => |b, out| out[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            Self::F16 => |b, out| out[0] = half_at(b, 0),
            Self::Bf16 => |b, out| out[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            Self::Q4_0 => q4_0,
            Self::Q4_1 => q4_1,
            Self::Q5_0 => q5_0,
            Self::Q5_1 => q5_1,
            Self::Q8_0 => q8_0,
            Self::Q4K => q4_k,
            Self::Q5K => q5_k,
            Self::Q6K => q6_k,
        }
    }
}

/// Dequantises whole blocks; `bytes` and `out` must agree in blocks. Returns false when a value is not finite.
pub(crate) fn dequantize(kind: TensorType, bytes: &[u8], out: &mut [f32]) -> bool {
    let (elements, block_bytes) = kind.block();
    assert_eq!(
        bytes.len() / block_bytes,
        out.len() / elements,
        "tensor sizes were checked when the file was opened"
    );
    assert!(
        bytes.len().is_multiple_of(block_bytes) && out.len().is_multiple_of(elements),
        "tensors are whole blocks"
    );
    let decode = kind.decode_block();
    for (out, block) in out.chunks_exact_mut(elements).zip(bytes.chunks_exact(block_bytes)) {
        decode(block, out);
    }
    out.iter().all(|x| x.is_finite())
}

impl std::fmt::Display for TensorType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for TensorType {
    type Err = Error;

    /// Names as [`TensorType::name`] gives them, in either case.
    fn from_str(text: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|kind| kind.name().eq_ignore_ascii_case(text)).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            Error::Invalid {
                field: "type".to_owned(),
                problem: format!("is `{text}`, must be one of {known}"),
            }
        })
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Low and high nibble.
fn nibbles(byte: u8) -> (i32, i32) {
    (i32::from(byte & 0xf), i32::from(byte >> 4))
}

fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (j, &byte) in block[2..18].iter().enumerate() {
        let (low, high) = nibbles(byte);
        out[j] = (low - 8) as f32 * d;
        out[j + 16] = (high - 8) as f32 * d;
    }
}

fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (j, &byte) in block[4..20].iter().enumerate() {
        let (low, high) = nibbles(byte);
        out[j] = low as f32 * d + m;
        out[j + 16] = high as f32 * d + m;
    }
}

/// The fifth bits of the 32 elements of a Q5 block.
fn fifth_bits(bytes: &[u8]) -> impl Fn(usize) -> i32 {
    let bits = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    move |element| ((bits >> element & 1) << 4) as i32
}

fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let fifth = fifth_bits(&block[2..6]);
    for (j, &byte) in block[6..22].iter().enumerate() {
        let (low, high) = nibbles(byte);
        out[j] = ((low | fifth(j)) - 16) as f32 * d;
        out[j + 16] = ((high | fifth(j + 16)) - 16) as f32 * d;
    }
}

fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let fifth = fifth_bits(&block[4..8]);
    for (j, &byte) in block[8..24].iter().enumerate() {
        let (low, high) = nibbles(byte);
        out[j] = (low | fifth(j)) as f32 * d + m;
        out[j + 16] = (high | fifth(j + 16)) as f32 * d + m;
    }
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (out, &byte) in out.iter_mut().zip(&block[2..34]) {
        *out = f32::from(byte as i8) * d;
    }
}

/// The 6-bit scale and minimum of sub-block `j` (of 8) that Q4_K and Q5_K pack into 12 bytes: sub-blocks 0 to 3 lie in the
/// low six bits of bytes 0 to 7; of 4 to 7 the low nibbles lie in bytes 8 to 11, the high two bits above the former.
pub(crate) fn scale_and_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        ((packed[j + 4] & 0xf) | (packed[j - 4] >> 6 << 4), (packed[j + 4] >> 4) | (packed[j] >> 6 << 4))
    };
    (f32::from(scale), f32::from(min))
}

fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, d_min) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    for (pair, quants) in block[16..144].chunks_exact(32).enumerate() {
        let (scale_low, min_low) = scale_and_min(packed, 2 * pair);
        let (scale_high, min_high) = scale_and_min(packed, 2 * pair + 1);
        for (l, &byte) in quants.iter().enumerate() {
            let (low, high) = nibbles(byte);
            out[64 * pair + l] = d * scale_low * low as f32 - d_min * min_low;
            out[64 * pair + 32 + l] = d * scale_high * high as f32 - d_min * min_high;
        }
    }
}

fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, d_min) = (half_at(block, 0), half_at(block, 2));
    let (packed, fifth) = (&block[4..16], &block[16..48]);
    for (pair, quants) in block[48..176].chunks_exact(32).enumerate() {
        let (scale_low, min_low) = scale_and_min(packed, 2 * pair);
        let (scale_high, min_high) = scale_and_min(packed, 2 * pair + 1);
        for (l, &byte) in quants.iter().enumerate() {
            let (low, high) = nibbles(byte);
            let low = low | i32::from(fifth[l] >> (2 * pair) & 1) << 4;
            let high = high | i32::from(fifth[l] >> (2 * pair + 1) & 1) << 4;
            out[64 * pair + l] = d * scale_low * low as f32 - d_min * min_low;
            out[64 * pair + 32 + l] = d * scale_high * high as f32 - d_min * min_high;
        }
    }
}

fn q6_k(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 208);
    for half in 0..2 {
        let low = &block[64 * half..64 * half + 64];
        let top = &block[128 + 32 * half..160 + 32 * half];
        let scales = &block[192 + 8 * half..200 + 8 * half];
        for l in 0..32 {
            let (a, b) = (nibbles(low[l]), nibbles(low[l + 32]));
            let quants = [a.0, b.0, a.1, b.1];
            for (quarter, quant) in quants.into_iter().enumerate() {
                let quant = quant | i32::from(top[l] >> (2 * quarter) & 3) << 4;
                let scale = f32::from(scales[2 * quarter + l / 16] as i8);
                out[128 * half + 32 * quarter + l] = d * scale * (quant - 32) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests;
