//! A CUDA device through the driver: one context, one stream, compiled kernels.
#![allow(unsafe_code, reason = "calls the driver; see SAFETY")]

mod departures;
mod staging;
mod streams;

use std::{
    collections::HashMap,
    ffi::{CString, c_void},
    fmt,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use cudarc::driver::{
    result::{self, DriverError},
    sys::{self, CUfunction_attribute as FunctionAttribute, CUmemPool_attribute as PoolAttribute, CUresult},
};

use self::departures::Departures;
use self::staging::{Downloads, Uploads};
use crate::{
    Architecture, Compiler, CudaOptions, Device, DeviceInfo, Driver, Error, Kernel, Launch, Memory, Queue,
    Span, cubin, driver::describe, launch, registry,
};

/// A CUDA device. Calls are queued on one stream, in the order in which they are made; copies of much on another, copies to the host
/// on a third, and those that are begun and taken later on a fourth.
///
/// A fault inside a kernel (an address that is none, an instruction that fails) is told by some later call and loses the
/// context: every call from then on says so with [`Kind::Device`](crate::Kind::Device). Only a new process gets it back.
pub struct CudaDevice {
    info: DeviceInfo,
    compiler: Compiler,
    architecture: Architecture,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Of [`Queue::Arrivals`].
    arrivals: sys::CUstream,
    /// Each with a lock of its own: one that is being compiled holds up nobody who launches another.
    functions: Mutex<HashMap<Kernel, Arc<Mutex<Option<Function>>>>>,
    uploads: Mutex<Uploads>,
    /// For much at once.
    uploads_apart: Mutex<Uploads>,
    downloads: Mutex<Downloads>,
    departures: Departures,
    /// The fault that lost the context.
    lost: OnceLock<String>,
}

// SAFETY: the driver's functions may be called from any thread, and its handles belong to the process; each call makes the
// context current to its thread first. What is not a handle lies behind locks.
unsafe impl Send for CudaDevice {}
// SAFETY: as above.
unsafe impl Sync for CudaDevice {}

/// What a new context is given: streams by queue, ways to the device for little and for much, and from it.
type Furniture = ([sys::CUstream; 2], [Uploads; 2], Downloads);

/// A loaded kernel.
#[derive(Clone, Copy)]
struct Function {
    module: sys::CUmodule,
    handle: sys::CUfunction,
    argument_bytes: usize,
}

impl CudaDevice {
    /// Looks whether the device `cuda:index` could be opened: driver, device, compiler. Takes nothing of the device.
    pub fn examine(index: u32, options: &CudaOptions) -> Result<DeviceInfo, Error> {
        Self::find(index, options).map(|(info, _, _)| info)
    }

    fn find(index: u32, options: &CudaOptions) -> Result<(DeviceInfo, Architecture, Compiler), Error> {
        let driver = Driver::open(&options.library_path)?;
        let info = driver.device(index)?;
        let architecture = Architecture::of(info.capability)?;
        let compiler = Compiler::open(options, Some(driver.version()))?;
        driver.require(compiler.nvrtc().version(), "code of its NVRTC")?;
        Ok((info, architecture, compiler))
    }

    /// Opens the device `cuda:index`: driver, compiler, context, stream, staging memory.
    pub fn open(index: u32, options: &CudaOptions) -> Result<Self, Error> {
        let (info, architecture, compiler) = Self::find(index, options)?;
        // SAFETY: the device was told by the driver; the context is given back when the device is dropped, or just below.
        let context = unsafe { result::primary_ctx::retain(info.handle) }
            .map_err(|error| fault("cuDevicePrimaryCtxRetain", 0, error))?;
        let made = Self::furnish(context, &info).map_err(|(call, error)| fault(call, 0, error));
        let ([stream, arrivals], [uploads, uploads_apart], downloads) = match made {
            Ok(made) => made,
            Err(error) => {
                // SAFETY: retained above. The first error tells more than one of giving back.
                let _ = unsafe { result::primary_ctx::release(info.handle) };
                return Err(error);
            }
        };
        let (functions, lost) = (Mutex::default(), OnceLock::new());
        Ok(Self {
            info,
            compiler,
            architecture,
            context,
            stream,
            arrivals,
            functions,
            uploads: Mutex::new(uploads),
            uploads_apart: Mutex::new(uploads_apart),
            downloads: Mutex::new(downloads),
            departures: Departures::default(),
            lost,
        })
    }

    /// Streams and staging memory in a new context.
    fn furnish(context: sys::CUcontext, info: &DeviceInfo) -> Result<Furniture, (&'static str, DriverError)> {
        // SAFETY: the context was retained by the caller.
        unsafe { result::ctx::set_current(context) }.map_err(|e| ("cuCtxSetCurrent", e))?;
        if info.memory_pools {
            keep_freed_memory(info.handle).map_err(|e| ("cuMemPoolSetAttribute", e))?;
        }
        // Not ordered with the legacy stream, which libraries may use without being asked.
        let streams = streams::two().map_err(|e| ("cuStreamCreate", e))?;
        match staging::all() {
            Ok((uploads, downloads)) => Ok((streams, uploads, downloads)),
            Err(error) => {
                for stream in streams {
                    // SAFETY: made above and used by nothing. The first error tells more.
                    let _ = unsafe { result::stream::destroy(stream) };
                }
                Err(("cuMemHostAlloc", error))
            }
        }
    }

    /// What is known of the device.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// What compiles for it.
    pub fn compiler(&self) -> &Compiler {
        &self.compiler
    }

    /// Bytes that are free and bytes in all, as the driver tells them; what this process keeps for its own next calls counts as
    /// used.
    pub fn memory(&self) -> Result<(usize, usize), Error> {
        self.enter()?;
        self.check("cuMemGetInfo", result::mem_get_info())
    }

    /// The stream, with the context current to this thread: for libraries that queue work of their own.
    pub(crate) fn enter(&self) -> Result<sys::CUstream, Error> {
        if let Some(problem) = self.lost.get() {
            return Err(Error::Device { call: "an earlier call", problem: problem.clone() });
        }
        // SAFETY: the context is retained until the device is dropped.
        self.check("cuCtxSetCurrent", unsafe { result::ctx::set_current(self.context) })?;
        Ok(self.stream)
    }

    fn check<T>(&self, call: &'static str, outcome: Result<T, DriverError>) -> Result<T, Error> {
        self.check_bytes(call, 0, outcome)
    }

    fn check_bytes<T>(
        &self,
        call: &'static str,
        bytes: usize,
        outcome: Result<T, DriverError>,
    ) -> Result<T, Error> {
        outcome.map_err(|error| {
            if loses_context(error.0) {
                // The first fault is the cause of all later ones.
                let _ = self.lost.set(format!("{call}: {}", describe(error)));
            }
            fault(call, bytes, error)
        })
    }

    fn memory_of(&self, bytes: usize) -> Result<sys::CUdeviceptr, DriverError> {
        match self.info.memory_pools {
            // SAFETY: the stream lives as long as the device; every use of the memory is queued on it.
            true => unsafe { result::malloc_async(self.stream, bytes) },
            // SAFETY: the context is current.
            false => unsafe { result::malloc_sync(bytes) },
        }
    }

    /// Waits for memory that was given back and is still in use, and returns what the pool keeps to the device.
    fn make_room(&self) -> Result<(), DriverError> {
        // SAFETY: the stream lives as long as the device.
        unsafe { result::stream::synchronize(self.stream) }?;
        if self.info.memory_pools {
            // SAFETY: the device was told by the driver, and the pool by the device.
            unsafe { result::mem_pool::trim_to(result::device::get_default_mem_pool(self.info.handle)?, 0) }?;
        }
        Ok(())
    }

    /// The loaded kernel, compiled at its first launch.
    fn function(&self, kernel: &Kernel) -> Result<Function, Error> {
        let place = self.place_of(kernel);
        let mut function = locked(&place);
        if let Some(found) = *function {
            return Ok(found);
        }
        let code = self.compiler.cubin(kernel, self.architecture)?;
        let argument_bytes = cubin::argument_bytes(&code, kernel.entry)?;
        let loaded = self.load(&code, kernel.entry, argument_bytes)?;
        *function = Some(loaded);
        Ok(loaded)
    }

    /// Where a kernel is, or will be.
    fn place_of(&self, kernel: &Kernel) -> Arc<Mutex<Option<Function>>> {
        let mut functions = locked(&self.functions);
        if let Some(place) = functions.get(kernel) {
            return Arc::clone(place);
        }
        Arc::clone(functions.entry(kernel.clone()).or_default())
    }

    /// Refuses code whose thread blocks would wait for registers for ever: another compiler may deal out others than those that the tests saw.
    fn check_registers(&self, handle: sys::CUfunction, entry: &str) -> Result<(), Error> {
        let Some(budget) = registry::exact_budget(entry) else { return Ok(()) };
        let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_NUM_REGS;
        // SAFETY: the function was found in a loaded module.
        let told = unsafe { result::function::get_function_attribute(handle, attribute) };
        let registers = self.check("cuFuncGetAttribute", told)?.unsigned_abs();
        let Some(problem) = budget.refuses(registers) else { return Ok(()) };
        let nvrtc = self.compiler.nvrtc().version();
        let problem = format!("{problem} (NVRTC {nvrtc} made it); hint: set `cuda.wgmma` to false");
        Err(Error::Kernel { kernel: entry.to_owned(), problem })
    }

    fn load(&self, code: &[u8], entry: &str, argument_bytes: usize) -> Result<Function, Error> {
        let name = CString::new(entry)
            .map_err(|_| Error::Invalid { field: "entry", problem: "has a zero byte".to_owned() })?;
        // SAFETY: an ELF file as `argument_bytes` found it, made by NVRTC or kept in the cache with its digest; the driver
        // copies it.
        let module = self.check("cuModuleLoadData", unsafe {
            result::module::load_data(code.as_ptr().cast::<c_void>())
        })?;
        // SAFETY: the module was loaded above; functions live as long as it.
        let found = self.check("cuModuleGetFunction", unsafe { result::module::get_function(module, name) });
        let found = found.and_then(|handle| self.check_registers(handle, entry).map(|()| handle));
        let limit = i32::try_from(self.info.shared_bytes_limit).unwrap_or(i32::MAX);
        let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let allowed = found.and_then(|handle| {
            // Above 48 KiB a kernel gets dynamic shared memory only where it was allowed to.
            // SAFETY: the function was found in a loaded module.
            let set = unsafe { result::function::set_function_attribute(handle, attribute, limit) };
            self.check("cuFuncSetAttribute", set).map(|()| handle)
        });
        match allowed {
            Ok(handle) => Ok(Function { module, handle, argument_bytes }),
            Err(error) => {
                // SAFETY: loaded above, and nothing of it was launched. The first error tells more.
                let _ = unsafe { result::module::unload(module) };
                Err(error)
            }
        }
    }
}

impl Device for CudaDevice {
    fn name(&self) -> String {
        self.info.name.clone()
    }

    fn multiprocessors(&self) -> usize {
        self.info.multiprocessors
    }

    fn capability(&self) -> u32 {
        self.info.capability
    }

    fn shared_bytes_limit(&self) -> usize {
        self.info.shared_bytes_limit
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, Error> {
        self.enter()?;
        // The driver refuses to give no memory.
        let needed = bytes.max(1);
        let mut outcome = self.memory_of(needed);
        if matches!(outcome, Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY))) {
            outcome = self.make_room().and_then(|()| self.memory_of(needed));
        }
        let address = self.check_bytes("cuMemAlloc", bytes, outcome)?;
        // SAFETY: just allocated, and named by nobody.
        Ok(unsafe { Memory::new(address, bytes) })
    }

    fn free(&self, memory: Memory) {
        let address = memory.address();
        // A lost context has no memory any more.
        if self.enter().is_ok() {
            let outcome = match self.info.memory_pools {
                // SAFETY: taken by `allocate` on the same stream, and given back once: nobody else names it.
                true => unsafe { result::free_async(address, self.stream) },
                // SAFETY: the same; the call waits for what uses it.
                false => unsafe { result::free_sync(address) },
            };
            // Nobody waits for the outcome; a fault that lost the context is told by the next call.
            let _ = self.check("cuMemFree", outcome);
        }
    }

    fn upload(&self, to: Span<'_>, from: &[u8]) -> Result<(), Error> {
        to.check(from.len())?;
        let stream = self.enter()?;
        // SAFETY: the span lies in a buffer and has as many bytes; the stream belongs to the staging memory's device.
        let outcome = unsafe { locked(&self.uploads).upload(stream, to.address(), from) };
        self.check("cuMemcpyHtoDAsync", outcome)
    }

    fn upload_apart(&self, to: Span<'_>, from: &[u8]) -> Result<(), Error> {
        to.check(from.len())?;
        self.enter()?;
        // SAFETY: as in `upload`; that nothing else uses the memory meanwhile is the caller's promise, as with every launch.
        let outcome = unsafe { locked(&self.uploads_apart).upload(self.arrivals, to.address(), from) };
        self.check("cuMemcpyHtoDAsync", outcome)
    }

    fn mark(&self, queue: Queue) -> Result<u64, Error> {
        self.new_mark(self.stream_of(queue))
    }

    fn hold_up(&self, queue: Queue, mark: u64) -> Result<(), Error> {
        self.wait_for_mark(self.stream_of(queue), mark)
    }

    fn forget(&self, mark: u64) {
        self.destroy_mark(mark);
    }

    fn download(&self, from: Span<'_>, to: &mut [u8]) -> Result<(), Error> {
        from.check(to.len())?;
        // Others go on queueing while this waits, and what they queue is not waited for.
        self.wait_for_queued()?;
        // SAFETY: the span lies in a buffer and has as many bytes; what was queued to write there is done.
        let outcome = unsafe { locked(&self.downloads).download(from.address(), to) };
        self.check("cuMemcpyDtoHAsync", outcome)
    }

    fn depart(&self, from: Span<'_>) -> Result<Option<u64>, Error> {
        self.begin_departure(from)
    }

    fn refused_departures(&self) -> u64 {
        self.departures.refused()
    }

    fn collect(&self, departure: u64, to: &mut [u8]) -> Result<(), Error> {
        self.end_departure(departure, Some(to))
    }

    fn abandon(&self, departure: u64) {
        // A fault that lost the context is told by the next call.
        let _ = self.end_departure(departure, None);
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        launch::check(launch, self.info.shared_bytes_limit)?;
        let stream = self.enter()?;
        let function = self.function(launch.kernel)?;
        if function.argument_bytes != launch.argument.len() {
            let problem = format!(
                "takes an argument of {} bytes, was given {}",
                function.argument_bytes,
                launch.argument.len()
            );
            return Err(Error::Kernel { kernel: launch.kernel.entry.to_owned(), problem });
        }
        // The argument goes as a buffer with its size, so that the driver reads no byte more. The keys are those of `cuda.h`:
        // CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE, CU_LAUNCH_PARAM_END.
        let mut bytes = launch.argument.len();
        let mut extra = [
            std::ptr::without_provenance_mut::<c_void>(1),
            launch.argument.as_ptr().cast_mut().cast(),
            std::ptr::without_provenance_mut(2),
            (&raw mut bytes).cast(),
            std::ptr::null_mut(),
        ];
        let [x, y, z] = launch.grid;
        // SAFETY: the function belongs to a module that stays loaded; its argument has the size that the code tells and is
        // copied by the call. What the kernel does with the addresses in it is the caller's promise, as with every launch.
        let status = unsafe {
            sys::cuLaunchKernel(
                function.handle,
                x,
                y,
                z,
                launch.threads,
                1,
                1,
                launch.shared_bytes,
                stream,
                std::ptr::null_mut(),
                extra.as_mut_ptr(),
            )
        };
        self.check("cuLaunchKernel", status.result())
    }

    fn synchronize(&self) -> Result<(), Error> {
        self.enter()?;
        for queue in [Queue::Arrivals, Queue::Compute] {
            self.wait_for(self.stream_of(queue))?;
        }
        Ok(())
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // SAFETY: everything was made by `open` or `load` and is given back once; `&mut self` means that nobody uses it. Errors
        // are of no use to anybody any more: with a lost context every call fails.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::stream::synchronize(self.arrivals);
            let _ = result::stream::synchronize(self.stream);
            self.uploads.get_mut().unwrap_or_else(PoisonError::into_inner).release();
            self.uploads_apart.get_mut().unwrap_or_else(PoisonError::into_inner).release();
            self.downloads.get_mut().unwrap_or_else(PoisonError::into_inner).release();
            self.departures.release();
            for place in self.functions.get_mut().unwrap_or_else(PoisonError::into_inner).values() {
                if let Some(function) = *locked(place) {
                    let _ = result::module::unload(function.module);
                }
            }
            let _ = result::stream::destroy(self.arrivals);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.info.handle);
        }
    }
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaDevice")
            .field("info", &self.info)
            .field("lost", &self.lost)
            .finish_non_exhaustive()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory that is given back stays with the process for its next call: without this it would go back to the device whenever the
