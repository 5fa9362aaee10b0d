//! The emulator as a device: compiles sources with the host's C++ compiler, loads and runs them.

#![allow(dead_code, reason = "each test binary uses its own part")]
#![expect(unsafe_code, reason = "loads what the compiler made of our sources; see SAFETY")]

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, c_char, c_void};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW, Symbol};
use longshore_cuda::{Device, Error, Kernel, Launch, Memory, Queue, Span};

use super::compiler::{Compiler, RUNTIME_FLAGS};
use departures::Departures;
use order::{Copy, Order};

#[path = "departures.rs"]
mod departures;
#[path = "order.rs"]
mod order;

/// What runs blocks; one text.
const RUNTIME: &str = concat!(
    include_str!("threads.cpp"),
    include_str!("groups.cpp"),
    include_str!("products.cpp"),
    include_str!("meetings.cpp"),
    include_str!("blocks.cpp"),
    include_str!("memory.cpp"),
);

/// As `emulator::Launch` in emulator.h.
#[repr(C)]
struct Call {
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u32,
    workers: u32,
    argument: *const c_void,
    argument_bytes: u64,
    bank_conflicts: *mut u64,
}

type Entry = unsafe extern "C" fn(*const Call) -> *const c_char;

/// Runs kernels on the CPU, thread by thread, and finds what a GPU would not tell.
pub(crate) struct Emulator {
    compiler: Compiler,
    runtime: Runtime,
    entries: Mutex<HashMap<Kernel, Entry>>,
    /// Bytes of each allocation by address.
    allocations: Mutex<BTreeMap<u64, usize>>,
    /// What went wrong where no error could be given back.
    fault: Mutex<Option<String>>,
    bank_conflicts: AtomicU64,
    order: Mutex<Order>,
    departures: Mutex<Departures>,
    capability: u32,
}

struct Runtime {
    allocate: Symbol<unsafe extern "C" fn(u64) -> u64>,
    is_whole: Symbol<unsafe extern "C" fn(u64, u64) -> bool>,
    free: Symbol<unsafe extern "C" fn(u64, u64)>,
    hide: Symbol<unsafe extern "C" fn(u64, u64)>,
    show: Symbol<unsafe extern "C" fn(u64, u64)>,
}

impl Emulator {
    /// An emulator with the limits of compute capability 9.0.
    pub(crate) fn new() -> Arc<Self> {
        Self::with_capability(90)
    }

    /// An emulator with the limits of a compute capability.
    pub(crate) fn with_capability(capability: u32) -> Arc<Self> {
        let compiler = Compiler::new();
        let runtime = compiler.library("emulator", RUNTIME, RUNTIME_FLAGS);
        let runtime = load(&runtime.expect("the emulator compiles"), RTLD_GLOBAL);
        // SAFETY: the signatures are those of the runtime, and the library is never unloaded.
        let runtime = unsafe {
            Runtime {
                allocate: runtime.get(b"emulator_allocate").expect("defined"),
                is_whole: runtime.get(b"emulator_is_whole").expect("defined"),
                free: runtime.get(b"emulator_free").expect("defined"),
                hide: runtime.get(b"emulator_hide").expect("defined"),
                show: runtime.get(b"emulator_show").expect("defined"),
            }
        };
        Arc::new(Self {
            compiler,
            runtime,
            entries: Mutex::default(),
            allocations: Mutex::default(),
            fault: Mutex::default(),
            bank_conflicts: AtomicU64::new(0),
            order: Mutex::default(),
            departures: Mutex::default(),
            capability,
        })
    }

    /// The same, as what kernels run on.
    pub(crate) fn device() -> Arc<dyn Device> {
        Self::new()
    }

    /// How often a row of an `ldmatrix` waited for another in the same banks, so far.
    pub(crate) fn bank_conflicts(&self) -> u64 {
        self.bank_conflicts.load(Ordering::Relaxed)
    }

