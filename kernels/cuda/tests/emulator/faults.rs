//! Each fault is found and named.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use longshore_cuda::{
    BlockSelector, Buffer, Device, Error, Kernel, Launch, SelectCall, SelectGuards, Selector, Source, Span,
};

use super::device::Emulator;

const SOURCE: Source = Source { name: "faults.cu", text: include_str!("faults.cu") };

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    buffer: u64,
    n: u32,
    unused: u32,
}

struct Trial {
    device: Arc<dyn Device>,
    buffer: Buffer,
}

impl Trial {
    fn new(words: &[u32]) -> Self {
        let device = Emulator::device();
        let buffer = Buffer::from_slice(&device, words).unwrap();
        Self { device, buffer }
    }

    fn run(&self, entry: &'static str, threads: u32, n: i32) -> Result<(), Error> {
        self.run_grid(entry, [1, 1, 1], threads, n)
    }

    fn run_grid(&self, entry: &'static str, grid: [u32; 3], threads: u32, n: i32) -> Result<(), Error> {
        let kernel = Kernel { source: SOURCE, entry, constants: Vec::new() };
        let params = Params { buffer: self.buffer.address(), n: n as u32, unused: 0 };
        self.device.launch(&Launch::new(&kernel, grid, threads, &params).shared(100))
    }

    /// What is said when it fails, which must name the kernel.
    fn fault(&self, entry: &'static str, threads: u32, n: i32) -> String {
        let problem = self.run(entry, threads, n).expect_err(entry).to_string();
        assert!(problem.contains(entry), "{problem}");
        problem
    }
}

fn says(problem: &str, words: &[&str]) {
    for word in words {
        assert!(problem.contains(word), "`{word}` is not in: {problem}");
    }
}

#[test]
fn threads_that_miss_a_barrier_are_named() {
    let trial = Trial::new(&[0; 64]);
    for n in [0, 5] {
        let problem = trial.fault("half_a_block_at_a_barrier", 64, n);
        says(&problem, &["block (0, 0, 0)", "deadlock", "sync_block (line 10)", "left"]);
    }
    trial.run("half_a_block_at_a_barrier", 64, 32).unwrap();
}

#[test]
fn lanes_that_miss_a_warp_wide_function_are_named() {
    let trial = Trial::new(&[0; 64]);
    let problem = trial.fault("a_lane_misses_a_shuffle", 32, 3);
    says(&problem, &["deadlock", "thread 0 and 30 more in shuffle_xor", "thread 3 in sync_block"]);
    trial.run("a_lane_misses_a_shuffle", 32, 32).unwrap();
    let problem = trial.fault("lanes_in_different_functions", 32, 31);
    says(&problem, &["meet in different places", "thread 31 in ballot", "in shuffle "]);
    trial.run("lanes_in_different_functions", 32, 32).unwrap();
}

#[test]
fn shared_memory_has_bounds_and_begins_as_nan() {
    let trial = Trial::new(&[0; 64]);
    trial.run("write_shared", 32, 99).unwrap();
    // 100 bytes are rounded up to 112.
    for n in [100, 111, -1, -3000] {
        says(&trial.fault("write_shared", 32, n), &["wrote"]);
    }
    for n in [112, 4000, -300_000] {
        says(&trial.fault("write_shared", 32, n), &["access to", &format!("{n}").replace('-', "")]);
    }
    trial.run("read_shared", 32, 0).unwrap();
    assert_eq!(trial.buffer.to_vec::<u8>().unwrap()[..33], [[0xff; 32].as_slice(), &[0]].concat());
    says(&trial.fault("read_shared", 32, 90), &["thread 22", "byte 112 of 100"]);
    let kernel = Kernel { source: SOURCE, entry: "read_shared", constants: Vec::new() };
    let params = Params { buffer: trial.buffer.address(), n: 0, unused: 0 };
    let limit = trial.device.shared_bytes_limit() as u32;
    let launch = Launch::new(&kernel, [1, 1, 1], 32, &params);
    trial.device.launch(&launch.shared(limit)).unwrap();
    let problem = trial.device.launch(&launch.shared(limit + 1)).unwrap_err().to_string();
    says(&problem, &["read_shared", "232449"]);
}

