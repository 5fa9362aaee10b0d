//! Block files: what goes in comes out, and nothing that was touched does.

use super::*;

/// Small tiles: 16 tokens, 1 head of 8.
fn shape(dtype: Dtype) -> WireTileShape {
    WireTileShape { block_tokens: 16, kv_heads: 1, head_dim: 8, dtype, layout: LAYOUT_CPU_PANELS, layers: 3 }
}

fn block(dtype: Dtype, place: Option<BlockPlace>) -> BlockFile {
    let bytes = tile_bytes(&shape(dtype)).unwrap();
    let tile = |layer: u8| {
        let body: Vec<u8> = (0..bytes).map(|at| (at as u8).wrapping_mul(31) ^ layer).collect();
        (crc32c(&body), Bytes::from(body))
    };
    BlockFile {
        deployment: Deployment::from_bytes([1; 32]),
        namespace: Namespace::from_bytes([2; 32]),
        key: BlockKey([3; 16]),
        place,
        shape: shape(dtype),
        tiles: (0..3).map(tile).collect(),
    }
}

const PLACE: BlockPlace = BlockPlace { stripe_seed: [4; 32], index: 0x0102_0304_0506 };

fn bytes_of(block: &BlockFile) -> Vec<u8> {
    let mut bytes = block.header().unwrap();
    block.tiles.iter().for_each(|(_, body)| bytes.extend_from_slice(body));
    bytes
}

fn read(bytes: &[u8]) -> Result<BlockFile, FileError> {
    BlockFile::read_from(&mut &bytes[..], bytes.len() as u64)
}

/// The same file with other bytes at `at` and the header's checksum made right again, as somebody who knows the format would.
fn forged(at: usize, with: &[u8]) -> Vec<u8> {
    let mut bytes = bytes_of(&block(Dtype::F16, Some(PLACE)));
    bytes[at..at + with.len()].copy_from_slice(with);
    let end = FIXED_BYTES + 4 * 3;
    let crc = crc32c(&bytes[..end]);
    bytes[end..end + 4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn field(bytes: &[u8]) -> String {
    match read(bytes) {
        Ok(block) => panic!("it was read: {block:?}"),
        Err(FileError::Invalid { field, .. }) => field.to_owned(),
        Err(FileError::Checksum { field }) => format!("checksum of {field}"),
        Err(FileError::Io(error)) => panic!("{error}"),
    }
}

#[test]
fn a_block_comes_out_as_it_went_in() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("block.lsb");
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::Int8] {
        for place in [None, Some(PLACE)] {
            let block = block(dtype, place);
            let written = block.write(&path).unwrap();
            assert_eq!(written, std::fs::metadata(&path).unwrap().len());
            assert_eq!(BlockFile::read(&path).unwrap(), block);
        }
    }
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "nothing but the file is left");
}

#[test]
fn the_first_bytes_are_what_the_page_says() {
    let bytes = bytes_of(&block(Dtype::F16, Some(PLACE)));
    assert_eq!(&bytes[..16], b"LSBLOCK\0\x01\0\0\0\x01\0\0\0");
    assert_eq!((bytes[16], bytes[48], bytes[80], bytes[96]), (1, 2, 3, 4));
    assert_eq!(bytes[128..136], PLACE.index.to_le_bytes());
    assert_eq!(bytes[136..160], [16, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!(
        bytes[160..168],
        (2u64 * 16 * 8 + 2 * 16 * 16).to_le_bytes(),
        "K, and V with its columns padded to 16"
    );
}

#[test]
fn every_flipped_bit_is_noticed() {
    let sound = bytes_of(&block(Dtype::Int8, Some(PLACE)));
    for at in 0..sound.len() {
        for bit in 0..8 {
            let mut bytes = sound.clone();
            bytes[at] ^= 1 << bit;
            assert!(read(&bytes).is_err(), "bit {bit} of byte {at}");
        }
    }
}

#[test]
fn a_file_of_any_other_length_is_refused() {
    let sound = bytes_of(&block(Dtype::Int8, None));
    for length in 0..sound.len() {
        assert!(read(&sound[..length]).is_err(), "{length}");
    }
    assert_eq!(field(&sound[..10]), "header");
    assert_eq!(field(&sound[..FIXED_BYTES + 1]), "checksums");
    assert_eq!(field(&sound[..FIXED_BYTES + 13]), "header_crc32c");
    assert_eq!(field(&sound[..sound.len() - 1]), "tiles");
    assert_eq!(field(&[&sound[..], b"x"].concat()), "tiles", "bytes behind the last tile");
}

#[test]
fn fields_that_make_no_sense_are_named_though_the_checksum_is_right() {
    let word = |number: u32| number.to_le_bytes();
    let cases: [(usize, &[u8], &str); 14] = [
        (0, b"X", "magic"),
        (8, &word(2), "version"),
        (12, &word(3), "flags"),
        (12, &word(0), "stripe_seed"),
        (136, &word(17), "block_tokens"),
        (136, &word(u32::MAX), "block_tokens"),
        (140, &word(0), "kv_heads"),
        (144, &word(u32::MAX), "head_dim"),
        (148, &word(0), "dtype"),
        (148, &word(5), "dtype"),
        (152, &word(2), "layout"),
        (156, &word(0), "layers"),
        (156, &word(u32::MAX), "layers"),
        (160, &[9], "tile_bytes"),
    ];
    for (at, with, expected) in cases {
        assert_eq!(field(&forged(at, with)), expected, "{at}");
    }
    // The largest tiles that a header may tell, of a file that has none of them.
    assert_eq!(field(&forged(140, &word(1_024))), "tile_bytes");
    let mut swapped = bytes_of(&block(Dtype::F16, None));
    let (first, second) = (FIXED_BYTES + 16, FIXED_BYTES + 16 + tile_bytes(&shape(Dtype::F16)).unwrap());
    let (byte, other) = (swapped[first], swapped[second]);
    (swapped[first], swapped[second]) = (other, byte);
    assert_eq!(field(&swapped), "checksum of tiles[0]");
}

#[test]
fn headers_that_promise_more_than_there_is_allocate_nothing() {
    // 4,096 layers of the file's own tiles: 16 KiB of checksums at most are read before it is refused.
    let mut bytes = forged(156, &4_096u32.to_le_bytes());
    assert_eq!(field(&bytes), "checksums");
    bytes.resize(1 << 16, 0);
    assert_eq!(field(&bytes), "checksum of header");
}

#[test]
fn blocks_that_would_not_be_read_are_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("block.lsb");
    let refused = |change: fn(&mut BlockFile)| {
        let mut block = block(Dtype::F16, None);
        change(&mut block);
        let error = block.write(&path).unwrap_err().to_string();
        assert!(!path.exists(), "{error}");
        error
    };
    assert!(refused(|block| block.tiles[1].0 ^= 1).contains("`tiles[1]` does not match"));
    assert!(
        refused(|block| block.tiles[2].1 = Bytes::from_static(b"short"))
            .contains("`tiles` has 5 bytes in layer 2")
    );
    assert!(refused(|block| drop(block.tiles.pop())).contains("`layers` are 3, there are 2 tiles"));
    assert!(refused(|block| block.shape.kv_heads = 0).contains("`kv_heads`"));
    assert!(refused(|block| block.shape.layout = 9).contains("`layout` is 9"));
}
