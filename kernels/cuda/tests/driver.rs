//! What is made of the driver's answers, against a library that stands in for the driver: no GPU is needed, and none is used. It
//! shows that calls are made in the right order with the right values and that faults are told; not that a GPU takes them.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the whole file is test code, its helpers too"
)]
#![expect(unsafe_code, reason = "steers the library that stands in; see SAFETY")]

use std::{
    ffi::{CString, c_char, c_int, c_long},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use libloading::Library;
use longshore_cuda::{
    Buffer, Communicator, CudaDevice, CudaOptions, Device, Driver, Error, Kernel, Kind, Launch, Mark, Nccl,
    Queue, Rate, Rates, Source, UniqueId,
};
use rand::{Rng as _, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[path = "driver/departures.rs"]
mod departures;
#[path = "nvrtc/library_path.rs"]
mod library_path;

/// A name that cudarc asks the loader for, and NVRTC does not: it looks for a driver too (`libcuda.so.1`), and trusts it.
const SONAME: &str = "-Wl,-soname,libcuda.so";

/// The library, with all its functions or without one of them; made once of each text.
fn library(flags: &[&str]) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/driver/driver.cpp");
    let text = include_str!("driver/driver.cpp");
    let name = blake3::hash(format!("{flags:?} {text}").as_bytes()).to_hex();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("driver-{}", &name[..24]));
    std::fs::create_dir_all(&folder).expect("the target folder can be written");
    // Test processes run at once and want the same one.
    let lock = std::fs::File::create(folder.join("lock")).expect("the target folder can be written");
    lock.lock().expect("files can be locked");
    let library = folder.join("libcuda.so.1");
    if !library.exists() {
        let fresh = folder.join("new");
        let output = Command::new("c++")
            .args(["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", SONAME])
            .args(flags)
            .arg(source)
            .arg("-o")
            .arg(&fresh)
            .output()
            .expect("a C++ compiler, `c++`, is there");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::rename(&fresh, library).expect("renamed within a folder");
    }
    folder
}

/// Steers the library. Tests of one process take turns: the library is one for all.
struct StandIn {
    library: &'static Library,
    options: CudaOptions,
    _turn: MutexGuard<'static, ()>,
}

impl StandIn {
    fn new() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        static OPENED: OnceLock<(PathBuf, Library)> = OnceLock::new();
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let (folder, library) = OPENED.get_or_init(|| {
            let folder = library(&[]);
            // SAFETY: made of our own source, just now.
            let library = unsafe { Library::new(folder.join("libcuda.so.1")) }.expect("a library");
            (folder, library)
        });
        let mut library_path = vec![folder.clone()];
        library_path.extend(library_path::library_path());
        let stand_in = Self { library, options: CudaOptions { library_path, cache_path: None }, _turn: turn };
        // SAFETY: the signature is that of the source.
        unsafe { stand_in.library.get::<unsafe extern "C" fn()>("stand_in_reset").unwrap()() };
        stand_in
    }

    fn set(&self, key: &str, value: i64) {
        let (key, value) = (CString::new(key).unwrap(), c_long::try_from(value).unwrap());
        // SAFETY: the signature is that of the source; the string lives past the call.
        unsafe {
            self.library.get::<unsafe extern "C" fn(*const c_char, c_long)>("stand_in_set").unwrap()(
                key.as_ptr(),
                value,
            );
        }
    }

    /// Makes the next call of a function fail.
    fn fail(&self, call: &str, code: i32) {
        let call = CString::new(call).unwrap();
        // SAFETY: the signature is that of the source; the string lives past the call.
        unsafe {
            self.library.get::<unsafe extern "C" fn(*const c_char, c_int)>("stand_in_fail").unwrap()(
                call.as_ptr(),
                code,
            );
        }
    }

    fn calls(&self, call: &str) -> i64 {
        let call = CString::new(call).unwrap();
        // SAFETY: the signature is that of the source; the string lives past the call.
        unsafe {
            self.library.get::<unsafe extern "C" fn(*const c_char) -> c_long>("stand_in_calls").unwrap()(
                call.as_ptr(),
            )
        }
    }

    /// Memory, streams, events, modules and contexts that were not given back.
    fn live(&self) -> i64 {
        // SAFETY: the signature is that of the source.
        unsafe { self.library.get::<unsafe extern "C" fn() -> c_long>("stand_in_live").unwrap()() }
    }

    fn driver(&self) -> Result<Driver, Error> {
        Driver::open(&self.options.library_path)
    }

    fn device(&self) -> Arc<dyn Device> {
        Arc::new(CudaDevice::open(0, &self.options).unwrap())
    }
}