#[test]
fn misaligned_accesses_are_named() {
    let trial = Trial::new(&[0; 64]);
    for n in [1, 8] {
        says(&trial.fault("copy_to_misaligned", 32, n), &["target", "misaligned", "line"]);
        says(&trial.fault("copy_from_misaligned", 32, n), &["source", "misaligned"]);
        says(&trial.fault("load_misaligned_once", 32, n), &["misaligned"]);
    }
    says(&trial.fault("load_misaligned", 32, 2), &["misaligned"]);
    says(&trial.fault("copy_to_misaligned", 32, 96), &["byte 96 of 100"]);
    trial.run("copy_to_misaligned", 32, 16).unwrap();
    trial.run("copy_from_misaligned", 32, 16).unwrap();
    trial.run("load_misaligned", 32, 4).unwrap();
}

#[test]
fn an_asynchronous_copy_is_there_after_its_wait_and_not_before() {
    let words = [1, 2, 3, 4, 5, 6, 7, 8].map(|x| x + 0x100);
    let read = |n| {
        let trial = Trial::new(&[words, [0; 8]].concat());
        trial.run("copy_and_read", 32, n).unwrap();
        trial.buffer.to_vec::<u32>().unwrap()[8..].to_vec()
    };
    let (nan, first, second) = ([u32::MAX; 4], &words[..4], &words[4..]);
    assert_eq!(read(0), [first, second].concat(), "both are waited for");
    assert_eq!(read(2), [first, &nan].concat(), "the newest group may be under way");
    assert_eq!(read(1), [nan, nan].concat(), "nothing was committed");
    assert_eq!(read(4), [first, &[0; 4]].concat(), "zeros where not valid");
}

#[test]
fn device_memory_has_bounds() {
    let trial = Trial::new(&[0; 8]);
    trial.run("write_buffer", 32, 7).unwrap();
    assert_eq!(trial.buffer.to_vec::<u32>().unwrap(), [0, 0, 0, 0, 0, 0, 0, 7]);
    // 32 bytes are rounded up to 256, and there the page ends.
    says(&trial.fault("write_buffer", 32, 64), &["thread 31", "256 bytes into an allocation of 32"]);
    says(&trial.fault("write_buffer", 32, -100_000), &["where nothing is"]);
    for n in [8, 63, -1] {
        let trial = Trial::new(&[0; 8]);
        trial.run("write_buffer", 32, n).unwrap();
        let problem = trial.buffer.to_vec::<u32>().unwrap_err().to_string();
        says(&problem, &["written around the 32 bytes"]);
        let Trial { device, buffer } = trial;
        drop(buffer);
        says(&device.synchronize().unwrap_err().to_string(), &["written around the 32 bytes"]);
    }
    for (offset, bytes) in [(30, 3), (0, 33), (33, 0), (usize::MAX, 2)] {
        says(&trial.buffer.span(offset, bytes).unwrap_err().to_string(), &["beyond 32 bytes"]);
    }
    let span = trial.buffer.span(28, 4).unwrap();
    for len in [0, 3, 5] {
        says(&span.write(&vec![0_u8; len]).unwrap_err().to_string(), &["`span`", "4 bytes of the device"]);
        says(&span.read(&mut vec![0_u8; len]).unwrap_err().to_string(), &["`span`"]);
    }
    assert!(span.first(5).is_err());
    assert_eq!(span.for_kernel("p", &[2, 1], 2).unwrap(), trial.buffer.address() + 28);
    for counts in [&[5][..], &[2, 3], &[usize::MAX, 2]] {
        let problem = span.for_kernel("p", counts, 1).unwrap_err().to_string();
        says(&problem, &["`p` has 4 bytes", &format!("{counts:?}")]);
    }
    span.first(2).unwrap().write(&[9_u8, 9]).unwrap();
    let mut word = [0_u32];
    span.read(&mut word).unwrap();
    assert_eq!((word, span.address()), ([0x0909], trial.buffer.address() + 28));
}

#[test]
fn device_memory_begins_as_nan_and_is_gone_when_freed() {
    let device = Emulator::device();
    let buffer = Buffer::new(&device, 40).unwrap();
    assert!(buffer.to_vec::<f32>().unwrap().iter().all(|x| x.is_nan()));
    assert_eq!(buffer.address() % 256, 0);
    assert_ne!(Buffer::new(&device, 0).unwrap().address(), 0);
    let other = Buffer::new(&device, 40).unwrap();
    assert!(other.address().abs_diff(buffer.address()) > 1 << 33, "far from each other");
    let (trial, address) = (Trial::new(&[0; 8]), buffer.address());
    let kernel = Kernel { source: SOURCE, entry: "write_buffer", constants: Vec::new() };
    let params = Params { buffer: address, n: 0, unused: 0 };
    let launch = Launch::new(&kernel, [1, 1, 1], 32, &params);
    trial.device.launch(&launch).unwrap();
    drop(buffer);
    says(&trial.device.launch(&launch).unwrap_err().to_string(), &["where nothing is"]);
}

