//! Pseudo-random stored weights, for measurements.

use half::f16;

use super::dequantize::TensorType;

impl TensorType {
    /// Blocks with random quants and one small scale, all finite; the same for the same seed.
    pub fn random_blocks(self, blocks: usize, seed: u64) -> Vec<u8> {
        let (_, bytes) = self.block();
        let mut state = seed;
        let mut data = Vec::with_capacity(blocks * bytes + 8);
        while data.len() < blocks * bytes {
            data.extend(split_mix(&mut state).to_le_bytes());
        }
        data.truncate(blocks * bytes);
        let (scale, minimum) = (f16::from_f32(0.01).to_le_bytes(), f16::from_f32(-0.07).to_le_bytes());
        for block in data.chunks_exact_mut(bytes) {
            match self {
                // The upper byte of the exponent of numbers between 2^-7 and 2^-6.
                Self::F32 => block[3] = 0x3c | (block[3] & 0x80),
                Self::F16 => block[1] = 0x23 | (block[1] & 0x80),
                Self::Bf16 => block[1] = 0x3c | (block[1] & 0x80),
                Self::Q4_0 | Self::Q5_0 | Self::Q8_0 => block[..2].copy_from_slice(&scale),
                Self::Q4_1 | Self::Q5_1 | Self::Q4K | Self::Q5K => {
                    block[..2].copy_from_slice(&scale);
                    block[2..4].copy_from_slice(&minimum);
                }
                Self::Q6K => block[208..].copy_from_slice(&scale),
            }
        }
        data
    }
}

/// SplitMix64.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::dequantize;

    #[test]
    fn random_weights_are_finite_and_differ() {
        for kind in TensorType::ALL {
            let (elements, _) = kind.block();
            let blocks = 1024 / elements;
            let mut values = vec![0.0; 1024];
            assert!(dequantize(kind, &kind.random_blocks(blocks, 5), &mut values), "{kind}");
            let most = values.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            assert!(most > 1e-3 && most < 100.0, "{kind}: {most}");
            assert_ne!(kind.random_blocks(blocks, 5), kind.random_blocks(blocks, 6), "{kind}");
        }
    }
}
