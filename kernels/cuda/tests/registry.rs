//! What the self-test launches is listed, can be launched on every device, and brings arguments of the size that the compiled code
//! takes. Nothing is computed here: launches are only looked at.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the whole file is test code, its helpers too"
)]
#![expect(unsafe_code, reason = "a device that gives out numbers; see SAFETY")]

use std::{
    collections::{BTreeMap, BTreeSet},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use longshore_cuda::{
    Architecture, Device, Error, Kernel, Launch, Memory, Nvrtc, Queue, Span, argument_bytes, check_launch,
    kernels, selftest,
};

#[path = "nvrtc/kept.rs"]
mod kept;
#[path = "nvrtc/library_path.rs"]
mod library_path;

/// A kernel without the values of its constants.
type Form = (&'static str, Vec<&'static str>);

fn form(kernel: &Kernel) -> Form {
    (kernel.entry, kernel.constants.iter().map(|(name, _)| *name).collect())
}

/// Writes launches down. Memory is a number; what is read is zeros.
#[derive(Debug)]
struct Recorder {
    next: AtomicU64,
    shared_bytes_limit: usize,
    capability: u32,
    forms: Mutex<BTreeSet<Form>>,
    arguments: Mutex<BTreeMap<&'static str, BTreeSet<usize>>>,
    faults: Mutex<Vec<String>>,
}

impl Recorder {
    fn new(capability: u32, shared_bytes_limit: usize) -> Arc<Self> {
        Arc::new(Self {
            next: AtomicU64::new(1 << 20),
            shared_bytes_limit,
            capability,
            forms: Mutex::default(),
            arguments: Mutex::default(),
            faults: Mutex::default(),
        })
    }
}

impl Device for Recorder {
    fn name(&self) -> String {
        "recorder".to_owned()
    }

    fn multiprocessors(&self) -> usize {
        132
    }

    fn capability(&self) -> u32 {
        self.capability
    }

    fn shared_bytes_limit(&self) -> usize {
        self.shared_bytes_limit
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, Error> {
        let address = self.next.fetch_add(bytes.next_multiple_of(256).max(256) as u64, Ordering::Relaxed);
        // SAFETY: a number that is given out once; nothing lies there.
        Ok(unsafe { Memory::new(address, bytes) })
    }

    fn free(&self, _memory: Memory) {}

    fn upload(&self, _to: Span<'_>, _from: &[u8]) -> Result<(), Error> {
        Ok(())
    }

    fn upload_apart(&self, _to: Span<'_>, _from: &[u8]) -> Result<(), Error> {
        Ok(())
    }

    fn mark(&self, _queue: Queue) -> Result<u64, Error> {
        Ok(0)
    }

    fn hold_up(&self, _queue: Queue, _mark: u64) -> Result<(), Error> {
        Ok(())
    }

    fn forget(&self, _mark: u64) {}

    fn download(&self, _from: Span<'_>, to: &mut [u8]) -> Result<(), Error> {
        to.fill(0);
        Ok(())
    }

    fn depart(&self, from: Span<'_>) -> Result<Option<u64>, Error> {
        Ok(Some(from.address()))
    }

    fn collect(&self, _departure: u64, to: &mut [u8]) -> Result<(), Error> {
        to.fill(0);
        Ok(())
    }

    fn abandon(&self, _departure: u64) {}

    fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        if let Err(error) = check_launch(launch, self.shared_bytes_limit) {
            self.faults.lock().unwrap().push(error.to_string());
        }
        self.forms.lock().unwrap().insert(form(launch.kernel));
        let mut arguments = self.arguments.lock().unwrap();
        arguments.entry(launch.kernel.entry).or_default().insert(launch.argument.len());
        Ok(())
    }

    fn synchronize(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// Runs every case for its launches; what it makes of the zeros that it reads does not matter.
fn record(capability: u32, shared_bytes_limit: usize) -> Arc<Recorder> {
    let recorder = Recorder::new(capability, shared_bytes_limit);
    let device: Arc<dyn Device> = recorder.clone();
    let cases = [selftest::cases(), selftest::executor_cases(), selftest::wgmma_cases()];
    for case in cases.into_iter().flatten() {
        let _ = catch_unwind(AssertUnwindSafe(|| case.run(&device)));
    }
    assert!(recorder.forms.lock().unwrap().len() > 10, "{recorder:?}");
    recorder
}

#[test]
fn what_the_self_test_launches_is_listed_and_fits_every_device() {
    let listed: BTreeSet<Form> = kernels().iter().map(form).collect();
    // Compute capabilities 8.0, 8.6 and 9.0.
    for (capability, limit) in [(80, 163 << 10), (86, 99 << 10), (90, 227 << 10)] {
        let recorder = record(capability, limit);
        let faults = recorder.faults.lock().unwrap();
        assert!(faults.is_empty(), "{capability}: {}", faults.join("\n"));
        let forms = recorder.forms.lock().unwrap();
        let missing: Vec<&Form> = forms.difference(&listed).collect();
        assert!(missing.is_empty(), "launched and not in `registry.rs`: {missing:?}");
    }
}

#[test]
fn arguments_have_the_size_that_the_compiled_code_takes() {
    let nvrtc = match Nvrtc::open(&library_path::library_path(), None) {
        Ok(nvrtc) => nvrtc,
        Err(error) if cfg!(all(target_os = "linux", target_arch = "x86_64")) => {
            panic!("no NVRTC: {error}; hint: `tests/run` provides it");
        }
        Err(error) => {
            eprintln!("ARGUMENTS WERE NOT COMPARED: {error}");
            return;
        }
    };
    let recorder = record(90, 227 << 10);
    let all = kernels();
    let mut wrong = Vec::new();
    for (entry, sizes) in recorder.arguments.lock().unwrap().iter() {
        let kernel =
            all.iter().find(|kernel| kernel.entry == *entry).expect("the other test sees that it is listed");
        let compiled = kept::compile(&nvrtc, kernel, Architecture::of(90).unwrap()).unwrap();
        let taken = argument_bytes(&compiled.cubin, entry).unwrap();
        if *sizes != BTreeSet::from([taken]) {
            wrong.push(format!("`{entry}` takes {taken} bytes and is given {sizes:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