#[test]
fn local_arrays_have_bounds() {
    let trial = Trial::new(&[0; 64]);
    trial.run("write_local_array", 32, 3).unwrap();
    says(&trial.fault("write_local_array", 32, 4), &["index beyond an array"]);
}

#[test]
fn launches_that_no_device_takes_are_refused() {
    let trial = Trial::new(&[0; 64]);
    for threads in [0, 31, 33, 96] {
        says(&trial.fault("half_a_block_at_a_barrier", threads, 0), &["threads", "multiple of 32"]);
    }
    for grid in [[0, 1, 1], [1, 0, 1], [1, 65_536, 1], [1, 1, 65_536]] {
        let problem = trial.run_grid("write_buffer", grid, 32, 0).unwrap_err().to_string();
        says(&problem, &["grid"]);
    }
    let kernel = Kernel { source: SOURCE, entry: "write_buffer", constants: Vec::new() };
    let problem = trial.device.launch(&Launch::new(&kernel, [1, 1, 1], 32, &0_u64)).unwrap_err();
    says(&problem.to_string(), &["argument of 8 bytes", "16"]);
    let kernel = Kernel { entry: "nowhere", ..kernel };
    assert!(trial.device.launch(&Launch::new(&kernel, [1, 1, 1], 32, &0_u64)).is_err());
    let source = Source { name: "wrong.cu", text: "KERNEL(wrong, 32, 1, u64) { oh }" };
    let kernel = Kernel { source, entry: "wrong", constants: Vec::new() };
    let error = trial.device.launch(&Launch::new(&kernel, [1, 1, 1], 32, &0_u64)).unwrap_err();
    assert!(matches!(&error, Error::Compile { log, .. } if log.contains("wrong.cu:1")), "{error}");
}

/// All but the last byte.
fn short(span: Span<'_>) -> Span<'_> {
    span.first(span.bytes() - 1).unwrap()
}

#[test]
fn launches_over_less_memory_than_they_use_are_refused() {
    let device = Emulator::device();
    let words = |count: usize| Buffer::from_slice(&device, &vec![0_u32; count]).unwrap();
    // Two heads, three tiles, 40 blocks.
    let (energies, always, ends) = (words(240), words(4), words(6));
    let (bits, counts) = (words(12), words(6));
    let good = SelectCall {
        energies: energies.whole(),
        peaks: Some(energies.whole()),
        always: Some(always.whole()),
        ends: ends.whole(),
        bits: bits.whole(),
        counts: counts.whole(),
        kv_heads: 2,
        tiles: 3,
        stride: 40,
        words: 2,
        selector: Selector::TopK(3),
        most: 2,
        guards: SelectGuards { sink: 1, local: 1, peak: Some(0.5) },
    };
    let selector = BlockSelector::new(&device);
    selector.launch(&good).unwrap();
    let refused = [
        ("energies", SelectCall { energies: short(good.energies), ..good }),
        ("peaks", SelectCall { peaks: good.peaks.map(short), ..good }),
        ("always", SelectCall { always: good.always.map(short), ..good }),
        ("ends", SelectCall { ends: short(good.ends), ..good }),
        ("bits", SelectCall { bits: short(good.bits), ..good }),
        ("counts", SelectCall { counts: short(good.counts), ..good }),
    ];
    for (field, call) in refused {
        says(
            &selector.launch(&call).unwrap_err().to_string(),
            &[&format!("`{field}` has"), "the launch uses"],
        );
    }
}

#[test]
fn every_block_of_a_grid_runs_once() {
    let (grid, blocks) = ([5, 3, 2], 30_u32);
    let trial = Trial::new(&vec![0; 2 + blocks as usize]);
    trial.run_grid("count", grid, 64, 0).unwrap();
    let counted = trial.buffer.to_vec::<u32>().unwrap();
    let wanted: Vec<u32> = [blocks].into_iter().chain(0..blocks).chain([(0..blocks).sum()]).collect();
    assert_eq!(counted, wanted);
}
