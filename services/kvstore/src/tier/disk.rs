//! The disk tier: segment files in a folder of its own. Reads and writes go through the page cache (ADR 9).

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    Record, Tier,
    format::{Entry, Format},
};

/// Folder with the segment files of one shard.
#[derive(Debug)]
pub(crate) struct DiskTier {
    pub(super) folder: PathBuf,
    pub(super) format: Format,
    /// Locked for as long as this lives.
    pub(super) _lock: File,
    /// By number. A segment that nothing was written to has no file.
    pub(super) segments: Mutex<BTreeMap<u64, Arc<File>>>,
    /// Writes until the disk "loses power": the crash tests set it.
    #[cfg(test)]
    pub(super) writes_left: std::sync::atomic::AtomicI64,
}

impl DiskTier {
    /// Bytes that a block takes on disk, without its entry.
    pub(crate) fn block_bytes(&self) -> u64 {
        self.format.block_bytes()
    }

    /// Name of a segment's file.
    pub(super) fn file_name(segment: u64) -> String {
        format!("segment-{segment:08}")
    }

    /// Number of the segment that a file name names.
    pub(super) fn segment_number(name: &str) -> Option<u64> {
        let digits = name.strip_prefix("segment-").filter(|digits| digits.len() >= 8)?;
        digits.parse().ok().filter(|number| Self::file_name(*number) == name)
    }

    fn segment(&self, number: u64) -> io::Result<Arc<File>> {
        let mut segments = self.segments.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = segments.get(&number) {
            return Ok(file.clone());
        }
        let file = Arc::new(open(&self.folder.join(Self::file_name(number)))?);
        file.set_len(0)?;
        self.write_at(&file, &self.format.header(number), 0)?;
        segments.insert(number, file.clone());
        Ok(file)
    }

    fn find(&self, number: u64) -> io::Result<Arc<File>> {
        let segments = self.segments.lock().unwrap_or_else(PoisonError::into_inner);
        segments.get(&number).cloned().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }

    /// Empties the entry of a place.
    fn clear_entry(&self, file: &File, slot: u64) -> io::Result<()> {
        let empty = vec![0; self.format.entry_bytes() as usize];
        self.write_at(file, &empty, self.format.entry_offset(slot))
    }

    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        if self.writes_left.fetch_sub(1, std::sync::atomic::Ordering::SeqCst) <= 0 {
            return Err(io::Error::other("the disk lost power"));
        }
        file.write_all_at(bytes, offset)
    }
}

/// Opens a segment's file for both ways, for this user alone: it tells what others asked.
pub(super) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

impl Tier for DiskTier {
    fn write(&self, place: u64, record: &Record<'_>) -> io::Result<()> {
        let (segment, slot) = self.format.segment_of(place);
        let file = self.segment(segment)?;
        let entry = Entry {
            place,
            namespace: record.namespace,
            key: record.key,
            generation: record.generation,
            belongs: record.belongs,
            checksums: record.pages.iter().map(|page| page.crc32c).collect(),
        };
        // The entry of the block that was here goes first and the new one comes last: a place that is half written has none.
        self.clear_entry(&file, slot)?;
        for (layer, page) in record.pages.iter().enumerate() {
            self.write_at(&file, page.payload.as_bytes(), self.format.tile_offset(slot, layer as u32))?;
        }
        self.write_at(&file, &self.format.entry(&entry), self.format.entry_offset(slot))
    }

    fn clear(&self, place: u64) -> io::Result<()> {
        let (segment, slot) = self.format.segment_of(place);
        self.clear_entry(&*self.find(segment)?, slot)
    }

    fn read(&self, place: u64, layer: u32, into: &mut [u8]) -> io::Result<()> {
        let (segment, slot) = self.format.segment_of(place);
        self.find(segment)?.read_exact_at(into, self.format.tile_offset(slot, layer))
    }

    fn will_read(&self, place: u64, layers: Range<u32>) {
        let (segment, slot) = self.format.segment_of(place);
        let Ok(file) = self.find(segment) else { return };
        let start = self.format.tile_offset(slot, layers.start);
        let bytes = self.format.tile_stride() * u64::from(layers.end.saturating_sub(layers.start));
        let _a_hint_only =
            rustix::fs::fadvise(&file, start, std::num::NonZeroU64::new(bytes), rustix::fs::Advice::WillNeed);
    }
}