fn bytes(count: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; count];
    ChaCha8Rng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

fn told<T: std::fmt::Debug>(outcome: Result<T, Error>, kind: Kind) -> String {
    let error = outcome.unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    error.to_string()
}

#[test]
fn devices_are_named_and_those_that_are_not_there_refused() {
    let stand_in = StandIn::new();
    let driver = stand_in.driver().unwrap();
    let names: Vec<String> = driver.devices().unwrap().iter().map(|device| device.description()).collect();
    assert_eq!(names[1], "Stand-in 1, compute capability 9.0, 4 multiprocessors, 1.0 GiB");
    let text = told(CudaDevice::open(2, &stand_in.options), Kind::InvalidInput);
    assert!(
        text.contains("no `cuda:2`") && text.contains("`cuda:0` (Stand-in 0), `cuda:1` (Stand-in 1)"),
        "{text}"
    );
    stand_in.set("devices", 0);
    assert!(told(CudaDevice::open(0, &stand_in.options), Kind::Unavailable).contains("--device cpu"));
    stand_in.set("devices", 1);
    stand_in.set("capability", 75);
    let text = told(CudaDevice::open(0, &stand_in.options), Kind::Unavailable);
    assert!(text.contains("7.5") && text.contains("8.0"), "{text}");
}

#[test]
fn drivers_that_cannot_serve_say_why_and_what_would() {
    let stand_in = StandIn::new();
    stand_in.set("version", 11_080);
    let text = told(stand_in.driver(), Kind::Unavailable);
    assert!(text.contains("CUDA 11.8") && text.contains("12.0") && text.contains("525"), "{text}");
    // New enough for us, too old for the code of the only compiler here.
    stand_in.set("version", 12_040);
    stand_in.driver().unwrap();
    let text = told(CudaDevice::open(0, &stand_in.options), Kind::Unavailable);
    assert!(text.contains("libnvrtc.so.12") || text.contains("580"), "{text}");
    stand_in.set("version", 13_000);
    for (code, sign) in
        [(100, "no CUDA device"), (34, "stub"), (803, "kernel module"), (999, "no CUDA device")]
    {
        stand_in.fail("cuInit", code);
        let text = told(stand_in.driver(), Kind::Unavailable);
        assert!(text.contains(sign) && text.contains("hint: "), "{text}");
    }
    stand_in.driver().unwrap();
}

#[test]
fn a_driver_without_a_function_is_refused_instead_of_panicking() {
    let folder = library(&["-DWITHOUT_INIT"]);
    let text = told(Driver::open(&[folder]), Kind::Unavailable);
    assert!(text.contains("`cuInit`") && text.contains("libcuda"), "{text}");
}

#[test]
fn what_is_uploaded_is_downloaded() {
    let stand_in = StandIn::new();
    for pools in [1, 0] {
        stand_in.set("pools", pools);
        let device = stand_in.device();
        // Larger than all staging memory, and with a piece at the end.
        let large = bytes((40 << 20) + 3, 1);
        let first = Buffer::from_slice(&device, &large).unwrap();
        // Small ones share chunks.
        let small: Vec<Vec<u8>> = (0..3000).map(|index| bytes(1 + index * 7 % 9000, index as u64)).collect();
        let buffers: Vec<Buffer> =
            small.iter().map(|content| Buffer::from_slice(&device, content).unwrap()).collect();
        for (content, buffer) in small.iter().zip(&buffers).step_by(100) {
            assert!(buffer.to_vec::<u8>().unwrap() == *content);
        }
        assert!(first.to_vec::<u8>().unwrap() == large);
        // A copy down waits for what was queued before it on the other stream.
        first.span(0, large.len() - 1).unwrap().write(&large[1..]).unwrap();
        assert!(first.to_vec::<u8>().unwrap()[..large.len() - 1] == large[1..]);
        let empty = Buffer::from_slice::<u8>(&device, &[]).unwrap();
        assert!(empty.address() != 0 && empty.to_vec::<u8>().unwrap().is_empty());
        drop((first, buffers, empty, device));
        assert_eq!(stand_in.live(), 0, "everything is given back");
    }
}

