//! Products of warp groups, against loops written from the layouts of the PTX manual (sections "Matrix Fragments for
//! wgmma.mma_async.m64nNk16", "Strides", "Canonical Layouts", "Matrix Descriptor Format"), and the faults of who uses them.

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use longshore_cuda::{Buffer, Device, Error, Kernel, Launch, Source};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

use super::device::Emulator;
use super::instructions::{place_a, place_d};

const SOURCE: Source = Source { name: "groups.cu", text: include_str!("groups.cu") };
/// Rows of a product, and elements of its sums.
const ROWS: usize = 64;
const SUM: usize = 16;
/// Elements of the sum that a band of 128 bytes has.
const BAND: usize = 64;

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    image: u64,
    a: u64,
    d: u64,
    descriptor: u64,
    image_bytes: u32,
    fault: u32,
    block: u32,
    unused: u32,
}

/// How a matrix lies.
#[derive(Debug, Clone, Copy)]
struct Layout {
    /// Bytes of a row within which pieces are exchanged: 128, 64, 32; 16: none are.
    span: usize,
    across: bool,
    leading: usize,
    stride: usize,
}

impl Layout {
    /// Rows and groups of rows with gaps between them, as far as the pattern allows.
    fn new(span: usize, across: bool, columns: usize) -> Self {
        let (leading, stride) = match (span, across) {
            (16, false) => (columns / 8 * 144, 144),
            (16, true) => (columns / 8 * 272, 272),
            (_, false) => (16, 8 * span + 1024),
            (_, true) => (8 * span + 1024, 2 * columns / span * (8 * span + 1024)),
        };
        Self { span, across, leading, stride }
    }

    /// Byte of element `k` of the sum of a column: from tables "Leading Dimension Byte Offset" and "Stride Dimension Byte Offset" and the
    /// figures of exchanged pieces: that of row r of 8 is moved by r, r / 2, r / 4 for rows of 128, 64, 32 bytes.
    fn place(&self, k: usize, column: usize) -> usize {
        let (row, along) = if self.across { (k, column) } else { (column, k) };
        let moved = row % 8 * self.span / 128;
        let (piece, byte) = (along / 8, along % 8 * 2);
        match (self.span, self.across) {
            (16, false) => column / 8 * self.stride + column % 8 * 16 + piece * self.leading + byte,
            (16, true) => k / 8 * self.leading + k % 8 * 16 + piece * self.stride + byte,
            (span, across) => {
                let pieces = span / 16;
                let band = if across { piece / pieces * self.leading } else { 0 };
                row / 8 * self.stride + row % 8 * span + band + ((piece % pieces) ^ moved) * 16 + byte
            }
        }
    }

    /// "63–62: 0: No swizzle, 1: 128-Byte, 2: 64-Byte, 3: 32-Byte", "29–16" and "45–32: (x & 0x3FFFF) >> 4".
    fn descriptor(&self) -> u64 {
        let mode: u64 = match self.span {
            16 => 0,
            128 => 1,
            64 => 2,
            _ => 3,
        };
        mode << 62 | (self.stride as u64 >> 4) << 32 | (self.leading as u64 >> 4) << 16
    }
}

struct Trial {
    device: Arc<dyn Device>,
    dtype: i64,
    columns: usize,
    /// [64][16], [16][columns] (from element `first` of the sum on in memory), [64][columns].
    a: Vec<f32>,
    b: Vec<f32>,
    d: Vec<f32>,
}

impl Trial {
    fn new(dtype: i64, columns: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(columns as u64);
        // Small whole numbers: every sum is exact, whatever its order.
        let mut numbers = |count| (0..count).map(|_| rng.random_range(-8..=8) as f32).collect::<Vec<_>>();
        let (a, b, d) = (numbers(ROWS * SUM), numbers(BAND * columns), numbers(ROWS * columns));
        Self { device: Emulator::device(), dtype, columns, a, b, d }
    }

    fn bits(&self, x: f32) -> u16 {
        if self.dtype == 1 { f16::from_f32(x).to_bits() } else { bf16::from_f32(x).to_bits() }
    }

