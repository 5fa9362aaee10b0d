//! Files that a crash or a bad disk left: what is found is whole or fails its checksums; nothing else is served.

mod damage;

use std::sync::atomic::Ordering::SeqCst;

use longshore_attention::{KvDtype, Tile, TileShape};
use longshore_blocks::{BlockKey, BlockPlace, Deployment, EXACT_PREFILL, crc32c, pool::Page};

use super::*;
use crate::tier::{Record, Tier};

const LAYERS: u32 = 2;

fn shape() -> TileShape {
    TileShape { block_tokens: 16, kv_heads: 1, head_dim: 5, dtype: KvDtype::Int8 }
}

fn format() -> Format {
    let tile_bytes = shape().bytes() as u64;
    Format { deployment: Deployment::from_bytes([1; 32]), tile_bytes, layers: LAYERS, places: 0 }
}

/// Three places a segment.
fn setting(folder: &Path, places: u64) -> Setting {
    let block = format().block_bytes();
    Setting { folder: folder.to_owned(), capacity_bytes: places * block, segment_bytes: 3 * block }
}

fn open_tier(folder: &Path) -> (DiskTier, Found) {
    let (tier, _, found) = DiskTier::open(&setting(folder, 9), format()).expect("the folder can be used");
    (tier, found)
}

fn body(name: u8, layer: u32) -> Vec<u8> {
    (0..shape().bytes())
        .map(|at| (at as u8).wrapping_mul(name).wrapping_add(layer as u8 * 100 + name))
        .collect()
}

fn belongs(name: u8) -> BlockPlace {
    BlockPlace { stripe_seed: [name ^ 0x55; 32], index: u64::from(name) << 33 }
}

fn write(tier: &DiskTier, place: u64, name: u8, generation: u64) -> io::Result<()> {
    let pages: Vec<_> = (0..LAYERS)
        .map(|layer| {
            let payload = Arc::new(Tile::from_bytes(shape(), &body(name, layer)).unwrap());
            Page { crc32c: crc32c(payload.as_bytes()), payload }
        })
        .collect();
    let namespace = format().deployment.namespace(EXACT_PREFILL, b"");
    let belongs = Some(belongs(name));
    tier.write(place, &Record { namespace, key: BlockKey([name; 16]), generation, belongs, pages: &pages })
}

/// Names of the blocks that were found and whose tiles match their checksums. A tile that matches is the one that was written.
fn served(tier: &DiskTier, found: &Found) -> Vec<u8> {
    let mut names = Vec::new();
    for entry in &found.entries {
        let name = entry.key.0[0];
        assert_eq!(entry.belongs, Some(belongs(name)), "an entry says of another block where it belongs");
        let mut sound = true;
        for layer in 0..LAYERS {
            let mut tile = vec![0; shape().bytes()];
            let read = tier.read(entry.place, layer, &mut tile);
            let matches = read.is_ok() && crc32c(&tile) == entry.checksums[layer as usize];
            assert!(!matches || tile == body(name, layer), "a wrong byte of block {name} passes");
            sound &= matches;
        }
        if sound {
            names.push(name);
        }
    }
    names
}

/// The bytes of a small log: four blocks in two segments, one place used twice.
fn log() -> (tempfile::TempDir, Vec<(String, Vec<u8>)>) {
    let folder = tempfile::tempdir().unwrap();
    let (tier, found) = open_tier(folder.path());
    assert!(found.entries.is_empty());
    for (place, name) in [(0, 9), (1, 2), (2, 3), (3, 4), (0, 1)] {
        write(&tier, place, name, 10 + u64::from(name)).unwrap();
    }
    drop(tier);
    let read = |number| {
        let name = DiskTier::file_name(number);
        let bytes = fs::read(folder.path().join(&name)).unwrap();
        (name, bytes)
    };
    let files = vec![read(0), read(1)];
    (folder, files)
}

/// Opens a folder with these files.
fn reopen(files: &[(String, &[u8])]) -> (tempfile::TempDir, Result<(DiskTier, u64, Found), DiskError>) {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    let opened = DiskTier::open(&setting(folder.path(), 6), format());
    (folder, opened)
}

#[test]
fn a_restart_finds_everything_that_was_written_the_deepest_first() {
    let (folder, _) = log();
    let (tier, found) = open_tier(folder.path());
    assert_eq!(served(&tier, &found), [4, 3, 2, 1]);
    assert_eq!((found.damaged, found.torn), (0, 0));
}

