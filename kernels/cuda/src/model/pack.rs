//! Packs rows of weights as kernels read them; the forms are described in `linear_few.cu`.

use bytemuck::cast_slice_mut;
use half::{bf16, f16};
use longshore_model::{QuantisedGroup, StoredMatrix, TensorType};

use super::programs::{Form, GROUP, Precision};

/// Inputs of a step, and weights of a quantised group.
const STEP: usize = 32;
const STEPS: usize = GROUP / STEP;
/// Lanes that share a row.
const QUAD: usize = 4;

/// Why a row cannot be packed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Problem {
    /// A weight, or a scale, is infinite or NaN.
    NotFinite,
    /// A weight is finite, but too large for f16.
    TooLarge(f32),
}

impl Form {
    /// How a backend keeps weights of a type.
    pub(super) fn of(precision: Precision, kind: TensorType, keep_quantised: bool) -> Self {
        match (precision, kind) {
            (Precision::F32, _) => Self::F32,
            (_, TensorType::Q4_0 | TensorType::Q4_1 | TensorType::Q4K) if keep_quantised => Self::Nibbles,
            (_, TensorType::Q5_0 | TensorType::Q6K | TensorType::Q8_0) if keep_quantised => Self::Bytes,
            _ => Self::Plain,
        }
    }

    /// Bytes of the weights and of the constants of one output.
    pub(super) fn row_bytes(self, inputs: usize) -> [usize; 2] {
        let groups = inputs.div_ceil(GROUP);
        match self {
            Self::F32 => [inputs * 4, 0],
            Self::Plain => [groups * GROUP * 2, 0],
            Self::Bytes => [groups * GROUP, groups * STEPS * 4],
            Self::Nibbles => [groups * GROUP / 2, groups * STEPS * 4],
        }
    }
}

/// Packs a row of a stored matrix into zeroed memory of [`Form::row_bytes`]; both parts are aligned to 4 bytes.
pub(super) fn pack_row(
    (form, precision): (Form, Precision),
    matrix: &StoredMatrix<'_>,
    row: usize,
    weights: &mut [u8],
    constants: &mut [u8],
) -> Result<(), Problem> {
    match form {
        Form::F32 => {
            let finite = matrix.dequantize(row..row + 1, cast_slice_mut(weights));
            if finite { Ok(()) } else { Err(Problem::NotFinite) }
        }
        Form::Plain => pack_plain(precision, matrix, row, weights),
        Form::Bytes => pack_steps(precision, matrix, row, (weights, constants), pack_bytes),
        Form::Nibbles => pack_steps(precision, matrix, row, (weights, constants), pack_nibbles),
    }
}

fn pack_plain(
    precision: Precision,
    matrix: &StoredMatrix<'_>,
    row: usize,
    weights: &mut [u8],
) -> Result<(), Problem> {
    let mut wide = vec![0.0; matrix.cols];
    if !matrix.dequantize(row..row + 1, &mut wide) {
        return Err(Problem::NotFinite);
    }
    let halves: &mut [u16] = cast_slice_mut(weights);
    for (half, x) in halves.iter_mut().zip(wide) {
        *half = match precision {
            Precision::F16 => half_of(x)?.to_bits(),
            // Only what rounds up to an infinity is not finite.
            Precision::Bf16 if bf16::from_f32(x).is_infinite() => return Err(Problem::TooLarge(x)),
            Precision::Bf16 => bf16::from_f32(x).to_bits(),
            Precision::F32 => unreachable!("f32 weights are not packed"),
        };
    }
    Ok(())
}

/// An f16, unless that would be infinite.
fn half_of(x: f32) -> Result<f16, Problem> {
    let half = f16::from_f32(x);
    match (half.is_finite(), x.is_finite()) {
        (true, _) => Ok(half),
        (false, true) => Err(Problem::TooLarge(x)),
        (false, false) => Err(Problem::NotFinite),
    }
}

/// Packs step by step; `pack(group, step, words)` fills the words of a group of 128 inputs and gives the step's constants.
fn pack_steps(
    precision: Precision,
    matrix: &StoredMatrix<'_>,
    row: usize,
    (weights, constants): (&mut [u8], &mut [u8]),
    pack: impl Fn(&QuantisedGroup, usize, &mut [u32]) -> [f32; 2],
) -> Result<(), Problem> {
    let words_of_group = weights.len() / constants.len() * STEPS;
    let (words, constants): (&mut [u32], &mut [u32]) = (cast_slice_mut(weights), cast_slice_mut(constants));
    for step in 0..matrix.cols / STEP {
        let quantised = matrix.quantised_group(row, step).expect("quantised forms are of quantised types");
        let words = &mut words[step / STEPS * words_of_group..][..words_of_group];
        let [low, high] = pack(&quantised, step % STEPS, words);
        if precision == Precision::F16 {
            let weights = quantised.quants.iter().enumerate().map(|(k, quant)| weight(&quantised, k, *quant));
            weights.map(half_of).try_for_each(|half| half.map(drop))?;
        }
        let (low, high) = (half_of(low)?.to_bits(), half_of(high)?.to_bits());
        constants[step] = u32::from(low) | u32::from(high) << 16;
    }
    Ok(())
}

fn weight(group: &QuantisedGroup, k: usize, quant: u8) -> f32 {
    (f32::from(quant) - f32::from(group.zero)) * group.scales[k / 16] + group.minimum
}

