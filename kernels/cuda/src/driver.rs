//! The driver and the devices that it sees. cudarc's bindings load `libcuda` at their first call and panic where it or one of its
//! functions is missing; so it is opened and looked through here first, and a [`Driver`] is the proof of that.
#![allow(unsafe_code, reason = "calls the driver; see SAFETY")]

use std::path::PathBuf;

use cudarc::driver::{
    result::{self, DriverError},
    sys::{self, CUdevice_attribute as Attribute, CUresult},
};

use crate::{Error, Library, Version, architecture::capability_name, library};

/// The oldest driver that has what we call. Compiled kernels may need a newer one: as new as the compiler's CUDA.
const VERSION_MIN: Version = Version::new(12, 0);

/// Every function of the driver that this crate calls, by the names of the bindings.
const SYMBOLS: &[&str] = &[
    "cuCtxSetCurrent",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetDefaultMemPool",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAllocAsync",
    "cuMemAlloc_v2",
    "cuMemFreeAsync",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemPoolSetAttribute",
    "cuMemPoolTrimTo",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamQuery",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// A driver that was found, is new enough, and is initialised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Driver {
    version: Version,
}

/// A device of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The `N` of `cuda:N`.
    pub index: u32,
    /// What its maker calls it.
    pub name: String,
    /// Compute capability as 10 × major + minor.
    pub capability: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// All its memory.
    pub memory_bytes: u64,
    /// Most shared memory that a thread block may ask for.
    pub shared_bytes_limit: usize,
    /// Whether memory can be taken and given back in stream order.
    pub(crate) memory_pools: bool,
    pub(crate) handle: sys::CUdevice,
}

impl Driver {
    /// Opens the driver, looking in `folders` first.
    pub fn open(folders: &[PathBuf]) -> Result<Self, Error> {
        let opened = library::open(Library::Driver, folders)?;
        opened.has(SYMBOLS)?;
        // SAFETY: looks for a library by name, which has been opened just now.
        if !unsafe { sys::is_culib_present() } {
            return Err(
                Library::Driver.error("it was opened, but is not known by the name that its bindings use")
            );
        }
        let mut number = 0;
        // SAFETY: points at an integer; may be called before `cuInit`.
        let told = unsafe { sys::cuDriverGetVersion(&raw mut number) }.result();
        told.map_err(|error| Library::Driver.error(format!("cuDriverGetVersion: {}", describe(error))))?;
        let driver = Self { version: Version::of_driver(number.unsigned_abs()) };
        driver.require(VERSION_MIN, "Longshore")?;
        result::init().map_err(initialisation)?;
        Ok(driver)
    }

    /// The newest CUDA that it knows.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Refuses a driver that knows no CUDA as new as `needed` by `what`. Code of a major version runs under every driver of
    /// that version, whatever the minor version of either.
    pub fn require(&self, needed: Version, what: &str) -> Result<(), Error> {
        if self.version >= Version::new(needed.major, 0) {
            return Ok(());
        }
        Err(Error::DriverTooOld {
            found: self.version.to_string(),
            needed: Version::new(needed.major, 0).to_string(),
            what: what.to_owned(),
            release: if needed.major >= 13 { "580" } else { "525" },
        })
    }

    /// Every device.
    pub fn devices(&self) -> Result<Vec<DeviceInfo>, Error> {
        let refused = |error| Error::NoDevice { problem: describe(error) };
        let count = result::device::get_count().map_err(refused)?;
        (0..count.unsigned_abs()).map(|index| examine(index).map_err(refused)).collect()
    }

    /// The device `cuda:index`.
    pub fn device(&self, index: u32) -> Result<DeviceInfo, Error> {
        let mut all = self.devices()?;
        if all.is_empty() {
            return Err(Error::NoDevice { problem: "the driver sees none".to_owned() });
        }
        match all.iter().position(|device| device.index == index) {
            Some(at) => Ok(all.swap_remove(at)),
            None => {
                let names: Vec<String> =
                    all.iter().map(|d| format!("`cuda:{}` ({})", d.index, d.name)).collect();
                Err(Error::NoSuchDevice { index, found: names.join(", ") })
            }
        }
    }
}

impl DeviceInfo {
    /// In a few words.
    pub fn description(&self) -> String {
        let gib = self.memory_bytes as f64 / f64::from(1 << 30);
        format!(
            "{}, compute capability {}, {} multiprocessors, {gib:.1} GiB",
            self.name,
            capability_name(self.capability),
            self.multiprocessors
        )
    }
}

fn examine(index: u32) -> Result<DeviceInfo, DriverError> {
    let handle =
        result::device::get(i32::try_from(index).expect("an index below a count that is an integer"))?;
    // SAFETY: the device was told by the driver.
    let attribute = |attribute| unsafe { result::device::get_attribute(handle, attribute) };
    let number = |which| attribute(which).map(|value| usize::try_from(value).unwrap_or(0));
    let major = number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok(DeviceInfo {
        index,
        name: result::device::get_name(handle)?,
        capability: u32::try_from(10 * major + minor).unwrap_or(0),
        multiprocessors: number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        // SAFETY: the device was told by the driver.
        memory_bytes: unsafe { result::device::total_mem(handle) }? as u64,
        shared_bytes_limit: number(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        memory_pools: number(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? != 0,
        handle,
    })
}

/// Why `cuInit` failed.
fn initialisation(error: DriverError) -> Error {
    match error.0 {
        CUresult::CUDA_ERROR_STUB_LIBRARY => {
            Library::Driver.error("it is the stub that programs are linked with, not a driver")
        }
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            Library::Driver
                .error(format!("it does not fit the kernel module that is loaded: {}", describe(error)))
        }
        _ => Error::NoDevice { problem: describe(error) },
    }
}

/// What the driver calls an error, and what it says of it.
pub(crate) fn describe(error: DriverError) -> String {
    let text = |found: Result<&std::ffi::CStr, DriverError>| {
        found.map_or_else(
            |_| "an error that it does not know".to_owned(),
            |text| text.to_string_lossy().into_owned(),
        )
    };
    format!("{} ({})", text(error.error_string()), text(error.error_name()))
}
