//! The one checksum of tiles and tensors.

use crc_fast::{CrcAlgorithm, Digest, checksum_combine};

/// Bytes that are copied before they are checked: still in the second cache of a core then, whatever the core.
const STEP_BYTES: usize = 64 << 10;
/// What CRC-32C complements its state with, before the first byte and behind the last.
const COMPLEMENT: u32 = u32::MAX;

/// CRC-32C (Castagnoli) of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c_append(0, bytes)
}

/// CRC-32C of what went before, which had `crc`, and `bytes` behind it. 0 is the checksum of nothing.
pub fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(crc ^ COMPLEMENT));
    digest.update(bytes);
    digest.finalize() as u32
}

/// CRC-32C of bytes that have `first`, and `second_bytes` bytes that have `second` behind them.
pub fn combine_crc32c(first: u32, second: u32, second_bytes: usize) -> u32 {
    checksum_combine(CrcAlgorithm::Crc32Iscsi, u64::from(first), u64::from(second), second_bytes as u64)
        as u32
}

/// Fills `into` a step at a time through `copy` (offset, where to) and goes on with the checksum `crc` over what was written. Memory is
/// read once and written once; the checksum is that of the copy, whatever becomes of the source meanwhile.
pub fn fill_crc32c(mut crc: u32, into: &mut [u8], mut copy: impl FnMut(usize, &mut [u8])) -> u32 {
    for (step, part) in into.chunks_mut(STEP_BYTES).enumerate() {
        copy(step * STEP_BYTES, part);
        crc = crc32c_append(crc, part);
    }
    crc
}

/// Copies `from` to `into`, which must be as long, and goes on with the checksum `crc`.
///
/// # Panics
/// When the lengths differ.
pub fn copy_crc32c(crc: u32, into: &mut [u8], from: &[u8]) -> u32 {
    assert_eq!(into.len(), from.len(), "a copy is as long as its source");
    fill_crc32c(crc, into, |offset, part| part.copy_from_slice(&from[offset..offset + part.len()]))
}

#[cfg(test)]
mod tests {
    use super::{combine_crc32c, copy_crc32c, crc32c, crc32c_append};

    #[test]
    fn agrees_with_the_published_vectors() {
        // The check value of the polynomial, and RFC 3720, B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&std::array::from_fn::<u8, 32, _>(|i| i as u8)), 0x46dd_794e);
    }

    #[test]
    fn a_copy_has_the_checksum_of_its_source_wherever_it_is_cut() {
        let source: Vec<u8> = (0..200_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for length in [0, 1, 63, 8_191, 65_535, 65_536, 65_537, 200_000] {
            let mut copy = vec![0; length];
            assert_eq!(copy_crc32c(0, &mut copy, &source[..length]), crc32c(&source[..length]), "{length}");
            assert_eq!(copy, source[..length]);
        }
        let (head, tail) = source.split_at(12_345);
        assert_eq!(combine_crc32c(crc32c(head), crc32c(tail), tail.len()), crc32c(&source));
        assert_eq!(combine_crc32c(crc32c(head), crc32c(&[]), 0), crc32c(head));
        assert_eq!(combine_crc32c(0, crc32c(head), head.len()), crc32c(head));
        assert_eq!(crc32c_append(crc32c(head), tail), crc32c(&source));
        let mut copy = vec![0; tail.len()];
        assert_eq!(copy_crc32c(crc32c(head), &mut copy, tail), crc32c(&source));
    }
}