#[test]
fn memory_given_back_waits_for_what_uses_it_and_room_is_made() {
    let stand_in = StandIn::new();
    stand_in.set("capacity", 10 << 20);
    let device = stand_in.device();
    let content = bytes(6 << 20, 3);
    let buffer = Buffer::from_slice(&device, &content).unwrap();
    let text = told(Buffer::new(&device, 6 << 20), Kind::Exhausted);
    assert!(text.contains(&(6 << 20).to_string()), "{text}");
    assert!(Buffer::new(&device, 6 << 20).unwrap_err().retryable());
    // Given back, but not yet: the next one waits for it instead of failing.
    drop(buffer);
    let next = Buffer::from_slice(&device, &content).unwrap();
    assert!(next.to_vec::<u8>().unwrap() == content);
}

#[test]
fn faults_that_lose_the_context_stay_and_others_do_not() {
    let stand_in = StandIn::new();
    let device = stand_in.device();
    stand_in.fail("cuStreamSynchronize", 1);
    told(device.synchronize(), Kind::Device);
    device.synchronize().unwrap();
    let buffer = Buffer::new(&device, 1).unwrap();
    let span = buffer.span(0, 1).unwrap();
    stand_in.fail("cuStreamSynchronize", 700);
    let text = told(device.synchronize(), Kind::Device);
    assert!(text.contains("STAND_IN_700") && text.contains("cuStreamSynchronize"), "{text}");
    for outcome in [device.synchronize(), device.allocate(1).map(drop), span.write(&[1_u8])] {
        let text = told(outcome, Kind::Device);
        assert!(text.contains("an earlier call") && text.contains("STAND_IN_700"), "{text}");
    }
}

#[test]
fn a_device_that_cannot_be_set_up_leaves_nothing_behind() {
    let stand_in = StandIn::new();
    // Chunks for uploads come first, then a stream and chunks for downloads.
    for (call, after) in [
        ("cuStreamCreate", 0),
        ("cuStreamCreate", 1),
        ("cuStreamCreate", 2),
        ("cuMemHostAlloc", 0),
        ("cuMemHostAlloc", 3),
        ("cuMemHostAlloc", 5),
        ("cuEventCreate", 0),
        ("cuEventCreate", 4),
        ("cuMemPoolSetAttribute", 0),
    ] {
        stand_in.set("after", after);
        stand_in.fail(call, 2);
        let text = told(CudaDevice::open(0, &stand_in.options), Kind::Exhausted);
        assert!(text.contains("STAND_IN_2"), "{text}");
        assert_eq!(stand_in.live(), 0, "{call} after {after}");
    }
}

#[test]
fn kernels_are_compiled_loaded_once_and_launched_with_their_argument() {
    let stand_in = StandIn::new();
    let device = stand_in.device();
    let rates = Rates::new(&device, 1 << 20, 1).unwrap();
    rates.fill(&bytes(1 << 20, 5)).unwrap();
    assert!(!rates.is_right(Rate::Copy).unwrap(), "nothing was copied yet");
    rates.launch(Rate::Copy).unwrap();
    rates.launch(Rate::Copy).unwrap();
    assert!(rates.is_right(Rate::Copy).unwrap());
    assert_eq!((stand_in.calls("cuModuleLoadData"), stand_in.calls("cuLaunchKernel")), (1, 2));
    // The stand-in knows one kernel.
    let text = told(rates.launch(Rate::Read), Kind::Device);
    assert!(text.contains("cuModuleGetFunction"), "{text}");
    drop((rates, device));
    assert_eq!(stand_in.live(), 0, "everything is given back");
}

#[test]
fn code_that_would_wait_for_registers_for_ever_is_not_launched() {
    let stand_in = StandIn::new();
    let device = stand_in.device();
    let source = Source {
        name: "w.cu",
        text: "struct P { u64 a, b, c; }; KERNEL(attend_prefill_wgmma, 384, 1, P) {}",
    };
    let kernel = Kernel { source, entry: "attend_prefill_wgmma", constants: Vec::new() };
    let memory = Buffer::from_slice(&device, &[0_u64; 4]).unwrap();
    let argument = [memory.address(), memory.address() + 16, 1];
    let launch = Launch::new(&kernel, [1, 1, 1], 384, &argument);
    for registers in [160, 176] {
        stand_in.set("registers", registers);
        let text = told(device.launch(&launch), Kind::Internal);
        assert!(text.contains(&format!("{registers} registers")) && text.contains("`cuda.wgmma`"), "{text}");
        assert_eq!(stand_in.calls("cuLaunchKernel"), 0);
    }
    stand_in.set("registers", 168);
    device.launch(&launch).unwrap();
    assert_eq!(stand_in.calls("cuLaunchKernel"), 1);
    drop((memory, device));
    assert_eq!(stand_in.live(), 0, "refused code is unloaded");
}

