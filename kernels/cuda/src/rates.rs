//! What a device can do at most, by kernels that do nothing else: what all others are measured against.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::{Buffer, Device, Error, Kernel, Launch, Source};

const SOURCE: Source = Source { name: "rates.cu", text: include_str!("../source/rates.cu") };

const WORD_BYTES: usize = 16;
const COPY_THREADS: u32 = 512;
const MATRIX_THREADS: u32 = 256;
/// Blocks of a multiprocessor, as the source says.
const BLOCKS: usize = 2;
/// Floating-point operations of a warp in a round: 8 products of 16×16 by 16×8.
const ROUND_FLOPS: u64 = 8 * 2 * 16 * 16 * 8;

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct CopyParams {
    from: u64,
    to: u64,
    words: u64,
}

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct MatrixParams {
    to: u64,
    a: u32,
    b: u32,
    rounds: u32,
    reserved: u32,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rate {
    /// Bytes read and written.
    Copy,
    /// Bytes read.
    Read,
    /// bf16 multiply-adds of `mma.sync`, which every architecture has; Hopper's `wgmma` is faster.
    MatrixBf16,
}

/// Kernels of this module.
pub(crate) fn kernels() -> Vec<Kernel> {
    ["copy_words", "read_words", "multiply_bf16"].map(kernel).to_vec()
}

fn kernel(entry: &'static str) -> Kernel {
    Kernel { source: SOURCE, entry, constants: Vec::new() }
}

/// Buffers and launches of the measurements.
#[derive(Debug)]
pub struct Rates {
    device: Arc<dyn Device>,
    from: Buffer,
    to: Buffer,
    rounds: u32,
}

impl Rates {
    /// Copies `bytes` (a multiple of 16), and multiplies `rounds` times.
    pub fn new(device: &Arc<dyn Device>, bytes: usize, rounds: u32) -> Result<Self, Error> {
        if bytes == 0 || !bytes.is_multiple_of(WORD_BYTES) {
            let problem = format!("is {bytes}, must be a multiple of {WORD_BYTES}");
            return Err(Error::Invalid { field: "bytes", problem });
        }
        let results = device.multiprocessors() * BLOCKS * COPY_THREADS as usize * size_of::<u32>();
        Ok(Self {
            device: Arc::clone(device),
            from: Buffer::new(device, bytes)?,
            to: Buffer::new(device, bytes.max(results))?,
            rounds,
        })
    }

    /// Fills what is read with `content`, as far as it goes.
    pub fn fill(&self, content: &[u8]) -> Result<(), Error> {
        let content = &content[..content.len().min(self.from.bytes())];
        self.from.span(0, content.len())?.write(content)
    }

    /// Queues one measurement.
    pub fn launch(&self, rate: Rate) -> Result<(), Error> {
        let blocks = u32::try_from(self.device.multiprocessors() * BLOCKS).unwrap_or(u32::MAX);
        let grid = [blocks, 1, 1];
        match rate {
            Rate::Copy | Rate::Read => {
                let kernel = kernel(if rate == Rate::Copy { "copy_words" } else { "read_words" });
                let words = (self.from.bytes() / WORD_BYTES) as u64;
                let params = CopyParams { from: self.from.address(), to: self.to.address(), words };
                self.device.launch(&Launch::new(&kernel, grid, COPY_THREADS, &params))
            }
            Rate::MatrixBf16 => {
                let (a, b) = (bf16_pair(1.0), bf16_pair(FACTOR));
                let params = MatrixParams { to: self.to.address(), a, b, rounds: self.rounds, reserved: 0 };
                self.device.launch(&Launch::new(&kernel("multiply_bf16"), grid, MATRIX_THREADS, &params))
            }
        }
    }

    /// Bytes or floating-point operations of one measurement.
    pub fn work(&self, rate: Rate) -> u64 {
        let bytes = self.from.bytes() as u64;
        match rate {
            Rate::Copy => 2 * bytes,
            Rate::Read => bytes,
            Rate::MatrixBf16 => {
                let warps = self.device.multiprocessors() * BLOCKS * (MATRIX_THREADS / 32) as usize;
                warps as u64 * u64::from(self.rounds) * ROUND_FLOPS
            }
        }
    }

    /// Whether the last measurement left what it must: everything copied, nothing left out.
    pub fn is_right(&self, rate: Rate) -> Result<bool, Error> {
        let to: Vec<u32> = self.to.to_vec()?;
        match rate {
            Rate::Copy => Ok(to[..self.from.bytes() / 4] == self.from.to_vec::<u32>()?[..]),
            Rate::Read => {
                let mixed = |words: &[u32]| words.iter().fold(0, |mixed, word| mixed ^ word);
                let threads = self.device.multiprocessors() * BLOCKS * COPY_THREADS as usize;
                Ok(mixed(&to[..threads]) == mixed(&self.from.to_vec::<u32>()?))
            }
            Rate::MatrixBf16 => {
                let threads = self.device.multiprocessors() * BLOCKS * MATRIX_THREADS as usize;
                // Each of a thread's 32 sums grows by 16 × factor in a round, without rounding.
                let expected = 32.0 * 16.0 * FACTOR * self.rounds as f32;
                Ok(to[..threads].iter().all(|&bits| f32::from_bits(bits) == expected))
            }
        }
    }
}

/// Small enough that sums of many rounds are exact.
const FACTOR: f32 = 1.0 / 1024.0;

fn bf16_pair(x: f32) -> u32 {
    let bits = u32::from(half::bf16::from_f32(x).to_bits());
    bits | bits << 16
}
