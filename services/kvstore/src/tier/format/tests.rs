use longshore_blocks::EXACT_PREFILL;
use proptest::prelude::*;

use super::*;

fn format() -> Format {
    Format { deployment: Deployment::from_bytes([3; 32]), tile_bytes: 1000, layers: 3, places: 4 }
}

fn entry(place: u64) -> Entry {
    Entry {
        place,
        namespace: format().deployment.namespace(EXACT_PREFILL, b"tenant"),
        key: BlockKey([7; 16]),
        generation: 42,
        belongs: Some(BlockPlace { stripe_seed: [9; 32], index: 1 << 40 }),
        checksums: [1, 2, 3].into(),
    }
}

#[test]
fn headers_and_entries_come_back_and_nothing_overlaps() {
    let format = format();
    let header = format.header(5);
    assert_eq!(header.len() as u64, HEADER_BYTES);
    assert_eq!(format.check_header(&header, 5), Ok(format));
    assert_eq!(format.parse_entry(&format.entry(&entry(9)), 9), Some(entry(9)));
    let nowhere = Entry { belongs: None, ..entry(9) };
    assert_eq!(format.parse_entry(&format.entry(&nowhere), 9), Some(nowhere));
    assert_eq!(format.segment_of(9), (2, 1));
    let mut end = HEADER_BYTES;
    for slot in 0..4 {
        assert_eq!(format.entry_offset(slot), end);
        end += format.entry_bytes();
    }
    for slot in 0..4 {
        for layer in 0..3 {
            assert!(format.tile_offset(slot, layer) >= end);
            end = format.tile_offset(slot, layer) + format.tile_bytes;
        }
        assert_eq!(format.block_end(slot), end);
    }
}

#[test]
fn entries_of_other_places_and_headers_of_other_segments_are_none() {
    let format = format();
    assert_eq!(format.parse_entry(&format.entry(&entry(9)), 8), None);
    assert_eq!(format.check_header(&format.header(5), 6), Err(Unfit::Damaged));
    assert_eq!(format.check_header(&[], 0), Err(Unfit::Damaged));
}

#[test]
fn other_versions_deployments_and_shapes_are_told_apart_from_damage() {
    let format = format();
    let foreign = |bytes: &[u8]| match format.check_header(bytes, 0) {
        Err(Unfit::Foreign(problem)) => problem,
        other => panic!("{other:?}"),
    };
    let mut later = format.header(0);
    later[8..12].copy_from_slice(&3u32.to_le_bytes());
    assert_eq!(foreign(&later), "is of version 3, this program reads 2");
    // As version 1 wrote it, with a checksum that is right.
    let mut earlier = format.header(0);
    earlier[8..12].copy_from_slice(&1u32.to_le_bytes());
    let crc = crc32c(&earlier[..HEADER_USED - 4]);
    earlier[HEADER_USED - 4..HEADER_USED].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(foreign(&earlier), "is of version 1, this program reads 2");
    let other = Format { deployment: Deployment::from_bytes([4; 32]), ..format };
    assert!(foreign(&other.header(0)).contains("another deployment"));
    let other = Format { layers: 4, ..format };
    assert!(foreign(&other.header(0)).contains("another shape"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn a_changed_entry_is_none(at in 0usize..132, bit in 0u8..8) {
        let format = format();
        let mut bytes = format.entry(&entry(9));
        bytes[at] ^= 1 << bit;
        prop_assert_eq!(format.parse_entry(&bytes, 9), None);
    }

    #[test]
    fn a_changed_header_is_never_used(at in 0usize..HEADER_USED, bit in 0u8..8) {
        let format = format();
        let mut bytes = format.header(5);
        bytes[at] ^= 1 << bit;
        prop_assert!(format.check_header(&bytes, 5).is_err());
    }

    #[test]
    fn noise_is_no_entry(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        prop_assert_eq!(format().parse_entry(&bytes, 0), None);
        prop_assert!(format().check_header(&bytes, 0).is_err());
    }
}