/// Waits until a call is held up.
fn wait_for_held(stand_in: &StandIn) {
    while stand_in.calls("held") == 0 {
        std::thread::yield_now();
    }
}

#[test]
fn a_kernel_that_is_being_loaded_holds_up_no_other() {
    let stand_in = StandIn::new();
    let device = stand_in.device();
    let rates = Rates::new(&device, 1 << 20, 1).unwrap();
    rates.launch(Rate::Copy).unwrap();
    stand_in.set("hold_modules", 1);
    std::thread::scope(|scope| {
        // Found not to be in the code, in the end.
        let other = scope.spawn(|| rates.launch(Rate::Read));
        wait_for_held(&stand_in);
        rates.launch(Rate::Copy).unwrap();
        assert_eq!(stand_in.calls("cuLaunchKernel"), 2);
        stand_in.set("hold_modules", 0);
        told(other.join().unwrap(), Kind::Device);
    });
}

#[test]
fn much_that_waits_for_staging_memory_holds_up_no_small_copy() {
    let stand_in = StandIn::new();
    let device = stand_in.device();
    let (much, little) = (bytes(40 << 20, 1), bytes(5000, 2));
    let target = Buffer::new(&device, much.len()).unwrap();
    stand_in.set("hold_events", 1);
    std::thread::scope(|scope| {
        let large = scope.spawn(|| target.span(0, much.len()).unwrap().write_apart(&much));
        wait_for_held(&stand_in);
        let small = Buffer::from_slice(&device, &little).unwrap();
        stand_in.set("hold_events", 0);
        large.join().unwrap().unwrap();
        assert!(small.to_vec::<u8>().unwrap() == little);
    });
    device.synchronize().unwrap();
    assert!(target.to_vec::<u8>().unwrap() == much);
}

/// A device with memory that is written beside launches, memory to which a launch copies it, and that launch.
struct Beside {
    device: Arc<dyn Device>,
    slot: Buffer,
    target: Buffer,
}

impl Beside {
    const BYTES: usize = 4096;

    fn new(stand_in: &StandIn) -> Self {
        let device = stand_in.device();
        let [slot, target] = [(); 2].map(|()| Buffer::new(&device, Self::BYTES).unwrap());
        device.synchronize().unwrap();
        Self { device, slot, target }
    }

    fn mark(&self, queue: Queue) -> Mark {
        Mark::new(&self.device, queue).unwrap()
    }

    fn arrive(&self, seed: u64) -> Vec<u8> {
        let content = bytes(Self::BYTES, seed);
        self.slot.whole().write_apart(&content).unwrap();
        content
    }

    fn launch(&self) {
        const SOURCE: Source =
            Source { name: "copy.cu", text: "struct P { u64 a, b, c; }; KERNEL(copy_words, 32, 1, P) {}" };
        let kernel = Kernel { source: SOURCE, entry: "copy_words", constants: Vec::new() };
        let words = [self.slot.address(), self.target.address(), Self::BYTES as u64 / 16];
        self.device.launch(&Launch::new(&kernel, [1, 1, 1], 32, &words)).unwrap();
    }

    fn copied(&self) -> Vec<u8> {
        self.target.to_vec().unwrap()
    }
}