    /// Row and column of register `i` of D of a thread.
    fn place_of_d(thread: usize, i: usize) -> (usize, usize) {
        let (row, column) = place_d(thread % 32, i % 4);
        (thread / 32 * 16 + row, i / 4 * 8 + column)
    }

    fn fragments_of_a(&self) -> Vec<u32> {
        let element = |thread: usize, i| {
            let (row, column) = place_a(thread % 32, i);
            u32::from(self.bits(self.a[(thread / 32 * 16 + row) * SUM + column]))
        };
        let pair = |index: usize| {
            let (thread, i) = (index / 4, index % 4 * 2);
            element(thread, i) | element(thread, i + 1) << 16
        };
        (0..4 * 128).map(pair).collect()
    }

    fn fragments_of_d(&self, d: &[f32]) -> Vec<f32> {
        let registers = self.columns / 2;
        let of = |index: usize| {
            let (row, column) = Self::place_of_d(index / registers, index % registers);
            d[row * self.columns + column]
        };
        (0..128 * registers).map(of).collect()
    }

    /// The band as it lies in memory; what lies between is NaN.
    fn image(&self, layout: &Layout, elements: usize) -> Vec<u8> {
        let places = (0..elements).flat_map(|k| (0..self.columns).map(move |column| (k, column)));
        let mut image = Vec::new();
        for (k, column) in places {
            let at = layout.place(k, column);
            image.resize(image.len().max((at + 2).next_multiple_of(16)), 0xff);
            image[at..at + 2].copy_from_slice(&self.bits(self.b[k * self.columns + column]).to_le_bytes());
        }
        image
    }

    /// D + `times` A B, B from element `first` of the sum on.
    fn expected(&self, first: usize, times: usize) -> Vec<f32> {
        let of = |row: usize, column: usize| {
            let term = |k: usize| self.a[row * SUM + k] * self.b[(first + k) * self.columns + column];
            self.d[row * self.columns + column] + times as f32 * (0..SUM).map(term).sum::<f32>()
        };
        (0..ROWS).flat_map(|row| (0..self.columns).map(move |column| of(row, column))).collect()
    }

