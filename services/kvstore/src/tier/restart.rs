//! Opening a disk tier: the folder is locked, its segments are read, and the blocks that they name are told. Tiles are not
//! read: whoever reads them later checks them.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    fs::{self, DirBuilder, File, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt as _, FileExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use super::{
    DiskError, DiskTier,
    disk::open,
    format::{Entry, Format, HEADER_BYTES, Unfit},
};

/// Most places of a new segment: its table is read at once.
const PLACES_MAX: u64 = 4_096;

/// What a start found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// Blocks, in the order in which they may go.
    pub(super) entries: Vec<Entry>,
    /// Segments that were damaged and begin anew.
    pub(super) damaged: usize,
    /// Entries whose tiles are not all there.
    pub(super) torn: usize,
}

/// What a shard keeps on disk and where.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    /// Folder of this shard alone.
    pub(crate) folder: PathBuf,
    /// Most bytes of blocks.
    pub(crate) capacity_bytes: u64,
    /// About the size of a segment file, for a folder that has none yet.
    pub(crate) segment_bytes: u64,
}

impl DiskTier {
    /// Opens or creates the folder; also tells how many blocks it may hold.
    pub(super) fn open(setting: &Setting, mut format: Format) -> Result<(Self, u64, Found), DiskError> {
        let capacity = setting.capacity_bytes / format.block_bytes();
        if capacity == 0 {
            let (capacity_bytes, block_bytes) = (setting.capacity_bytes, format.block_bytes());
            return Err(DiskError::TooSmall { capacity_bytes, block_bytes });
        }
        let places = (setting.segment_bytes / format.block_bytes()).clamp(1, PLACES_MAX);
        format.places = u32::try_from(places).expect("it was clamped");
        let folder = setting.folder.clone();
        let create = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        create.map_err(|error| fault("create", &folder, &error))?;
        let lock = lock(&folder)?;
        let numbers = segments(&folder)?;
        let mut found = Found::default();
        let mut files = BTreeMap::new();
        // A folder goes on with the segment size that it began with.
        let mut adopted = None;
        for number in numbers {
            let path = folder.join(Self::file_name(number));
            match read_segment(
                &path,
                adopted.as_ref().unwrap_or(&format),
                number,
                adopted.is_some(),
                &mut found,
            )? {
                Some((file, own)) => {
                    adopted = Some(own);
                    files.insert(number, Arc::new(file));
                }
                None => {
                    found.damaged += 1;
                    fs::remove_file(&path).map_err(|error| fault("delete", &path, &error))?;
                }
            }
        }
        let format = adopted.unwrap_or(format);
        forget_beyond(&folder, &format, capacity, &mut files)?;
        found.entries.retain(|entry| entry.place < capacity);
        sort_for_eviction(&mut found.entries);
        let tier = Self {
            folder,
            format,
            _lock: lock,
            segments: Mutex::new(files),
            #[cfg(test)]
            writes_left: i64::MAX.into(),
        };
        Ok((tier, capacity, found))
    }
}

/// Nothing tells when blocks were last used. A block is worth nothing without those before it in its sequence, so the deepest go first,
/// and of those of one depth the oldest. What is in no known sequence goes before all that is.
fn sort_for_eviction(entries: &mut [Entry]) {
    let depth = |entry: &Entry| entry.belongs.map_or(u64::MAX, |belongs| belongs.index);
    entries.sort_by_key(|entry| (Reverse(depth(entry)), entry.generation));
}

/// Deletes the segments that a smaller capacity has no use for.
fn forget_beyond(
    folder: &Path,
    format: &Format,
    capacity: u64,
    files: &mut BTreeMap<u64, Arc<File>>,
) -> Result<(), DiskError> {
    let end = capacity.div_ceil(u64::from(format.places));
    for number in files.split_off(&end).into_keys() {
        let path = folder.join(DiskTier::file_name(number));
        fs::remove_file(&path).map_err(|error| fault("delete", &path, &error))?;
    }
    Ok(())
}

fn lock(folder: &Path) -> Result<File, DiskError> {
    let path = folder.join("lock");
    let file = open(&path).map_err(|error| fault("open", &path, &error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(DiskError::InUse { path: folder.to_owned() }),
        Err(TryLockError::Error(error)) => Err(fault("lock", &path, &error)),
    }
}

/// Numbers of the segment files, ascending. Files of other names are none of ours.
fn segments(folder: &Path) -> Result<Vec<u64>, DiskError> {
    let list = || -> io::Result<Vec<u64>> {
        let mut numbers = Vec::new();
        for entry in fs::read_dir(folder)? {
            let name = entry?.file_name();
            numbers.extend(name.to_str().and_then(DiskTier::segment_number));
        }
        numbers.sort_unstable();
        Ok(numbers)
    };
    list().map_err(|error| fault("read", folder, &error))
}

/// Reads a segment's header and table. None when it is damaged and nothing in it can be used.
fn read_segment(
    path: &Path,
    format: &Format,
    number: u64,
    fixed: bool,
    found: &mut Found,
) -> Result<Option<(File, Format)>, DiskError> {
    let fault = |error: &io::Error| fault("read", path, error);
    let file = open(path).map_err(|error| fault(&error))?;
    let bytes = file.metadata().map_err(|error| fault(&error))?.len();
    let mut header = vec![0; HEADER_BYTES.min(bytes) as usize];
    file.read_exact_at(&mut header, 0).map_err(|error| fault(&error))?;
    let own = match format.check_header(&header, number) {
        Ok(own) => own,
        Err(Unfit::Damaged) => {
            tracing::warn!(file = %path.display(), "a segment has no valid header: it is deleted, its blocks are gone");
            return Ok(None);
        }
        Err(Unfit::Foreign(problem)) => return Err(DiskError::Foreign { path: path.to_owned(), problem }),
    };
    if fixed && own.places != format.places {
        tracing::warn!(file = %path.display(), "a segment has another size than the others: it is deleted, its blocks are gone");
        return Ok(None);
    }
    // A table that is cut off has no entries from there on; its size is the header's word, so it is bounded by the file's.
    let mut table = vec![0; own.table_bytes().min(bytes.saturating_sub(HEADER_BYTES)) as usize];
    file.read_exact_at(&mut table, HEADER_BYTES).map_err(|error| fault(&error))?;
    for (slot, entry) in (0..).zip(table.chunks(own.entry_bytes() as usize)) {
        let Some(entry) = own.parse_entry(entry, number * u64::from(own.places) + slot) else { continue };
        if own.block_end(slot) <= bytes {
            found.entries.push(entry);
        } else {
            found.torn += 1;
        }
    }
    Ok(Some((file, own)))
}

fn fault(action: &'static str, path: &Path, error: &io::Error) -> DiskError {
    DiskError::Io { action, path: path.to_owned(), problem: error.to_string() }
}

#[cfg(test)]
mod tests;