#[test]
fn launches_wait_for_the_copies_beside_them_that_they_need() {
    let stand_in = StandIn::new();
    let beside = Beside::new(&stand_in);
    let first = beside.arrive(1);
    // Nobody told the launch: the copy is as late as it may be.
    beside.launch();
    assert!(beside.copied() != first);
    beside.mark(Queue::Arrivals).hold_up(Queue::Compute).unwrap();
    beside.launch();
    assert!(beside.copied() == first);
    // What comes later is not waited for, and a wait outlives its mark.
    let second = beside.mark(Queue::Compute);
    second.hold_up(Queue::Arrivals).unwrap();
    drop(second);
    let needed = (beside.arrive(2), beside.mark(Queue::Arrivals));
    let late = Buffer::new(&beside.device, Beside::BYTES).unwrap();
    late.whole().write_apart(&bytes(Beside::BYTES, 3)).unwrap();
    needed.1.hold_up(Queue::Compute).unwrap();
    beside.launch();
    assert!(beside.copied() == needed.0);
    assert!(late.to_vec::<u8>().unwrap() != bytes(Beside::BYTES, 3), "nothing asked for it");
    beside.device.synchronize().unwrap();
    assert!(late.to_vec::<u8>().unwrap() == bytes(Beside::BYTES, 3));
    drop((needed, late, beside));
    assert_eq!(stand_in.live(), 0, "everything is given back");
}

#[test]
fn copies_beside_launches_wait_for_those_that_still_read() {
    let stand_in = StandIn::new();
    // Copies on the second stream are as early as they may be.
    stand_in.set("eager", 2);
    for told in [false, true] {
        let beside = Beside::new(&stand_in);
        let first = beside.arrive(1);
        beside.launch();
        let read = beside.mark(Queue::Compute);
        if told {
            read.hold_up(Queue::Arrivals).unwrap();
        }
        let second = beside.arrive(2);
        assert!(beside.copied() == if told { first } else { second }, "told: {told}");
        drop((read, beside));
        assert_eq!(stand_in.live(), 0, "everything is given back");
        stand_in.set("eager", 5);
    }
}

#[test]
fn launches_that_do_not_fit_the_kernel_are_refused_before_the_driver_reads_them() {
    const SOURCE: Source =
        Source { name: "copy.cu", text: "struct P { u64 a, b, c; }; KERNEL(copy_words, 32, 1, P) {}" };
    let stand_in = StandIn::new();
    let device = stand_in.device();
    let kernel = |entry| Kernel { source: SOURCE, entry, constants: Vec::new() };
    let (copy, other) = (kernel("copy_words"), kernel("other"));
    let text = told(device.launch(&Launch::new(&copy, [1, 1, 1], 32, &[0_u64; 2])), Kind::Internal);
    assert!(text.contains("24 bytes, was given 16"), "{text}");
    let text = told(device.launch(&Launch::new(&other, [1, 1, 1], 32, &[0_u64; 3])), Kind::Internal);
    assert!(text.contains("`other` is not in the code"), "{text}");
    let text = told(device.launch(&Launch::new(&copy, [1, 1, 1], 33, &[0_u64; 3])), Kind::InvalidInput);
    assert!(text.contains("`threads`"), "{text}");
    assert_eq!(stand_in.calls("cuLaunchKernel"), 0);
}

/// With the library of NVIDIA's wheel `nvidia-nccl-cu13` (340 MB), which works without a GPU up to the point where it needs one:
/// `LONGSHORE_TEST_NCCL=…/site-packages cargo nextest run -p longshore-cuda --run-ignored only nccl`.
#[test]
#[ignore = "needs NCCL, in the folder that LONGSHORE_TEST_NCCL names"]
fn nccl_makes_ids_and_tells_why_ranks_cannot_join() {
    let folder = std::env::var_os("LONGSHORE_TEST_NCCL").expect("LONGSHORE_TEST_NCCL names a folder");
    let nccl = Nccl::open(&[folder.into()]).unwrap();
    println!("NCCL {} at {}", nccl.version_name(), nccl.path());
    let (id, other) = (nccl.unique_id().unwrap(), nccl.unique_id().unwrap());
    assert!(id != other && UniqueId::from_bytes(id.as_bytes()).unwrap() == id);
    let stand_in = StandIn::new();
    let device = Arc::new(CudaDevice::open(0, &stand_in.options).unwrap());
    let mut looks = 0;
    let mut go_on = || {
        looks += 1;
        std::thread::sleep(std::time::Duration::from_millis(10));
        looks < 1000
    };
    let outcome = Communicator::join(&nccl, &device, &id, (0, 2), &mut go_on);
    let text = told(outcome, Kind::Communication);
    assert!(text.contains("aborted"), "{text}");
    // The settings are none that the library takes for wrong: it gets as far as the driver, which is none here.
    assert!(!text.to_lowercase().contains("argument"), "{text}");
    println!("after {looks} looks: {text}");
    drop(device);
    assert_eq!(stand_in.live(), 0, "everything is given back");
}