    fn entry(&self, kernel: &Kernel) -> Result<Entry, Error> {
        let mut entries = self.entries.lock().expect("nobody panics with it");
        if let Some(entry) = entries.get(kernel) {
            return Ok(*entry);
        }
        let defines = kernel.constants.iter().map(|(name, value)| format!("#define {name} {value}\n"));
        let source = kernel.source;
        let unit = format!(
            "{}#include \"ptx.cuh\"\n#line 1 \"{}\"\n{}",
            defines.collect::<String>(),
            source.name,
            source.text
        );
        let library = self.compiler.library(source.name, &unit, &[]).map_err(|log| Error::Compile {
            kernel: kernel.entry.to_owned(),
            architecture: "the emulator".to_owned(),
            log,
        })?;
        // SAFETY: every entry has this signature, by the macro KERNEL; the library is never unloaded.
        let entry = unsafe { load(&library, RTLD_LOCAL).get::<Entry>(kernel.entry.as_bytes()) };
        let entry = *entry.map_err(|error| device("load", error.to_string()))?;
        entries.insert(kernel.clone(), entry);
        Ok(entry)
    }

    /// Refuses ranges that are not within one allocation.
    fn check(&self, call: &'static str, address: u64, bytes: usize) -> Result<(), Error> {
        if let Some(problem) = self.fault.lock().expect("nobody panics with it").take() {
            return Err(device(call, problem));
        }
        let allocations = self.allocations.lock().expect("nobody panics with it");
        let (&start, &size) = allocations
            .range(..=address)
            .next_back()
            .ok_or_else(|| device(call, format!("{address:#x} was never allocated")))?;
        if address + bytes as u64 > start + size as u64 {
            let problem = format!("{bytes} bytes at {address:#x} end beyond {size} bytes at {start:#x}");
            return Err(device(call, problem));
        }
        // SAFETY: it is an allocation.
        if !unsafe { (self.runtime.is_whole)(start, size as u64) } {
            return Err(device(call, format!("something was written around the {size} bytes at {start:#x}")));
        }
        Ok(())
    }

    /// Of each copy beside launches so far, how much was queued before it that it does not wait for.
    pub(crate) fn leads(&self) -> Vec<u64> {
        self.order().leads.clone()
    }

    fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock().expect("nobody panics with it")
    }

    fn departures(&self) -> MutexGuard<'_, Departures> {
        self.departures.lock().expect("nobody panics with it")
    }

    /// Ends a departure; its bytes are those that are there now, which must be those that were there when it was begun.
    fn end_departure(&self, departure: u64) -> Result<Vec<u8>, String> {
        let (from, was) = self.departures().end(departure)?;
        self.order().done(from, was.len(), "departs")?;
        let mut bytes = vec![0; was.len()];
        // SAFETY: the range lay in an allocation, which was not given back: it would be no departure any more. Launches are over.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        match bytes == was {
            true => Ok(bytes),
            false => Err(format!("the {} bytes at {from:#x} were written to while they departed", was.len())),
        }
    }

    /// Copies arrive.
    fn arrive(&self, copies: Vec<Copy>) {
        for Copy { to, bytes, .. } in copies {
            // SAFETY: the range lay in an allocation when the copy began, and memory with copies under way is not given back without a
            // fault; nothing else touches it.
            unsafe {
                (self.runtime.show)(to, bytes.len() as u64);
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len());
            }
        }
    }

    /// Says where an address that a kernel named lies.
    fn explain(&self, problem: String) -> String {
        let Some((_, rest)) = problem.split_once("address 0x") else { return problem };
        let digits = rest.split(',').next().unwrap_or_default();
        let Ok(address) = u64::from_str_radix(digits, 16) else { return problem };
        let allocations = self.allocations.lock().expect("nobody panics with it");
        match allocations.range(..=address).next_back() {
            Some((start, size)) if address - start < 1 << 32 => {
                format!("{problem} ({} bytes into an allocation of {size})", address - start)
            }
            _ => problem,
        }
    }
}

