//! Groups of 32 weights read out of stored blocks: unsigned quants and the numbers that go with them.

use half::f16;

use super::format::is_quantised;
use super::panels::GROUP;
use crate::files::{StoredMatrix, TensorType, scale_and_min};

/// 32 weights of a row as a file has quantised them: `scale * (quant - zero) + minimum`, where the first 16 and the last 16
/// have a scale each.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QuantisedGroup {
    /// Unsigned, below twice `zero` where that is not 0.
    pub quants: [u8; GROUP],
    /// Scales of the lower and upper 16 weights.
    pub scales: [f32; 2],
    /// The quant of weight 0 in types without a minimum, else 0.
    pub zero: u8,
    /// Added to every weight.
    pub minimum: f32,
}

impl StoredMatrix<'_> {
    /// Weights `32 * index` to `32 * index + 31` of a row; `None` where the type is not quantised.
    ///
    /// # Panics
    /// When the matrix has no such row or group.
    pub fn quantised_group(&self, row: usize, index: usize) -> Option<QuantisedGroup> {
        if !is_quantised(self.kind) {
            return None;
        }
        let bytes = self.row_bytes();
        let Group { first, second, quants } = stored(self.kind, &self.bytes[row * bytes..][..bytes], index);
        let (scales, zero, minimum) = match self.kind {
            TensorType::Q4_0 => ([first; 2], 8, 0.0),
            TensorType::Q5_0 => ([first; 2], 16, 0.0),
            TensorType::Q8_0 => ([first; 2], 128, 0.0),
            TensorType::Q6K => ([first, second], 32, 0.0),
            _ => ([first; 2], 0, second),
        };
        Some(QuantisedGroup { quants, scales, zero, minimum })
    }
}

/// 32 weights of one output.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group {
    /// The scale, of the lower 16 inputs where there are two.
    pub(super) first: f32,
    /// The minimum, or the scale of the upper 16 inputs, or 0.
    pub(super) second: f32,
    /// Unsigned quants in the order of the inputs.
    pub(super) quants: [u8; GROUP],
}

/// Group `index` of a row of stored blocks of a quantised type.
pub(super) fn stored(kind: TensorType, row: &[u8], index: usize) -> Group {
    let (elements, bytes) = kind.block();
    let groups = elements / GROUP;
    let block = &row[index / groups * bytes..][..bytes];
    match kind {
        TensorType::Q4_0 => Group { first: half_at(block, 0), second: 0.0, quants: nibbles(&block[2..18]) },
        TensorType::Q4_1 => {
            Group { first: half_at(block, 0), second: half_at(block, 2), quants: nibbles(&block[4..20]) }
        }
        TensorType::Q5_0 => {
            let quants = with_fifth_bits(nibbles(&block[6..22]), &block[2..6]);
            Group { first: half_at(block, 0), second: 0.0, quants }
        }
        TensorType::Q5_1 => {
            let quants = with_fifth_bits(nibbles(&block[8..24]), &block[4..8]);
            Group { first: half_at(block, 0), second: half_at(block, 2), quants }
        }
        TensorType::Q8_0 => {
            let quants = std::array::from_fn(|k| block[2 + k] ^ 0x80);
            Group { first: half_at(block, 0), second: 0.0, quants }
        }
        TensorType::Q4K => q4_k(block, index % groups),
        TensorType::Q5K => q5_k(block, index % groups),
        TensorType::Q6K => q6_k(block, index % groups),
        TensorType::F32 | TensorType::F16 | TensorType::Bf16 => {
            unreachable!("floating-point weights have no groups")
        }
    }
}

/// Quantises 32 weights to eight bits with an f16 scale, as `Q8_0` does.
pub(super) fn quantised(weights: &[f32; GROUP]) -> Group {
    let most = weights.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let scale = f16::from_f32(most / 127.0).to_f32();
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let quants = weights.map(|x| ((x * inverse).round().clamp(-127.0, 127.0) as i8 as u8) ^ 0x80);
    // A weight that is not finite is refused like a scale that is not.
    let finite = weights.iter().all(|x| x.is_finite());
    Group { first: if finite { scale } else { f32::NAN }, second: 0.0, quants }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// 16 bytes: low nibbles first, then high ones.
fn nibbles(bytes: &[u8]) -> [u8; GROUP] {
    std::array::from_fn(|k| if k < 16 { bytes[k] & 0xf } else { bytes[k - 16] >> 4 })
}

fn with_fifth_bits(quants: [u8; GROUP], bytes: &[u8]) -> [u8; GROUP] {
    let bits = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    std::array::from_fn(|k| quants[k] | ((bits >> k & 1) << 4) as u8)
}

/// The nibbles of group `index` of a Q4_K or Q5_K block: pairs of groups share 32 bytes.
fn k_nibbles(bytes: &[u8], index: usize) -> [u8; GROUP] {
    let bytes = &bytes[32 * (index / 2)..][..32];
    std::array::from_fn(|k| if index.is_multiple_of(2) { bytes[k] & 0xf } else { bytes[k] >> 4 })
}

fn q4_k(block: &[u8], index: usize) -> Group {
    let (scale, min) = scale_and_min(&block[4..16], index);
    Group {
        first: half_at(block, 0) * scale,
        second: -(half_at(block, 2) * min),
        quants: k_nibbles(&block[16..144], index),
    }
}

fn q5_k(block: &[u8], index: usize) -> Group {
    let (scale, min) = scale_and_min(&block[4..16], index);
    let low = k_nibbles(&block[48..176], index);
    Group {
        first: half_at(block, 0) * scale,
        second: -(half_at(block, 2) * min),
        quants: std::array::from_fn(|k| low[k] | (block[16 + k] >> index & 1) << 4),
    }
}

fn q6_k(block: &[u8], index: usize) -> Group {
    let (half, quarter) = (index / 4, index % 4);
    let low = &block[64 * half + 32 * (quarter % 2)..][..32];
    let top = &block[128 + 32 * half..][..32];
    let d = half_at(block, 208);
    let scale = |upper: usize| d * f32::from(block[192 + 8 * half + 2 * quarter + upper] as i8);
    let quants = std::array::from_fn(|k| {
        let nibble = if quarter < 2 { low[k] & 0xf } else { low[k] >> 4 };
        nibble | (top[k] >> (2 * quarter) & 3) << 4
    });
    Group { first: scale(0), second: scale(1), quants }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_the_dequantised_weights() {
        for kind in TensorType::ALL {
            let (elements, _) = kind.block();
            let matrix = StoredMatrix {
                kind,
                rows: 3,
                cols: 512,
                bytes: kind.random_blocks(3 * 512 / elements, 9).into(),
            };
            let mut expected = vec![0.0; 2 * 512];
            assert!(matrix.dequantize(1..3, &mut expected), "{kind}");
            for (index, expected) in expected.chunks_exact(GROUP).enumerate() {
                let Some(group) = matrix.quantised_group(1 + index / 16, index % 16) else {
                    assert!(!is_quantised(kind), "{kind}");
                    continue;
                };
                for (k, expected) in expected.iter().enumerate() {
                    let quant = f32::from(group.quants[k]) - f32::from(group.zero);
                    let weight = quant * group.scales[k / 16] + group.minimum;
                    assert_eq!(weight, *expected, "{kind}, weight {k} of group {index}");
                }
            }
        }
    }
}