fn pack_bytes(group: &QuantisedGroup, step: usize, words: &mut [u32]) -> [f32; 2] {
    let quants = group.quants.map(|quant| u32::from(quant + (128 - group.zero)));
    for (lane, quants) in quants.as_chunks::<8>().0.iter().enumerate() {
        for (half, quad) in quants.as_chunks::<4>().0.iter().enumerate() {
            let word = step / 2 * 4 * QUAD + lane * 4 + step % 2 * 2 + half;
            words[word] = quad[0] | quad[2] << 8 | quad[1] << 16 | quad[3] << 24;
        }
    }
    group.scales
}

fn pack_nibbles(group: &QuantisedGroup, step: usize, words: &mut [u32]) -> [f32; 2] {
    for (lane, quants) in group.quants.as_chunks::<8>().0.iter().enumerate() {
        let pair =
            |p: usize| u32::from(quants[2 * p]) << (4 * p) | u32::from(quants[2 * p + 1]) << (16 + 4 * p);
        words[lane * STEPS + step] = (0..4).map(pair).sum();
    }
    [group.scales[0], group.minimum - f32::from(group.zero) * group.scales[0]]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row of `Q8_0`: one block of quants 0 to 31 under `scale`.
    fn q8_0(scale: f16) -> StoredMatrix<'static> {
        let bytes: Vec<u8> = scale.to_le_bytes().into_iter().chain(0..32).collect();
        StoredMatrix { kind: TensorType::Q8_0, rows: 1, cols: 32, bytes: bytes.into() }
    }

    fn packed(form: Form, precision: Precision, matrix: &StoredMatrix<'_>) -> Result<[Vec<u8>; 2], Problem> {
        let mut parts = form.row_bytes(matrix.cols).map(|bytes| vec![0; bytes]);
        let [weights, constants] = &mut parts;
        pack_row((form, precision), matrix, 0, weights, constants)?;
        Ok(parts)
    }

    #[test]
    fn bytes_lie_as_lanes_read_them() {
        let [weights, constants] = packed(Form::Bytes, Precision::F16, &q8_0(f16::from_f32(0.5))).unwrap();
        assert_eq!((weights.len(), constants.len()), (128, 16));
        // Lane 1 reads 16 bytes at 16: inputs 8 to 15 of step 0 in its first two words.
        assert_eq!(weights[16..24], [8u8, 10, 9, 11, 12, 14, 13, 15].map(|quant| quant + 128));
        assert_eq!(constants[..4], [0, 0x38, 0, 0x38]);
        assert!(weights[24..32].iter().chain(&weights[64..]).chain(&constants[4..]).all(|byte| *byte == 0));
    }

    #[test]
    fn nibbles_lie_as_lanes_read_them() {
        let mut bytes = f16::from_f32(2.0).to_le_bytes().to_vec();
        bytes.extend(f16::from_f32(-1.0).to_le_bytes());
        // Low nibbles 0 to 15 are inputs 0 to 15, high ones inputs 16 to 31.
        bytes.extend((0..16).map(|k| k | (15 - k) << 4));
        let matrix = StoredMatrix { kind: TensorType::Q4_1, rows: 1, cols: 32, bytes: bytes.into() };
        let [weights, constants] = packed(Form::Nibbles, Precision::Bf16, &matrix).unwrap();
        assert_eq!((weights.len(), constants.len()), (64, 16));
        let word = |at: usize| u32::from_le_bytes(weights[at..at + 4].try_into().unwrap());
        assert_eq!([word(0), word(16), word(32)], [0x7531_6420, 0xfdb9_eca8, 0x8ace_9bdf]);
        assert_eq!(constants[..4], [0, 0x40, 0, 0xbc]);
    }

    #[test]
    fn rows_end_in_zeros() {
        let bytes = [1.0f32, -2.0, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let matrix = StoredMatrix { kind: TensorType::F32, rows: 1, cols: 3, bytes };
        let [weights, constants] = packed(Form::Plain, Precision::Bf16, &matrix).unwrap();
        assert!(weights.len() == 256 && constants.is_empty());
        assert_eq!(weights[..6], [0x80, 0x3f, 0, 0xc0, 0x40, 0x40]);
        assert!(weights[6..].iter().all(|byte| *byte == 0));
        assert_eq!(packed(Form::F32, Precision::F32, &matrix).unwrap()[0], *matrix.bytes);
    }

    #[test]
    fn what_is_no_number_or_too_large_is_told() {
        let nan = q8_0(f16::NAN);
        let large = q8_0(f16::from_f32(4000.0));
        assert_eq!(packed(Form::Bytes, Precision::F16, &nan), Err(Problem::NotFinite));
        assert_eq!(packed(Form::Plain, Precision::F16, &nan), Err(Problem::NotFinite));
        assert_eq!(packed(Form::F32, Precision::F32, &nan), Err(Problem::NotFinite));
        assert_eq!(packed(Form::Bytes, Precision::F16, &large), Err(Problem::TooLarge(68_000.0)));
        assert_eq!(packed(Form::Plain, Precision::F16, &large), Err(Problem::TooLarge(68_000.0)));
        assert!(packed(Form::Bytes, Precision::Bf16, &large).is_ok());
        let most = StoredMatrix {
            kind: TensorType::F32,
            rows: 1,
            cols: 1,
            bytes: f32::MAX.to_le_bytes().to_vec().into(),
        };
        assert_eq!(packed(Form::Plain, Precision::Bf16, &most), Err(Problem::TooLarge(f32::MAX)));
    }
}
