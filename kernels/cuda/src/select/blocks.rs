//! From energies to blocks: selectors and guards.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::{Device, Error, Kernel, Launch, Source, Span};

const SOURCE: Source =
    Source { name: "select_blocks.cu", text: include_str!("../../source/select_blocks.cu") };
const THREADS: u32 = 256;
/// A histogram of 64-bit sums, counts of the warps, and what they tell each other.
const SHARED: u32 = 256 * 8 + 8 * 4 + 2 * 4 + 8;

/// Which blocks are kept, by their energies (log2 of what they weigh).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Selector {
    /// Energies ≥ the largest + log2 of this.
    Alpha(f32),
    /// The largest so many; of equals the later.
    TopK(u32),
    /// The fewest, heaviest first, that reach this share of all weight; of equals the later. Weights count in units of 2^−32 of the
    /// largest.
    Mass(f32),
}

/// Blocks that are kept whatever they weigh.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SelectGuards {
    /// First blocks.
    pub sink: u32,
    /// Last scored blocks.
    pub local: u32,
    /// Blocks of which some row gives this share; needs peaks.
    pub peak: Option<f32>,
}

/// Places and sizes of a launch. There are `tiles` lists for each of `kv_heads` heads; list `head * tiles + tile`.
#[derive(Debug, Clone, Copy)]
pub struct SelectCall<'a> {
    /// f32 `[kv_heads][tiles][stride]`.
    pub energies: Span<'a>,
    /// Likewise; needed for the guard `peak`.
    pub peaks: Option<Span<'a>>,
    /// u32 `[kv_heads][words]`: a bit for each block that is kept in any case, where there are any.
    pub always: Option<Span<'a>>,
    /// u32 `[tiles][2]`: blocks that have energies, and blocks of the list: those from the former to the latter are kept.
    pub ends: Span<'a>,
    /// u32 `[kv_heads][tiles][words]`: a bit for each block that is kept, block 32 w + b in bit b of word w.
    pub bits: Span<'a>,
    /// u32 `[kv_heads][tiles]`: how many are kept.
    pub counts: Span<'a>,
    /// KV heads.
    pub kv_heads: usize,
    /// Lists of each.
    pub tiles: usize,
    /// Elements from one list's energies to the next's.
    pub stride: usize,
    /// Words of a list's bits: 32 blocks each.
    pub words: usize,
    /// What is kept.
    pub selector: Selector,
    /// The heaviest so many of it at most; guards do not count.
    pub most: u32,
    /// What is kept besides.
    pub guards: SelectGuards,
}

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    energies: u64,
    peaks: u64,
    always: u64,
    ends: u64,
    bits: u64,
    counts: u64,
    tiles: u32,
    stride: u32,
    words: u32,
    selector: u32,
    value: f32,
    count: u32,
    sink: u32,
    local: u32,
    least_peak: f32,
    most: u32,
}

pub(super) fn kernel() -> Kernel {
    Kernel { source: SOURCE, entry: "select_blocks", constants: Vec::new() }
}

/// Chooses blocks.
#[derive(Debug)]
pub struct BlockSelector {
    device: Arc<dyn Device>,
    kernel: Kernel,
}

impl BlockSelector {
    /// On a device.
    pub fn new(device: &Arc<dyn Device>) -> Self {
        Self { device: Arc::clone(device), kernel: kernel() }
    }

    /// Queues a launch. Refuses shares that are none, and a guard `peak` without peaks.
    pub fn launch(&self, call: &SelectCall<'_>) -> Result<(), Error> {
        let invalid = |field, problem: String| Err(Error::Invalid { field, problem });
        let (selector, value, count) = match call.selector {
            Selector::Alpha(alpha) => (0, log2(alpha), 0),
            Selector::TopK(count) => (1, 0.0, count),
            Selector::Mass(share) => (2, share, 0),
        };
        if let Selector::Alpha(share) | Selector::Mass(share) = call.selector
            && !(0.0..=1.0).contains(&share)
        {
            return invalid("selector", format!("has the share {share}, must be from 0 to 1"));
        }
        if call.guards.peak.is_some() && call.peaks.is_none() {
            return invalid("peaks", "are missing: the guard `peak` needs them".to_owned());
        }
        let (heads, tiles, words) = (call.kv_heads, call.tiles, call.words);
        let (word, room) = (size_of::<u32>(), [heads, tiles, call.stride]);
        let peaks = call.peaks.filter(|_| call.guards.peak.is_some());
        let peaks = peaks.map(|peaks| peaks.for_kernel("peaks", &room, word)).transpose()?;
        let always = call.always.map(|bits| bits.for_kernel("always", &[heads, words], word)).transpose()?;
        // Places of blocks must not wrap round where guards are added.
        let most = 1 << 30;
        let params = Params {
            energies: call.energies.for_kernel("energies", &room, word)?,
            peaks: peaks.unwrap_or(0),
            always: always.unwrap_or(0),
            ends: call.ends.for_kernel("ends", &[tiles, 2], word)?,
            bits: call.bits.for_kernel("bits", &[heads, tiles, words], word)?,
            counts: call.counts.for_kernel("counts", &[heads, tiles], word)?,
            tiles: call.tiles as u32,
            stride: call.stride as u32,
            words: call.words as u32,
            selector,
            value,
            count,
            sink: call.guards.sink.min(most),
            local: call.guards.local.min(most),
            least_peak: call.guards.peak.map_or(f32::INFINITY, f32::log2),
            most: call.most,
        };
        let lists = call.kv_heads * call.tiles;
        if lists == 0 {
            return Ok(());
        }
        let launch = Launch::new(&self.kernel, [lists as u32, 1, 1], THREADS, &params);
        self.device.launch(&launch.shared(SHARED))
    }
}

/// log2, rounded once; −∞ of 0.
fn log2(x: f32) -> f32 {
    f64::from(x).log2() as f32
}
