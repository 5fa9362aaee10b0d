//! Matrix instructions, `ldmatrix`, shuffles and votes against loops written from the formulas of the PTX manual (sections
//! "Matrix Fragments for mma.m16n8k16", "… mma.m16n8k32", "ldmatrix", "shfl.sync", "vote.sync", "redux.sync").

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use longshore_cuda::{Buffer, Kernel, Launch, Source};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::device::Emulator;

const SOURCE: Source = Source { name: "instructions.cu", text: include_str!("instructions.cu") };

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    input: u64,
    output: u64,
    in_words: u32,
    out_words: u32,
}

/// Runs an entry for one warp; `input` and the answer are words by lane.
pub(super) fn run(entry: &'static str, kind: i64, input: &[u32], out_words: usize) -> Vec<u32> {
    let device = Emulator::device();
    let input_buffer = Buffer::from_slice(&device, input).unwrap();
    let output = Buffer::new(&device, 32 * out_words * 4).unwrap();
    let params = Params {
        input: input_buffer.address(),
        output: output.address(),
        in_words: input.len() as u32 / 32,
        out_words: out_words as u32,
    };
    let kernel = Kernel { source: SOURCE, entry, constants: vec![("KIND", kind)] };
    device.launch(&Launch::new(&kernel, [1, 1, 1], 32, &params).shared(512)).unwrap();
    output.to_vec().unwrap()
}

fn generator() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(20)
}

/// Row and column of element `i` of A in lane `lane`, 16-bit elements: "row = groupID for ai where 0 <= i < 2 || 4 <= i < 6, else
/// groupID + 8; col = threadID_in_group * 2 + (i & 1) for i < 4, + 8 for i >= 4".
pub(super) fn place_a(lane: usize, i: usize) -> (usize, usize) {
    let (group, thread) = (lane >> 2, lane % 4);
    let row = if (0..2).contains(&i) || (4..6).contains(&i) { group } else { group + 8 };
    let column = thread * 2 + (i & 1) + if i < 4 { 0 } else { 8 };
    (row, column)
}

/// "row = threadID_in_group * 2 + (i & 1) for i < 2, + 8 for i >= 2; col = groupID".
fn place_b(lane: usize, i: usize) -> (usize, usize) {
    let (group, thread) = (lane >> 2, lane % 4);
    (thread * 2 + (i & 1) + if i < 2 { 0 } else { 8 }, group)
}

/// "row = groupID for c0, c1, groupID + 8 for c2, c3; col = threadID_in_group * 2 + (i & 1)".
pub(super) fn place_d(lane: usize, i: usize) -> (usize, usize) {
    let (group, thread) = (lane >> 2, lane % 4);
    (if i < 2 { group } else { group + 8 }, thread * 2 + (i & 1))
}

#[test]
fn products_of_16_bit_elements_are_those_of_the_matrices() {
    let mut rng = generator();
    for kind in 0..2 {
        // Small whole numbers: every sum is exact, whatever its order.
        let number = |rng: &mut ChaCha8Rng| rng.random_range(-8..=8) as f32;
        let a: Vec<f32> = (0..16 * 16).map(|_| number(&mut rng)).collect();
        let b: Vec<f32> = (0..16 * 8).map(|_| number(&mut rng)).collect();
        let d: Vec<f32> = (0..16 * 8).map(|_| number(&mut rng)).collect();
        let bits = |x: f32| if kind == 0 { f16::from_f32(x).to_bits() } else { bf16::from_f32(x).to_bits() };
        let both = |low: f32, high: f32| u32::from(bits(low)) | u32::from(bits(high)) << 16;
        let mut input = Vec::new();
        for lane in 0..32 {
            let at = |i| place_a(lane, i);
            input.extend((0..4).map(|r| {
                let (low, high) = (at(2 * r), at(2 * r + 1));
                both(a[low.0 * 16 + low.1], a[high.0 * 16 + high.1])
            }));
            let at = |i| place_b(lane, i);
            input.extend((0..2).map(|r| {
                let (low, high) = (at(2 * r), at(2 * r + 1));
                both(b[low.0 * 8 + low.1], b[high.0 * 8 + high.1])
            }));
            input.extend((0..4).map(|i| d[place_d(lane, i).0 * 8 + place_d(lane, i).1].to_bits()));
        }
        let output = run("multiply", kind, &input, 4);
        for lane in 0..32 {
            for i in 0..4 {
                let (row, column) = place_d(lane, i);
                let product: f32 = (0..16).map(|k| a[row * 16 + k] * b[k * 8 + column]).sum();
                let wanted = d[row * 8 + column] + product;
                assert_eq!(
                    f32::from_bits(output[lane * 4 + i]),
                    wanted,
                    "kind {kind}, lane {lane}, element {i}"
                );
            }
        }
    }
}