#[test]
fn tails_go_before_heads_and_of_one_depth_the_oldest() {
    let namespace = format().deployment.namespace(EXACT_PREFILL, b"");
    let entry = |(index, generation): (Option<u64>, u64)| Entry {
        place: 0,
        namespace,
        key: BlockKey([0; 16]),
        generation,
        belongs: index.map(|index| BlockPlace { stripe_seed: [0; 32], index }),
        checksums: Box::default(),
    };
    let written = [(Some(0), 1), (Some(1), 2), (None, 3), (Some(0), 4), (Some(1), 5), (None, 6)];
    let mut entries = written.map(entry);
    sort_for_eviction(&mut entries);
    assert_eq!(entries.map(|entry| entry.generation), [3, 6, 2, 5, 1, 4]);
}

/// Power is lost before every single write, in a place that is used again, in a fresh one and in a fresh segment.
#[test]
fn a_kill_between_any_two_writes_leaves_whole_blocks_only() {
    for (place, old) in [(0, Some(1)), (4, None), (6, None)] {
        for writes in 0.. {
            let (folder, _) = log();
            let (tier, _) = open_tier(folder.path());
            tier.writes_left.store(writes, SeqCst);
            let done = write(&tier, place, 7, 99).is_ok();
            drop(tier);
            let (tier, found) = open_tier(folder.path());
            let names = served(&tier, &found);
            assert!([2, 3, 4].iter().all(|name| names.contains(name)), "others are unharmed: {names:?}");
            assert_eq!(names.contains(&7), done, "{writes} writes");
            let untouched = writes == 0 && old.is_some();
            assert_eq!(old.is_some_and(|old| names.contains(&old)), untouched, "{writes} writes: {names:?}");
            assert_eq!(found.entries.len(), names.len(), "no entry without its tiles");
            // And it goes on.
            write(&tier, place, 8, 100).unwrap();
            drop(tier);
            let (tier, found) = open_tier(folder.path());
            assert!(served(&tier, &found).contains(&8));
            if done {
                break;
            }
        }
    }
}

#[test]
fn a_file_cut_off_anywhere_has_only_whole_blocks() {
    let (_folder, files) = log();
    let whole = &files[1];
    for len in 0..files[0].1.len() {
        let cut = [(files[0].0.clone(), &files[0].1[..len]), (whole.0.clone(), &whole.1[..])];
        let (_folder, opened) = reopen(&cut);
        let (tier, _, found) = opened.expect("a torn tail is no fault");
        let names = served(&tier, &found);
        assert!(names.contains(&4) && names.len() <= 4, "{names:?}");
        assert_eq!(found.entries.len(), names.len(), "{len}: blocks that are cut off are not found");
    }
}

#[test]
fn a_changed_byte_anywhere_is_never_served() {
    let (_folder, files) = log();
    let (name, bytes) = &files[0];
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 1 << (at % 8);
        let (_folder, opened) = reopen(&[(name.clone(), &changed)]);
        match opened {
            Ok((tier, _, found)) => {
                let names = served(&tier, &found);
                assert!(names.iter().all(|name| [1, 2, 3].contains(name)), "{at}: {names:?}");
                assert!(
                    names.len() >= 2 || at < HEADER_BYTES as usize,
                    "{at}: one byte harms one block: {names:?}"
                );
            }
            // A damaged version number looks like another version.
            Err(DiskError::Foreign { .. }) => assert!((8..12).contains(&at), "{at}"),
            Err(error) => panic!("{at}: {error}"),
        }
    }
}

#[test]
fn segments_in_each_others_place_and_older_generations_are_not_served_as_others() {
    let (_folder, files) = log();
    let swapped = [(files[0].0.clone(), &files[1].1[..]), (files[1].0.clone(), &files[0].1[..])];
    let (_folder, opened) = reopen(&swapped);
    let (_, _, found) = opened.unwrap();
    assert!(found.entries.is_empty() && found.damaged == 2);

    // A disk that forgot the last writes of a place: the entry of one block over the tiles of another one.
    let folder = tempfile::tempdir().unwrap();
    let (tier, _) = open_tier(folder.path());
    write(&tier, 0, 1, 1).unwrap();
    let before = fs::read(folder.path().join(DiskTier::file_name(0))).unwrap();
    write(&tier, 0, 2, 2).unwrap();
    let mut stale = fs::read(folder.path().join(DiskTier::file_name(0))).unwrap();
    let tiles = Format { places: 3, ..format() }.tile_offset(0, 0) as usize;
    stale[tiles..].copy_from_slice(&before[tiles..]);
    let (_folder, opened) = reopen(&[(DiskTier::file_name(0), &stale)]);
    let (tier, _, found) = opened.unwrap();
    assert_eq!(found.entries.len(), 1);
    assert_eq!(served(&tier, &found), [0; 0]);
}

