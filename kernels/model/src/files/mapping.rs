//! Read-only memory maps of model files, and their digests.

use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, UncheckedAdvice};

use crate::{Error, LoadProgress};

/// A whole file, mapped read-only. Pages are read when they are touched, so opening a large file costs nothing.
pub(crate) struct Mapping {
    path: PathBuf,
    map: Mmap,
}

impl Mapping {
    /// Maps a file; refuses what is not a regular file and what is empty.
    #[allow(unsafe_code, reason = "memory maps cannot be made safely; see SAFETY")]
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let io = |source| Error::Io { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        let corrupt = |problem: &str| Error::Corrupt {
            path: path.to_path_buf(),
            field: "file".into(),
            problem: problem.into(),
        };
        if !metadata.is_file() {
            return Err(corrupt("is not a regular file"));
        }
        if metadata.len() == 0 {
            return Err(corrupt("is empty"));
        }
        // SAFETY: the map is private to this type, read-only, and only ever seen as `&[u8]` of its full length, which
        // `Mmap` derives from the open file. The one way to break it is another process that shortens or rewrites the
        // file while it is mapped; model files are written to a temporary name and renamed into place, never edited, and
        // the documentation of `LoadedModel::open` tells users so. Lengths are checked against the map, not the file.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Self { path: path.to_path_buf(), map })
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Lets the pages of a range go. They stay in the file cache of the system and are mapped again when they are touched.
    #[allow(unsafe_code, reason = "memmap2 cannot know that the map is of a file; see SAFETY")]
    pub(crate) fn release(&self, start: usize, len: usize) {
        // SAFETY: the advice lets unwritten changes be lost, and a read-only map of a file has none: its pages hold the
        // file's content before and after.
        let released = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, len) };
        // A system that keeps the pages is none the worse for it.
        drop(released);
    }

    /// BLAKE3 of the content, at some gigabytes a second; tells `progress` the bytes done, on top of what `meter` already counted.
    pub(crate) fn digest(&self, meter: &mut Meter<'_>) -> blake3::Hash {
        const STEP_BYTES: usize = 16 << 20;
        let mut hasher = blake3::Hasher::new();
        for part in self.map.chunks(STEP_BYTES) {
            hasher.update(part);
            meter.advance(part.len() as u64);
        }
        hasher.finalize()
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

impl std::fmt::Debug for Mapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mapping").field("path", &self.path).field("bytes", &self.map.len()).finish()
    }
}

/// Counts bytes over several files and tells a [`LoadProgress`] callback.
pub(crate) struct Meter<'a> {
    progress: &'a dyn Fn(LoadProgress),
    state: LoadProgress,
}

impl<'a> Meter<'a> {
    /// Nothing done of `total_bytes`.
    pub(crate) fn new(total_bytes: u64, progress: &'a dyn Fn(LoadProgress)) -> Self {
        Self { progress, state: LoadProgress { done_bytes: 0, total_bytes } }
    }

    fn advance(&mut self, bytes: u64) {
        self.state.done_bytes += bytes;
        (self.progress)(self.state);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::Kind;

    #[test]
    fn a_mapping_is_the_file_and_its_digest_is_plain_blake3() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let bytes: Vec<u8> =
            (0..40_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let mapping = Mapping::open(&path).unwrap();
        assert!(mapping[..] == bytes[..]);
        let seen = RefCell::new(Vec::new());
        let progress = |p: LoadProgress| seen.borrow_mut().push(p.done_bytes);
        let digest = mapping.digest(&mut Meter::new(bytes.len() as u64, &progress));
        assert_eq!(digest, blake3::hash(&bytes));
        assert_eq!(*seen.borrow(), [16 << 20, 32 << 20, 40_000_000]);
    }

    #[test]
    fn released_pages_come_back_with_their_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let mapping = Mapping::open(&path).unwrap();
        assert!(mapping[..] == bytes[..]);
        for (start, len) in [(0, 100_000), (5_000, 7), (99_999, 1), (0, 0)] {
            mapping.release(start, len);
            assert!(mapping[..] == bytes[..], "{start} {len}");
        }
    }

    #[test]
    fn a_mapping_outlives_the_name_of_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"weights").unwrap();
        let mapping = Mapping::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(&mapping[..], b"weights");
    }

    #[test]
    fn what_cannot_be_mapped_is_a_typed_error() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Mapping::open(&dir.path().join("none")).unwrap_err().kind(), Kind::Io);
        let directory = Mapping::open(dir.path()).unwrap_err();
        assert_eq!(directory.kind(), Kind::Corrupt, "{directory}");
        let empty = dir.path().join("empty");
        std::fs::write(&empty, b"").unwrap();
        let error = Mapping::open(&empty).unwrap_err();
        assert!(error.to_string().ends_with("`file` is empty"), "{error}");
    }
}
