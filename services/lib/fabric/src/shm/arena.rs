//! Memory that two processes share, as safe functions. All of the crate's `unsafe` is here.
//!
//! The rules that make them safe: a mapping is exactly as long as its sealed file, so that no access can fault; its bytes are only
//! copied, never referred to, because the other process may change them at any time; every range is checked before.

#![allow(unsafe_code, reason = "mappings of shared memory are raw pointers")]

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, fstatfs, ftruncate, memfd_create},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

/// What a file must promise before it is mapped: that it never gets shorter, which would make accesses fault.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);
/// `f_type` of the file system of plain memory files. Those of huge pages fault when the pool is empty.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// A mapping of a whole sealed memory file.
#[derive(Debug)]
struct Mapping {
    address: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the pointer is to shared memory that belongs to the mapping for its whole life and to no thread; its bytes are only
// copied in and out through raw pointers.
unsafe impl Send for Mapping {}
// SAFETY: as above; no reference to the bytes is ever made, so that concurrent copies are no worse than those of the other process.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: impl AsFd, bytes: usize, access: ProtFlags) -> io::Result<Self> {
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing.
        let address =
            unsafe { mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, file.as_fd(), 0)? };
        let address = NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { address, bytes })
    }

    fn check(&self, offset: usize, bytes: usize) {
        let end = offset.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= self.bytes), "a range beyond the end of shared memory");
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the one that was mapped, and nobody can use it any more.
        let unmapped = unsafe { munmap(self.address.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "an own mapping can be removed");
    }
}

/// Memory that this process writes and the other one reads.
#[derive(Debug)]
pub(super) struct Arena {
    mapping: Mapping,
    file: OwnedFd,
}

impl Arena {
    pub(super) fn new(bytes: usize) -> io::Result<Self> {
        let file = memfd_create(c"longshore", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, bytes as u64)?;
        let mapping = Mapping::new(&file, bytes, ProtFlags::READ | ProtFlags::WRITE)?;
        // From here on nobody can map it for writing, the peer neither.
        fcntl_add_seals(&file, SEALS.union(SealFlags::FUTURE_WRITE))?;
        Ok(Self { mapping, file })
    }

    /// What the peer gets.
    pub(super) fn file(&self) -> &OwnedFd {
        &self.file
    }

    pub(super) fn bytes(&self) -> usize {
        self.mapping.bytes
    }

    /// Copies `from` to `offset`.
    ///
    /// # Panics
    /// Beyond the end.
    pub(super) fn write(&self, offset: usize, from: &[u8]) {
        self.mapping.check(offset, from.len());
        // SAFETY: the range lies in the mapping, which is writable and lives as long as `self`; `from` is private memory and
        // cannot overlap it. The slot is lent to one writer at a time; a reader that looks too early sees bytes that fail its check.
        unsafe {
            std::ptr::copy_nonoverlapping(
                from.as_ptr(),
                self.mapping.address.as_ptr().add(offset),
                from.len(),
            );
        }
    }
}

/// Memory that the other process writes.
#[derive(Debug)]
pub(super) struct Window {
    mapping: Mapping,
}

impl Window {
    /// Maps a file that came from the other process. Refuses one that is not plain sealed memory of `bytes`.
    pub(super) fn new(file: &OwnedFd, bytes: usize) -> io::Result<Self> {
        let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidData, why));
        if !fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SEALS)) {
            return refuse("the shared file could shrink");
        }
        if fstatfs(file)?.f_type as i64 != TMPFS_MAGIC {
            return refuse("the shared file is not plain memory");
        }
        if u64::try_from(fstat(file)?.st_size) != Ok(bytes as u64) || bytes == 0 {
            return refuse("the shared file has another size than was said");
        }
        Ok(Self { mapping: Mapping::new(file, bytes, ProtFlags::READ)? })
    }

    pub(super) fn bytes(&self) -> usize {
        self.mapping.bytes
    }

    /// Copies from `offset` on to all of `into`.
    ///
    /// # Panics
    /// Beyond the end.
    pub(super) fn copy_to(&self, offset: usize, into: &mut [u8]) {
        self.mapping.check(offset, into.len());
        // SAFETY: the range lies in the mapping, which is readable, cannot fault because its file is sealed against shrinking, and
        // lives as long as `self`; `into` is private memory and cannot overlap it. The other process may write meanwhile: any bytes
        // may come out, which the checksum of the copy tells.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.mapping.address.as_ptr().add(offset),
                into.as_mut_ptr(),
                into.len(),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_side_writes_the_other_copies() {
        let arena = Arena::new(1 << 16).unwrap();
        let window = Window::new(arena.file(), 1 << 16).unwrap();
        arena.write(100, b"tile");
        let mut copy = [0; 6];
        window.copy_to(99, &mut copy);
        assert_eq!(&copy, b"\0tile\0");
        drop(arena);
        window.copy_to(100, &mut copy[..4]);
        assert_eq!(&copy[..4], b"tile", "the memory lives as long as either side");
    }

    #[test]
    fn the_reader_can_neither_write_nor_shorten() {
        let arena = Arena::new(1 << 16).unwrap();
        assert!(Mapping::new(arena.file(), 1 << 16, ProtFlags::READ | ProtFlags::WRITE).is_err());
        assert!(ftruncate(arena.file(), 0).is_err());
        assert!(rustix::io::write(arena.file(), b"x").is_err());
    }

    #[test]
    fn files_that_could_fault_are_refused() {
        let open = memfd_create(c"open", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&open, 4096).unwrap();
        assert!(Window::new(&open, 4096).unwrap_err().to_string().contains("shrink"));
        let plain: OwnedFd = std::fs::File::open("/proc/self/exe").unwrap().into();
        assert!(Window::new(&plain, 4096).is_err());
        let arena = Arena::new(4096).unwrap();
        for wrong in [0, 4095, 8192, usize::MAX] {
            assert!(Window::new(arena.file(), wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn ranges_beyond_the_end_panic() {
        let arena = Arena::new(4096).unwrap();
        let window = Window::new(arena.file(), 4096).unwrap();
        for (offset, bytes) in [(4096, 1), (4000, 97), (usize::MAX, 2)] {
            let reading = std::panic::AssertUnwindSafe(|| window.copy_to(offset, &mut vec![0; bytes]));
            assert!(std::panic::catch_unwind(reading).is_err());
            let writing = std::panic::AssertUnwindSafe(|| arena.write(offset, &vec![0; bytes]));
            assert!(std::panic::catch_unwind(writing).is_err());
        }
    }
}
