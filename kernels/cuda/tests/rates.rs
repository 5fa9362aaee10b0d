//! The kernels that everything is measured against do what they are measured for.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the whole file is test code, its helpers too"
)]

#[path = "emulator/compiler.rs"]
mod compiler;
#[path = "emulator/device.rs"]
mod device;

use longshore_cuda::{Kind, Rate, Rates};

use device::Emulator;

const ALL: [Rate; 3] = [Rate::Copy, Rate::Read, Rate::MatrixBf16];

fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|index| (index * index / 7) as u8).collect()
}

#[test]
fn everything_is_copied_read_and_multiplied() {
    let device = Emulator::device();
    // Less than what all threads take at once, more, and with a rest.
    for bytes in [16, 4096, (1 << 20) + 48] {
        let rates = Rates::new(&device, bytes, 5).unwrap();
        rates.fill(&content(bytes)).unwrap();
        for rate in ALL {
            rates.launch(rate).unwrap();
            assert!(rates.is_right(rate).unwrap(), "{rate:?} of {bytes} bytes");
        }
    }
}

#[test]
fn what_was_not_done_is_found() {
    let device = Emulator::device();
    let rates = Rates::new(&device, 8192, 5).unwrap();
    rates.fill(&content(8192)).unwrap();
    for (index, rate) in ALL.into_iter().enumerate() {
        // What another kernel left.
        rates.launch(ALL[(index + 1) % 3]).unwrap();
        assert!(!rates.is_right(rate).unwrap(), "{rate:?}");
    }
}

#[test]
fn work_is_counted() {
    let device = Emulator::device();
    let rates = Rates::new(&device, 4096, 10).unwrap();
    assert_eq!((rates.work(Rate::Copy), rates.work(Rate::Read)), (8192, 4096));
    // 4 multiprocessors, 2 blocks of 8 warps each, 10 rounds of 8 products of 16 × 16 × 8.
    assert_eq!(rates.work(Rate::MatrixBf16), 4 * 2 * 8 * 10 * 8 * 2 * 16 * 16 * 8);
    for bytes in [0, 8, 17] {
        assert_eq!(Rates::new(&device, bytes, 1).unwrap_err().kind(), Kind::InvalidInput);
    }
}