#[test]
fn files_of_others_are_left_alone() {
    let (_folder, files) = log();
    let mut later = files[0].1.clone();
    later[8] = 3;
    let (folder, opened) = reopen(&[(files[0].0.clone(), &later)]);
    let error = opened.unwrap_err().to_string();
    assert!(error.contains("is of version 3") && error.contains("hint:"), "{error}");
    assert_eq!(fs::read(folder.path().join(&files[0].0)).unwrap(), later, "it is not touched");

    let (folder, opened) = reopen(&[("segment-1".to_owned(), b"x"), ("notes.txt".to_owned(), b"mine")]);
    assert!(opened.unwrap().2.entries.is_empty());
    assert!(folder.path().join("segment-1").exists() && folder.path().join("notes.txt").exists());
}

#[test]
fn a_smaller_capacity_forgets_what_is_beyond_it_and_a_larger_one_goes_on() {
    let (folder, _) = log();
    let open = |places| DiskTier::open(&setting(folder.path(), places), format()).unwrap();
    let (tier, blocks, found) = open(2);
    assert_eq!((blocks, served(&tier, &found)), (2, vec![2, 1]));
    assert!(!folder.path().join(DiskTier::file_name(1)).exists(), "nobody needs the second segment");
    drop(tier);
    // Another size of segments is for folders without any.
    let setting = Setting { segment_bytes: 1 << 20, ..setting(folder.path(), 9) };
    let (tier, blocks, found) = DiskTier::open(&setting, format()).unwrap();
    assert_eq!((blocks, tier.format.places), (9, 3));
    assert_eq!(served(&tier, &found), [3, 2, 1], "place 2 lies in the segment that stayed");
    write(&tier, 8, 5, 50).unwrap();
    assert!(folder.path().join(DiskTier::file_name(2)).exists());
}

#[test]
fn only_this_user_may_read_the_files() {
    use std::os::unix::fs::PermissionsExt as _;
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("a").join("b");
    let (tier, _) = open_tier(&folder);
    write(&tier, 0, 1, 1).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&folder), mode(&folder.join(DiskTier::file_name(0)))), (0o700, 0o600));
    assert!(matches!(DiskTier::open(&setting(&folder, 6), format()), Err(DiskError::InUse { .. })));
}

/// How long a start takes with 10,000 blocks of 30 layers in 59 files; tiles are small, a start does not read them.
#[test]
#[ignore = "a measurement"]
fn measure_restart() {
    let folder = tempfile::tempdir().unwrap();
    let format = Format { layers: 30, ..format() };
    let capacity_bytes = 10_000 * format.block_bytes();
    let setting = Setting {
        folder: folder.path().to_owned(),
        capacity_bytes,
        segment_bytes: 170 * format.block_bytes(),
    };
    let (tier, ..) = DiskTier::open(&setting, format).unwrap();
    let payload = Arc::new(Tile::from_bytes(shape(), &body(1, 0)).unwrap());
    let pages = vec![Page { crc32c: crc32c(payload.as_bytes()), payload }; 30];
    let namespace = format.deployment.namespace(EXACT_PREFILL, b"");
    for place in 0..10_000u64 {
        let mut key = [0; 16];
        key[..8].copy_from_slice(&place.to_le_bytes());
        let record =
            Record { namespace, key: BlockKey(key), generation: place, belongs: None, pages: &pages };
        tier.write(place, &record).unwrap();
    }
    drop(tier);
    let _synced = std::process::Command::new("sync").status();
    let cold = fs::write("/proc/sys/vm/drop_caches", "1").is_ok();
    let started = std::time::Instant::now();
    let (_tier, _, found) = DiskTier::open(&setting, format).unwrap();
    println!(
        "{} blocks found in {:.1} ms (cold: {cold})",
        found.entries.len(),
        started.elapsed().as_secs_f64() * 1e3
    );
}
