//! Compiled code on disk, so that a process starts without compiling what another has compiled before.
//!
//! An entry is a file named by the digest of everything that its content depends on. It is written beside its place and renamed
//! into it, and carries a digest over key and content: what is damaged, cut short or put there under another name counts as
//! missing and is replaced. The folder belongs to the user that the process runs as; who can write into it can run code on the
//! GPU, as who can write into the program's folder can on the CPU.

use std::{
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use crate::Error;

/// What an entry is found by: a digest.
pub(crate) type Key = [u8; 32];

const MAGIC: &[u8; 8] = b"LSCUBIN1";
const HEADER_BYTES: usize = MAGIC.len() + 32;

/// An entry larger than this is none of ours.
const ENTRY_BYTES_MAX: u64 = 64 << 20;

/// Entries together; the oldest make room.
const FOLDER_BYTES_MAX: u64 = 512 << 20;

/// A folder of compiled code.
#[derive(Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
    bytes_max: u64,
    /// Tells the files apart that threads of this process are writing.
    written: AtomicU64,
}

impl Cache {
    /// The cache in `folder`, which is made when it is missing.
    pub(crate) fn open(folder: &Path) -> Result<Self, Error> {
        Self::with_limit(folder, FOLDER_BYTES_MAX)
    }

    fn with_limit(folder: &Path, bytes_max: u64) -> Result<Self, Error> {
        make_private(folder).map_err(|error| Error::Invalid {
            field: "cuda.cache_path",
            problem: format!(
                "is `{}`, which cannot be made: {error}; name a folder that can be written",
                folder.display()
            ),
        })?;
        Ok(Self { folder: folder.to_owned(), bytes_max, written: AtomicU64::new(0) })
    }

    /// The content of an entry, if it is there and whole.
    pub(crate) fn get(&self, key: &Key) -> Option<Vec<u8>> {
        let path = self.path(key);
        // Neither a link nor a folder nor a pipe, which would wait for ever.
        let metadata = fs::symlink_metadata(&path).ok().filter(fs::Metadata::is_file)?;
        if metadata.len() > ENTRY_BYTES_MAX {
            return None;
        }
        let mut bytes = Vec::new();
        File::open(&path).ok()?.take(ENTRY_BYTES_MAX).read_to_end(&mut bytes).ok()?;
        let content = bytes.get(HEADER_BYTES..)?;
        let whole = bytes.starts_with(MAGIC) && bytes[MAGIC.len()..HEADER_BYTES] == digest(key, content);
        whole.then(|| bytes.split_off(HEADER_BYTES))
    }

    /// Keeps `content`. A cache that cannot be written costs time and nothing else, so there is no error.
    pub(crate) fn put(&self, key: &Key, content: &[u8]) {
        if self.write(key, content).is_ok() {
            self.make_room(&self.path(key));
        }
    }

    fn write(&self, key: &Key, content: &[u8]) -> std::io::Result<()> {
        let number = self.written.fetch_add(1, Ordering::Relaxed);
        let beside = self.folder.join(format!("{}.{}-{number}.tmp", hex(key), std::process::id()));
        let outcome = fill(&beside, &[MAGIC, &digest(key, content), content])
            .and_then(|()| fs::rename(&beside, self.path(key)));
        if outcome.is_err() {
            // Nothing more can be done where even this fails; `make_room` takes what is left over.
            let _ = fs::remove_file(&beside);
        }
        outcome
    }

    /// Removes the oldest files until the rest is small enough; not `kept`. Another process may be doing the same.
    fn make_room(&self, kept: &Path) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        let mut files: Vec<(SystemTime, u64, PathBuf)> = entries
            .flatten()
            .filter_map(|entry| {
                let metadata = entry.metadata().ok().filter(fs::Metadata::is_file)?;
                let ours = entry.path().extension().is_some_and(|e| e == "cubin" || e == "tmp");
                ours.then(|| {
                    (metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH), metadata.len(), entry.path())
                })
            })
            .collect();
        files.sort();
        let mut total: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in files.iter().filter(|(_, _, path)| path != kept) {
            if total <= self.bytes_max {
                return;
            }
            if fs::remove_file(path).is_ok() {
                total -= bytes;
            }
        }
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.folder.join(format!("{}.cubin", hex(key)))
    }
}