    fn run(
        &self,
        (entry, threads): (&'static str, u32),
        (image, across): (&[u8], bool),
        descriptor: u64,
        (fault, block): (u32, u32),
    ) -> Result<Vec<f32>, Error> {
        let image_buffer = Buffer::from_slice(&self.device, image)?;
        let a = Buffer::from_slice(&self.device, &self.fragments_of_a())?;
        let d = Buffer::from_slice(&self.device, &self.fragments_of_d(&self.d))?;
        let params = Params {
            image: image_buffer.address(),
            a: a.address(),
            d: d.address(),
            descriptor,
            image_bytes: image.len() as u32,
            fault,
            block,
            unused: 0,
        };
        let constants =
            vec![("DTYPE", self.dtype), ("COLUMNS", self.columns as i64), ("MATRIX_ACROSS", across.into())];
        let kernel = Kernel { source: SOURCE, entry, constants };
        let launch = Launch::new(&kernel, [block + 1, 1, 1], threads, &params);
        self.device.launch(&launch.shared((image.len() as u32).max(2 * 64 * 128 + 64) + 1024))?;
        d.to_vec()
    }
}

#[test]
fn products_are_those_of_the_matrices_wherever_their_elements_lie() {
    for (dtype, columns) in [(1, 64), (2, 128)] {
        let trial = Trial::new(dtype, columns);
        for (span, across) in [16, 32, 64, 128].into_iter().flat_map(|span| [(span, false), (span, true)]) {
            let layout = Layout::new(span, across, columns);
            // Along the sum a band of 128 bytes has four products: named by where they would begin.
            let steps = if span == 128 && !across { BAND / SUM } else { 1 };
            for step in 0..steps {
                let image = trial.image(&layout, steps * SUM);
                let descriptor = layout.descriptor() + (step * SUM * 2 / 16) as u64;
                let found = trial.run(("multiply", 128), (&image, across), descriptor, (0, 0)).unwrap();
                let wanted = trial.fragments_of_d(&trial.expected(step * SUM, 1));
                assert!(found == wanted, "{layout:?}, {columns} columns, step {step}");
            }
        }
    }
}

/// Passes five visits through two stages with a fault, in an even block or an odd one.
fn pass(fault: u32, block: u32) -> Result<Vec<f32>, Error> {
    let trial = Trial::new(1, 64);
    let layout = Layout { span: 128, across: false, leading: 16, stride: 1024 };
    trial.run(("pass", 256), (&trial.image(&layout, BAND), false), 0, (fault, block))
}

#[test]
fn stages_pass_in_order() {
    let trial = Trial::new(1, 64);
    for block in 0..2 {
        assert_eq!(pass(0, block).unwrap(), trial.fragments_of_d(&trial.expected(0, 5)));
    }
}

#[test]
fn faults_of_who_uses_warp_groups_are_named() {
    let faults: [(u32, &[&str]); 26] = [
        (1, &["wait_barrier missed a phase"]),
        (2, &["multiply_group reads", "wrote: no barrier orders the two"]),
        (3, &["multiply_group reads", "wrote: no barrier orders the two"]),
        (4, &["multiply_group reads", "without fence_async_proxy"]),
        (5, &["multiply_group reads", "thread 73 wrote, without fence_async_proxy"]),
        (7, &["multiply_group reads byte", "something else overwrote"]),
        (8, &["factors", "fence_products"]),
        (9, &["accumulators", "thread 137", "touched after"]),
        (10, &["factors", "thread 137", "touched after"]),
        (11, &["base offset"]),
        (12, &["lanes have different matrices"]),
        (13, &["warps", "of a group do different things"]),
        (14, &["a matrix lies at byte"]),
        (15, &["is under way"]),
        (17, &["accumulators", "touched before it was waited for"]),
        (18, &["factors", "touched before it was waited for"]),
        (19, &["copy_async_16 overwrites"]),
        (20, &["multiply_group reads byte", "something else overwrote"]),
        (21, &["is under way"]),
        (22, &["deadlock", "wait_barrier"]),
        (23, &["the barrier was overwritten"]),
        (26, &["wrong parity"]),
        (27, &["deadlock in setmaxnreg", "want 64512 registers, the block has 63488"]),
        (28, &["has 248 registers", "takes some", "until it has 40"]),
        (29, &["has 248 registers", "gives some back", "until it has 256"]),
        (30, &["accumulators of multiply_group are not named in wait_products"]),
    ];
    for ((fault, words), block) in faults.into_iter().flat_map(|fault| [(fault, 0), (fault, 1)]) {
        let problem = pass(fault, block).expect_err(words[0]).to_string();
        let place = format!("kernel `pass`, block ({block}, 0, 0)");
        for word in words.iter().chain([&place.as_str()]) {
            assert!(problem.contains(word), "fault {fault}: `{word}` is not in: {problem}");
        }
    }
}

#[test]
fn what_nothing_orders_is_named_by_who_comes_first() {
    // Warps take turns in ascending order in even blocks, in descending order in odd ones.
    for (fault, block, words) in [
        (6, 0, "where nobody has copied anything"),
        (24, 0, "thread 0 made the barrier: nothing orders the two"),
        (24, 1, "no barrier was made here"),
    ] {
        let problem = pass(fault, block).expect_err(words).to_string();
        assert!(problem.contains(words), "fault {fault}, block {block}: `{words}` is not in: {problem}");
    }
}

#[test]
fn a_copy_that_is_not_waited_for_is_named() {
    let (trial, layout) = (Trial::new(1, 64), Layout::new(128, false, 64));
    let image = trial.image(&layout, SUM);
    let problem = trial.run(("multiply", 128), (&image, false), layout.descriptor(), (25, 0)).unwrap_err();
    assert!(problem.to_string().contains("where a copy of thread 0 is under way"), "{problem}");
}

#[test]
fn accumulators_are_nan_until_they_are_waited_for() {
    let found = pass(16, 0).unwrap();
    assert!((0..128).all(|thread| found[thread * 32].is_nan() && found[thread * 32 + 1].is_finite()));
}
