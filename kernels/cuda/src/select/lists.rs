//! From bits to lists of blocks, and to tables of pages.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::{Device, Error, Kernel, Launch, Source, Span};

const SOURCE: Source = Source { name: "build_lists.cu", text: include_str!("../../source/build_lists.cu") };
const WARPS: usize = 4;
const SCAN_THREADS: u32 = 1024;

/// Places and sizes of the bits of some lists, as [`crate::BlockSelector`] writes them.
#[derive(Debug, Clone, Copy)]
pub struct ListCall<'a> {
    /// u32 `[lists]`.
    pub counts: Span<'a>,
    /// u32 `[lists][words]`.
    pub bits: Span<'a>,
    /// Lists.
    pub lists: usize,
    /// Words of each.
    pub words: usize,
}

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    counts: u64,
    offsets: u64,
    bits: u64,
    output: u64,
    pages: u64,
    firsts: u64,
    lists: u32,
    words: u32,
    tiles: u32,
    room: u32,
}

/// Of offsets, of blocks, of pages.
pub(super) fn kernels() -> [Kernel; 3] {
    ["scan_counts", "expand_blocks", "expand_pages"].map(|entry| Kernel {
        source: SOURCE,
        entry,
        constants: Vec::new(),
    })
}

/// Makes lists.
#[derive(Debug)]
pub struct ListBuilder {
    device: Arc<dyn Device>,
    scan: Kernel,
    expand: Kernel,
    pages: Kernel,
}

impl ListBuilder {
    /// On a device.
    pub fn new(device: &Arc<dyn Device>) -> Self {
        let [scan, expand, pages] = kernels();
        Self { device: Arc::clone(device), scan, expand, pages }
    }

    /// Queues where each list begins: u64 `[lists + 1]` at `offsets`.
    pub fn offsets(&self, call: &ListCall<'_>, offsets: Span<'_>) -> Result<(), Error> {
        let offsets = offsets.for_kernel("offsets", &[call.lists + 1], size_of::<u64>())?;
        let params = Params { offsets, tiles: 1, ..params(call)? };
        let launch = Launch::new(&self.scan, [1, 1, 1], SCAN_THREADS, &params);
        self.device.launch(&launch.shared(32 * 4))
    }

    /// Queues the numbers of the blocks, ascending, each list from its offset on in u32 `blocks`, whose size the offsets tell alone.
    pub fn blocks(&self, call: &ListCall<'_>, offsets: Span<'_>, blocks: Span<'_>) -> Result<(), Error> {
        let offsets = offsets.for_kernel("offsets", &[call.lists + 1], size_of::<u64>())?;
        let output = blocks.address();
        self.expand(&self.expand, call, Params { offsets, output, tiles: 1, ..params(call)? })
    }

    /// Queues the addresses of the blocks' pages, `room` of each list at most, in u64 `[lists][room]` at `output`. Tile `l % tiles`
    /// of list `l` has its pages in the table `pages` from entry `firsts[l % tiles]` (u32) on.
    pub fn pages(
        &self,
        call: &ListCall<'_>,
        (pages, firsts, tiles): (Span<'_>, Span<'_>, usize),
        output: Span<'_>,
        room: usize,
    ) -> Result<(), Error> {
        if tiles == 0 {
            return Err(Error::Invalid { field: "tiles", problem: "is 0, must be above".to_owned() });
        }
        let params = Params {
            output: output.for_kernel("output", &[call.lists, room], size_of::<u64>())?,
            pages: pages.address(),
            firsts: firsts.for_kernel("firsts", &[tiles], size_of::<u32>())?,
            tiles: tiles as u32,
            room: room as u32,
            ..params(call)?
        };
        self.expand(&self.pages, call, params)
    }

    fn expand(&self, kernel: &Kernel, call: &ListCall<'_>, params: Params) -> Result<(), Error> {
        if call.lists == 0 {
            return Ok(());
        }
        let grid = [call.lists.div_ceil(WARPS) as u32, 1, 1];
        self.device.launch(&Launch::new(kernel, grid, (WARPS * 32) as u32, &params))
    }
}

fn params(call: &ListCall<'_>) -> Result<Params, Error> {
    Ok(Params {
        counts: call.counts.for_kernel("counts", &[call.lists], size_of::<u32>())?,
        bits: call.bits.for_kernel("bits", &[call.lists, call.words], size_of::<u32>())?,
        lists: call.lists as u32,
        words: call.words as u32,
        ..Params::zeroed()
    })
}