fn digest(key: &Key, content: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(key).update(content);
    *hasher.finalize().as_bytes()
}

fn hex(key: &Key) -> String {
    key.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn fill(path: &Path, parts: &[&[u8]]) -> std::io::Result<()> {
    let mut file = File::create_new(path)?;
    parts.iter().try_for_each(|part| file.write_all(part))
}

/// Makes a folder, for its owner alone where the system has such rights.
fn make_private(folder: &Path) -> std::io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(bytes_max: u64) -> (tempfile::TempDir, Cache) {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::with_limit(&folder.path().join("kernels"), bytes_max).unwrap();
        (folder, cache)
    }

    #[test]
    fn what_is_put_is_got() {
        let (_folder, cache) = cache(1 << 20);
        assert_eq!(cache.get(&[1; 32]), None);
        cache.put(&[1; 32], b"code");
        cache.put(&[2; 32], b"");
        assert_eq!((cache.get(&[1; 32]), cache.get(&[2; 32])), (Some(b"code".to_vec()), Some(Vec::new())));
        cache.put(&[1; 32], b"better code");
        assert_eq!(cache.get(&[1; 32]), Some(b"better code".to_vec()));
    }

    #[test]
    fn damaged_and_foreign_entries_are_missing_and_are_replaced() {
        let (_folder, cache) = cache(1 << 20);
        let (key, path) = ([7; 32], cache.path(&[7; 32]));
        cache.put(&key, b"some code");
        let whole = fs::read(&path).unwrap();
        let mut hostile: Vec<Vec<u8>> = (0..whole.len()).map(|end| whole[..end].to_vec()).collect();
        hostile.extend((0..whole.len()).map(|at| {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            damaged
        }));
        cache.put(&[8; 32], b"code of another kernel");
        hostile.push(fs::read(cache.path(&[8; 32])).unwrap());
        for content in hostile {
            fs::write(&path, &content).unwrap();
            assert_eq!(cache.get(&key), None, "{content:?}");
            cache.put(&key, b"some code");
            assert_eq!(cache.get(&key), Some(b"some code".to_vec()));
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_folders_and_huge_files_are_no_entries() {
        let (folder, cache) = cache(1 << 20);
        let (key, path) = ([7; 32], cache.path(&[7; 32]));
        cache.put(&key, b"some code");
        let elsewhere = folder.path().join("elsewhere");
        fs::rename(&path, &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        assert_eq!(cache.get(&key), None);
        cache.put(&key, b"other code");
        assert_eq!(cache.get(&key), Some(b"other code".to_vec()));
        assert_ne!(
            fs::read(&elsewhere).unwrap(),
            fs::read(&path).unwrap(),
            "the link was replaced, not followed"
        );
        fs::remove_file(&path).unwrap();
        File::create(&path).unwrap().set_len(ENTRY_BYTES_MAX + 1).unwrap();
        assert_eq!(cache.get(&key), None);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        cache.put(&key, b"some code");
        assert_eq!(cache.get(&key), None);
        let left = fs::read_dir(&cache.folder).unwrap().count();
        assert_eq!(left, 1, "what could not be put in its place is removed");
    }

    #[test]
    fn the_oldest_make_room() {
        let (_folder, cache) = cache(3 * (HEADER_BYTES as u64 + 100));
        for index in 0..5_u8 {
            cache.put(&[index; 32], &[index; 100]);
            // Files of one clock tick have no order: these are told apart.
            let age = std::time::Duration::from_secs(100 - u64::from(index));
            let file = File::options().write(true).open(cache.path(&[index; 32])).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000) - age)
                .unwrap();
        }
        let held: Vec<bool> = (0..5).map(|index| cache.get(&[index; 32]).is_some()).collect();
        assert_eq!(held, [false, false, true, true, true]);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, b"").unwrap();
        let error = Cache::open(&file.join("below")).unwrap_err();
        assert!(error.to_string().contains("`cuda.cache_path`"), "{error}");
    }
}