/// A library that stays loaded. The runtime's symbols are global, so that kernels find them.
fn load(path: &Path, visibility: i32) -> &'static Library {
    // SAFETY: the libraries are ours, and their initialisers do nothing but make empty containers.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | visibility) };
    Box::leak(Box::new(library.expect("what was compiled can be loaded")))
}

fn device(call: &'static str, problem: String) -> Error {
    Error::Device { call, problem }
}

impl Device for Emulator {
    fn name(&self) -> String {
        "emulator".to_owned()
    }

    fn multiprocessors(&self) -> usize {
        4
    }

    fn capability(&self) -> u32 {
        self.capability
    }

    fn shared_bytes_limit(&self) -> usize {
        match self.capability {
            80 | 87 => 163 << 10,
            86 | 89 | 120.. => 99 << 10,
            _ => 227 << 10,
        }
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, Error> {
        // SAFETY: makes a new map of memory.
        let address = unsafe { (self.runtime.allocate)(bytes as u64) };
        if address == 0 {
            return Err(Error::OutOfMemory { bytes, problem: "the host has no room".to_owned() });
        }
        self.allocations.lock().expect("nobody panics with it").insert(address, bytes);
        self.order().allocated(address, bytes);
        // SAFETY: just allocated, and named by nobody.
        Ok(unsafe { Memory::new(address, bytes) })
    }

    fn free(&self, memory: Memory) {
        let (address, bytes) = (memory.address(), memory.bytes());
        let removed = self.allocations.lock().expect("nobody panics with it").remove(&address);
        let fault = if removed != Some(bytes) {
            Some(format!("{bytes} bytes at {address:#x} are given back, allocated were {removed:?}"))
        } else if let Err(problem) = self.order().freed(address, bytes) {
            Some(problem)
        } else if let Err(problem) = self.departures().freed(address, bytes) {
            Some(problem)
        // SAFETY: it was an allocation until now.
        } else if !unsafe { (self.runtime.is_whole)(address, bytes as u64) } {
            Some(format!("something was written around the {bytes} bytes at {address:#x}"))
        } else {
            None
        };
        if removed == Some(bytes) {
            // SAFETY: nobody can name it from now on.
            unsafe { (self.runtime.free)(address, bytes as u64) };
        }
        if let Some(fault) = fault {
            self.fault.lock().expect("nobody panics with it").get_or_insert(fault);
        }
    }

    fn upload(&self, to: Span<'_>, from: &[u8]) -> Result<(), Error> {
        to.check(from.len())?;
        let address = to.address();
        self.check("upload", address, from.len())?;
        self.order().done(address, from.len(), "is written").map_err(|problem| device("upload", problem))?;
        self.order().compute();
        // SAFETY: the range lies in an allocation, which nobody else touches: launches are over when they return.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), address as *mut u8, from.len()) };
        Ok(())
    }

    fn upload_apart(&self, to: Span<'_>, from: &[u8]) -> Result<(), Error> {
        to.check(from.len())?;
        let address = to.address();
        self.check("upload_apart", address, from.len())?;
        let begun = self.order().copy(address, from);
        begun.map_err(|problem| device("upload_apart", problem))?;
        // SAFETY: the range lies in an allocation, which nobody may use before the copy is waited for: it is told to who does.
        unsafe { (self.runtime.hide)(address, from.len() as u64) };
        Ok(())
    }

    fn mark(&self, queue: Queue) -> Result<u64, Error> {
        Ok(self.order().mark(queue))
    }

    fn hold_up(&self, queue: Queue, mark: u64) -> Result<(), Error> {
        let copies = self.order().hold_up(queue, mark);
        self.arrive(copies.map_err(|problem| device("hold_up", problem))?);
        Ok(())
    }

    fn forget(&self, mark: u64) {
        if let Err(fault) = self.order().forget(mark) {
            self.fault.lock().expect("nobody panics with it").get_or_insert(fault);
        }
    }

    fn download(&self, from: Span<'_>, to: &mut [u8]) -> Result<(), Error> {
        from.check(to.len())?;
        let address = from.address();
        self.check("download", address, to.len())?;
        self.order().done(address, to.len(), "is read").map_err(|problem| device("download", problem))?;
        self.order().compute();
        // SAFETY: as in `upload`.
        unsafe { std::ptr::copy_nonoverlapping(address as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn depart(&self, from: Span<'_>) -> Result<Option<u64>, Error> {
        let (address, bytes) = (from.address(), from.bytes());
        self.check("depart", address, bytes)?;
        self.order().done(address, bytes, "departs").map_err(|problem| device("depart", problem))?;
        // SAFETY: as in `upload`.
        let was = unsafe { std::slice::from_raw_parts(address as *const u8, bytes) };
        Ok(Some(self.departures().begin(address, was)))
    }

    fn collect(&self, departure: u64, to: &mut [u8]) -> Result<(), Error> {
        self.told()?;
        let bytes = self.end_departure(departure).map_err(|problem| device("collect", problem))?;
        if bytes.len() != to.len() {
            return Err(device("collect", format!("{} bytes departed, {} are taken", bytes.len(), to.len())));
        }
        to.copy_from_slice(&bytes);
        Ok(())
    }

    fn abandon(&self, departure: u64) {
        if let Err(fault) = self.end_departure(departure) {
            self.fault.lock().expect("nobody panics with it").get_or_insert(fault);
        }
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        self.told()?;
        self.order().compute();
        let (asked, limit) = (launch.shared_bytes as usize, self.shared_bytes_limit());
        if asked > limit {
            let entry = launch.kernel.entry;
            let problem =
                format!("kernel `{entry}` asks for {asked} bytes of shared memory, there are {limit}");
            return Err(device("launch", problem));
        }
        let entry = self.entry(launch.kernel)?;
        let mut bank_conflicts = 0;
        let call = Call {
            grid: launch.grid,
            threads: launch.threads,
            shared_bytes: launch.shared_bytes,
            workers: 2,
            argument: launch.argument.as_ptr().cast(),
            argument_bytes: launch.argument.len() as u64,
            bank_conflicts: &raw mut bank_conflicts,
        };
        // SAFETY: the structure is as in emulator.h; the runtime checks the argument's size and catches what the kernel does.
        let problem = unsafe { entry(&raw const call) };
        self.bank_conflicts.fetch_add(bank_conflicts, Ordering::Relaxed);
        if problem.is_null() {
            return Ok(());
        }
        // SAFETY: a text that ends with 0 and lives until this thread's next launch.
        let problem = unsafe { CStr::from_ptr(problem) }.to_string_lossy().into_owned();
        Err(device("launch", self.explain(problem)))
    }

    fn synchronize(&self) -> Result<(), Error> {
        let copies = self.order().synchronize();
        self.arrive(copies);
        self.told()
    }
}

impl Emulator {
    /// A fault of a call that could not tell it.
    fn told(&self) -> Result<(), Error> {
        match self.fault.lock().expect("nobody panics with it").take() {
            Some(problem) => Err(device("synchronize", problem)),
            None => Ok(()),
        }
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let left = self.order.lock().ok().and_then(|order| order.left());
        let left = left.or_else(|| self.departures.lock().ok().and_then(|departures| departures.left()));
        let fault = self.fault.lock().map(|mut fault| fault.take()).unwrap_or_default().or(left);
        if let Some(problem) = fault.filter(|_| !std::thread::panicking()) {
            panic!("nobody asked the emulator, but: {problem}");
        }
    }
}

impl std::fmt::Debug for Emulator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Emulator").field("capability", &self.capability).finish_non_exhaustive()
    }
}
