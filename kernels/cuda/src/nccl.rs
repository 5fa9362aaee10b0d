//! Communicators between GPUs: tiles and partials go from device memory to device memory of another process.
//!
//! A communicator never blocks: it is made non-blocking, what is under way is asked for its state, and the caller says before
//! each look whether there is time left. Whatever goes wrong, it is aborted, and the peers find out by theirs. Why these bindings:
//! `docs/adr/0015-nccl-through-cudarc.md`.
#![allow(unsafe_code, reason = "calls a foreign library; see SAFETY")]

mod communicator;
mod lane;
mod tiles;

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    fmt,
    path::PathBuf,
};

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclUniqueId};

pub use communicator::{Communicator, Part};
pub use lane::{Convener, Invitation, LaneState, NcclConvener, NcclLane, Ranks};
pub use tiles::TileLane;

use crate::{
    Error, Library,
    library::{self, functions},
};

functions! {
    struct Functions {
        version: "ncclGetVersion"(*mut c_int) -> c_int,
        unique_id: "ncclGetUniqueId"(*mut ncclUniqueId) -> c_int,
        error_string: "ncclGetErrorString"(c_int) -> *const c_char,
        last_error: "ncclGetLastError"(ncclComm_t) -> *const c_char,
        init: "ncclCommInitRankConfig"(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut Config) -> c_int,
        state: "ncclCommGetAsyncError"(ncclComm_t, *mut c_int) -> c_int,
        finalize: "ncclCommFinalize"(ncclComm_t) -> c_int,
        destroy: "ncclCommDestroy"(ncclComm_t) -> c_int,
        abort: "ncclCommAbort"(ncclComm_t) -> c_int,
        group_start: "ncclGroupStart"() -> c_int,
        group_end: "ncclGroupEnd"() -> c_int,
        send: "ncclSend"(*const c_void, usize, c_int, c_int, ncclComm_t, cudaStream_t) -> c_int,
        receive: "ncclRecv"(*mut c_void, usize, c_int, c_int, ncclComm_t, cudaStream_t) -> c_int,
    }
}

const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// `ncclUint8`: everything travels as bytes.
const BYTES: c_int = 1;
/// 2.18, as the library writes it: non-blocking communicators with finalising and aborting that can be relied on.
const VERSION_MIN: u32 = 21_800;

/// The settings as NCCL 2.17 had them, which every later version reads as the beginning of its own.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// `NCCL_CONFIG_INITIALIZER` of 2.17, but for `blocking`.
    fn non_blocking() -> Self {
        /// `NCCL_CONFIG_UNDEF_INT`.
        const UNDEFINED: c_int = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21_700,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

/// What the ranks of a communicator find each other by: made by one of them, handed to the others by another way.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId([u8; Self::BYTES]);

impl UniqueId {
    /// Its size.
    pub const BYTES: usize = 128;

    /// An id that came over the network.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let refuse = |problem: String| Error::Invalid { field: "unique_id", problem };
        let id = <[u8; Self::BYTES]>::try_from(bytes)
            .map_err(|_| refuse(format!("has {} bytes, must have {}", bytes.len(), Self::BYTES)))?;
        match id.iter().all(|&byte| byte == 0) {
            true => Err(refuse("is all zeros; one rank must make it".to_owned())),
            false => Ok(Self(id)),
        }
    }

    /// To be sent.
    pub fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    fn foreign(&self) -> ncclUniqueId {
        ncclUniqueId { internal: self.0.map(|byte| byte as c_char) }
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Who knows it can join.
        f.write_str("UniqueId(…)")
    }
}

/// The library.
#[derive(Debug, Clone)]
pub struct Nccl {
    functions: Functions,
    version: u32,
    path: String,
}

impl Nccl {
    /// Opens it, looking in `folders` first.
    pub fn open(folders: &[PathBuf]) -> Result<Self, Error> {
        let opened = library::open(Library::Nccl, folders)?;
        let functions = Functions::of(&opened)?;
        let mut version = 0;
        // SAFETY: points at an integer.
        let status = unsafe { (functions.version)(&raw mut version) };
        let nccl = Self { functions, version: version.unsigned_abs(), path: opened.path };
        if status != SUCCESS {
            return Err(Library::Nccl.error(format!("ncclGetVersion: {}", nccl.text(status))));
        }
        if nccl.version < VERSION_MIN {
            return Err(Library::Nccl.error(format!("`{}` is NCCL {}", nccl.path, nccl.version_name())));
        }
        Ok(nccl)
    }

    /// Its version for people.
    pub fn version_name(&self) -> String {
        format!("{}.{}.{}", self.version / 10_000, self.version / 100 % 100, self.version % 100)
    }

    /// Where it was found.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// A new id. The process that makes it must live until all ranks have joined: they meet at an address of its.
    pub fn unique_id(&self) -> Result<UniqueId, Error> {
        let mut id = ncclUniqueId { internal: [0; UniqueId::BYTES] };
        // SAFETY: points at an id.
        let status = unsafe { (self.functions.unique_id)(&raw mut id) };
        match status {
            SUCCESS => Ok(UniqueId(id.internal.map(|byte| byte as u8))),
            other => Err(Library::Nccl.error(format!("ncclGetUniqueId: {}", self.text(other)))),
        }
    }

    fn text(&self, status: c_int) -> String {
        // SAFETY: takes any number, returns a string that is never freed.
        owned(unsafe { (self.functions.error_string)(status) }).unwrap_or_else(|| format!("code {status}"))
    }
}

/// A string of the library; `None`: none.
fn owned(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: a string of the library, ended with a zero.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    Some(text).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    #[test]
    fn ids_that_are_none_are_refused() {
        for hostile in [&[][..], &[1; 127], &[1; 129], &[0; 128], &[1; 1 << 16]] {
            let error = UniqueId::from_bytes(hostile).unwrap_err();
            assert!(
                error.kind() == Kind::InvalidInput && error.to_string().contains("`unique_id`"),
                "{error}"
            );
        }
        let bytes: Vec<u8> = (0..128).map(|byte| byte ^ 0xa5).collect();
        let id = UniqueId::from_bytes(&bytes).unwrap();
        assert_eq!(&id.as_bytes()[..], bytes);
        assert_eq!(id.foreign().internal.map(|byte| byte as u8).to_vec(), bytes);
        assert!(!format!("{id:?}").contains("165"), "an id is a secret");
    }

    #[test]
    fn without_the_library_there_is_an_error_with_a_remedy() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("libnccl.so.2"), b"no library").unwrap();
        let error = Nccl::open(&[folder.path().to_owned()]).unwrap_err();
        assert!(error.kind() == Kind::Unavailable && error.to_string().contains("NCCL 2.18"), "{error}");
    }

    #[test]
    fn the_settings_have_the_layout_of_the_header() {
        // size, magic, version, blocking, cgaClusterSize, minCTAs, maxCTAs, netName, splitShare, padding.
        assert_eq!(size_of::<Config>(), 8 + 6 * 4 + 8 + 4 + 4);
        // NCCL_API_MAGIC: settings without it are refused as not initialised.
        assert_eq!(Config::non_blocking().magic, 0xcafe_beef);
        assert_eq!(std::mem::offset_of!(Config, net_name), 32);
    }
}