#[test]
fn products_of_8_bit_integers_are_those_of_the_matrices() {
    let mut rng = generator();
    let a: Vec<i8> = (0..16 * 32).map(|_| rng.random()).collect();
    let b: Vec<i8> = (0..32 * 8).map(|_| rng.random()).collect();
    let d: Vec<i32> = (0..16 * 8).map(|_| rng.random_range(-1000..1000)).collect();
    let word = |bytes: [i8; 4]| u32::from_le_bytes(bytes.map(|x| x as u8));
    let mut input = Vec::new();
    for lane in 0..32_usize {
        let (group, thread) = (lane >> 2, lane % 4);
        // "row = groupID for 0 <= i < 4 || 8 <= i < 12, else groupID + 8; col = threadID_in_group * 4 + (i & 3) for i < 8, + 16 else".
        let of_a = |i: usize| {
            let row = if (0..4).contains(&i) || (8..12).contains(&i) { group } else { group + 8 };
            a[row * 32 + thread * 4 + (i & 3) + if i < 8 { 0 } else { 16 }]
        };
        input.extend((0..4).map(|r| word([0, 1, 2, 3].map(|i| of_a(4 * r + i)))));
        // "row = threadID_in_group * 4 + (i & 3) for i < 4, + 16 for i >= 4; col = groupID".
        let of_b = |i: usize| b[(thread * 4 + (i & 3) + if i < 4 { 0 } else { 16 }) * 8 + group];
        input.extend((0..2).map(|r| word([0, 1, 2, 3].map(|i| of_b(4 * r + i)))));
        input.extend((0..4).map(|i| d[place_d(lane, i).0 * 8 + place_d(lane, i).1] as u32));
    }
    let output = run("multiply", 2, &input, 4);
    for lane in 0..32 {
        for i in 0..4 {
            let (row, column) = place_d(lane, i);
            let product =
                (0..32).map(|k| i32::from(a[row * 32 + k]) * i32::from(b[k * 8 + column])).sum::<i32>();
            assert_eq!(
                output[lane * 4 + i] as i32,
                d[row * 8 + column] + product,
                "lane {lane}, element {i}"
            );
        }
    }
}

#[test]
fn ldmatrix_gives_each_lane_its_elements() {
    let mut rng = generator();
    // 32 rows of 8 elements; lane l names row `named[l]`, as row l % 8 of matrix l / 8.
    let rows: Vec<[u16; 8]> = (0..32).map(|_| rng.random()).collect();
    let named: Vec<usize> = (0..32).map(|_| rng.random_range(0..32)).collect();
    let mut input = Vec::new();
    for lane in 0..32 {
        input.extend(rows[lane].chunks(2).map(|both| u32::from(both[0]) | u32::from(both[1]) << 16));
        input.push(named[lane] as u32);
    }
    let output = run("load", 0, &input, 8);
    for lane in 0..32 {
        for matrix in 0..4 {
            let element = |row: usize, column: usize| rows[named[matrix * 8 + row]][column];
            let got = output[lane * 8 + matrix];
            let wanted = [element(lane / 4, lane % 4 * 2), element(lane / 4, lane % 4 * 2 + 1)];
            assert_eq!([got as u16, (got >> 16) as u16], wanted, "lane {lane}, matrix {matrix}");
            let got = output[lane * 8 + 4 + matrix];
            let wanted = [element(lane % 4 * 2, lane / 4), element(lane % 4 * 2 + 1, lane / 4)];
            assert_eq!([got as u16, (got >> 16) as u16], wanted, "transposed, lane {lane}, matrix {matrix}");
        }
    }
}

#[test]
fn lanes_exchange_numbers() {
    let mut rng = generator();
    let x: Vec<u32> = (0..32).map(|_| rng.random_range(1..u32::MAX)).collect();
    let from: Vec<usize> = (0..32).map(|_| rng.random_range(0..32)).collect();
    let mask = rng.random_range(0..32);
    let needle = x[13];
    let input: Vec<u32> = (0..32).flat_map(|l| [x[l], from[l] as u32, mask, needle]).collect();
    let output = run("exchange", 0, &input, 13);
    let votes = (0..32).filter(|&l| x[l].is_multiple_of(3)).fold(0, |votes, l| votes | 1_u32 << l);
    let sum: f32 = x.iter().map(|x| (x % 1000) as f32).sum();
    for lane in 0..32 {
        let wide = u64::from(x[lane]) << 20;
        let words = &input[4 * lane..][..4];
        let wanted = [
            x[from[lane]],
            x[lane ^ mask as usize],
            votes,
            *x.iter().max().unwrap(),
            *x.iter().min().unwrap(),
            x.iter().fold(0, |sum: u32, x| sum.wrapping_add(*x)),
            1,
            x.iter().map(|&x| x as f32).fold(0.0, f32::max).to_bits(),
            sum.to_bits(),
            x[lane].count_ones() + 100 * (wide | u64::from(x[lane])).count_ones(),
            x[lane].trailing_zeros() + 100 * wide.trailing_zeros(),
            x[from[lane]],
            words[0] ^ words[1] ^ words[2] ^ words[3],
        ];
        assert_eq!(output[lane * 13..][..13], wanted, "lane {lane}");
    }
}