/// stream is waited for.
fn keep_freed_memory(device: sys::CUdevice) -> Result<(), DriverError> {
    let mut kept = u64::MAX;
    // SAFETY: the device was told by the driver and the pool by the device; this attribute is a 64-bit number.
    unsafe {
        let pool = result::device::get_default_mem_pool(device)?;
        let attribute = PoolAttribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut kept).cast())
    }
}

fn fault(call: &'static str, bytes: usize, error: DriverError) -> Error {
    match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { bytes, problem: describe(error) },
        _ => Error::Device { call, problem: describe(error) },
    }
}

/// Whether nothing can be done any more in a context that told this. By the driver's documentation: faults of kernels, of
/// memory and of links, and errors that it cannot name.
fn loses_context(code: CUresult) -> bool {
    use CUresult as R;
    matches!(
        code,
        R::CUDA_ERROR_DEINITIALIZED
            | R::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | R::CUDA_ERROR_ECC_UNCORRECTABLE
            | R::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | R::CUDA_ERROR_CONTAINED
            | R::CUDA_ERROR_ILLEGAL_ADDRESS
            | R::CUDA_ERROR_LAUNCH_TIMEOUT
            | R::CUDA_ERROR_ASSERT
            | R::CUDA_ERROR_HARDWARE_STACK_ERROR
            | R::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | R::CUDA_ERROR_MISALIGNED_ADDRESS
            | R::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | R::CUDA_ERROR_INVALID_PC
            | R::CUDA_ERROR_LAUNCH_FAILED
            | R::CUDA_ERROR_TENSOR_MEMORY_LEAK
            | R::CUDA_ERROR_EXTERNAL_DEVICE
            | R::CUDA_ERROR_UNKNOWN
    )
}
