//! From bits to what prefill attention visits, without the host.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::{ListBuilder, ListCall};
use crate::{Device, Error, Kernel, KeyVisit, Launch, Source, Span};

const SOURCE: Source = Source { name: "build_visits.cu", text: include_str!("../../source/build_visits.cu") };
const WARPS: usize = 4;
const THREADS: u32 = 32 * WARPS as u32;

/// Means that stand for blocks which are not visited, in pages of a stripe each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StripeMeans {
    /// Blocks of a stripe.
    pub stripe_blocks: usize,
    /// Means that a page has room for: a power of two, no fewer.
    pub page_keys: usize,
}

/// Places and sizes of the bits of some lists, as [`crate::BlockSelector`] writes them: list `kv_head * tiles + tile`. Block 0 is at
/// position 0, and is the first page of the table that visits count through.
#[derive(Debug, Clone, Copy)]
pub struct VisitCall<'a> {
    /// u32 `[lists][words]`.
    pub bits: Span<'a>,
    /// u32 `[tiles][2]`: blocks of which means stand for those that are not visited, where there are means; the second is not read.
    pub ends: Span<'a>,
    /// u32 `[tiles]`: position behind the last row.
    pub row_ends: Span<'a>,
    /// Lists: a multiple of the tiles.
    pub lists: usize,
    /// Query tiles.
    pub tiles: usize,
    /// Words of each list.
    pub words: usize,
    /// Positions of a block; a power of two from 16 to 256.
    pub block_tokens: usize,
    /// Keys of a visit at most ([`crate::PrefillAttention::visit_keys`]): 16, 32 or 64.
    pub keys: usize,
    /// Means, where they stand for what is not visited.
    pub means: Option<StripeMeans>,
}

/// Visits of up to `keys` keys that a list over so many blocks has at most, with means of the first `scored` blocks. Blocks that are shorter
/// than a visit may each have one.
pub fn most_visits(
    (blocks, scored): (usize, usize),
    block_tokens: usize,
    keys: usize,
    means: Option<StripeMeans>,
) -> usize {
    let places = means.map_or(0, |means| scored.div_ceil(means.stripe_blocks) * means.page_keys);
    blocks * block_tokens.div_ceil(keys) + places.div_ceil(keys)
}

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    bits: u64,
    ends: u64,
    row_ends: u64,
    counts: u64,
    offsets: u64,
    output: u64,
    room: u64,
    lists: u32,
    words: u32,
    tiles: u32,
    block_shift: u32,
    keys: u32,
    stripe_blocks: u32,
    mean_shift: u32,
    means: u32,
}

/// Of counts, of visits, and of who takes which.
pub(crate) fn kernels() -> [Kernel; 3] {
    ["count_visits", "expand_visits", "place_items"].map(|entry| Kernel {
        source: SOURCE,
        entry,
        constants: Vec::new(),
    })
}

/// Makes visits.
#[derive(Debug)]
pub struct VisitBuilder {
    device: Arc<dyn Device>,
    count: Kernel,
    expand: Kernel,
    lists: ListBuilder,
}

impl VisitBuilder {
    /// On a device.
    pub fn new(device: &Arc<dyn Device>) -> Self {
        let [count, expand, _] = kernels();
        Self { device: Arc::clone(device), count, expand, lists: ListBuilder::new(device) }
    }

    /// Queues how many visits each list has, u32 `[lists]` at `counts`, where each begins, u64 `[lists + 1]` at `offsets`, and the visits,
    /// whose number the device alone knows: `visits` must have room for [`most_visits`] of each list. Where there are more all the same, the
    /// kernel ends with a fault, and writes nothing beyond.
    pub fn launch(
        &self,
        call: &VisitCall<'_>,
        counts: Span<'_>,
        offsets: Span<'_>,
        visits: Span<'_>,
    ) -> Result<(), Error> {
        if call.lists == 0 {
            return Ok(());
        }
        let params = Params {
            counts: counts.for_kernel("counts", &[call.lists], size_of::<u32>())?,
            offsets: offsets.for_kernel("offsets", &[call.lists + 1], size_of::<u64>())?,
            output: visits.for_kernel("visits", &[1], size_of::<KeyVisit>())?,
            room: (visits.bytes() / size_of::<KeyVisit>()) as u64,
            ..params(call)?
        };
        let grid = [call.lists.div_ceil(WARPS) as u32, 1, 1];
        self.device.launch(&Launch::new(&self.count, grid, THREADS, &params))?;
        let lists = ListCall { counts, bits: call.bits, lists: call.lists, words: call.words };
        self.lists.offsets(&lists, offsets)?;
        self.device.launch(&Launch::new(&self.expand, grid, THREADS, &params))
    }
}

fn params(call: &VisitCall<'_>) -> Result<Params, Error> {
    let invalid = |field, problem: String| Err(Error::Invalid { field, problem });
    if call.tiles == 0 || !call.lists.is_multiple_of(call.tiles) {
        return invalid("lists", format!("are {} of {} tiles", call.lists, call.tiles));
    }
    if !call.block_tokens.is_power_of_two() || !(16..=256).contains(&call.block_tokens) {
        let problem = format!("is {}, must be a power of two from 16 to 256", call.block_tokens);
        return invalid("block_tokens", problem);
    }
    if ![16, 32, 64].contains(&call.keys) {
        return invalid("keys", format!("is {}, must be 16, 32 or 64", call.keys));
    }
    if call.words.saturating_mul(32 * call.block_tokens) > u32::MAX as usize {
        return invalid("words", format!("are {}: 2^32 keys or more", call.words));
    }
    let means = call.means.unwrap_or(StripeMeans { stripe_blocks: 1, page_keys: 1 });
    if !means.page_keys.is_power_of_two() || !(1..=means.page_keys).contains(&means.stripe_blocks) {
        let problem = format!("is {}, pages of means have {} keys", means.stripe_blocks, means.page_keys);
        return invalid("stripe_blocks", problem);
    }
    Ok(Params {
        bits: call.bits.for_kernel("bits", &[call.lists, call.words], size_of::<u32>())?,
        ends: call.ends.for_kernel("ends", &[call.tiles, 2], size_of::<u32>())?,
        row_ends: call.row_ends.for_kernel("row_ends", &[call.tiles], size_of::<u32>())?,
        lists: call.lists as u32,
        words: call.words as u32,
        tiles: call.tiles as u32,
        block_shift: call.block_tokens.ilog2(),
        keys: call.keys as u32,
        stripe_blocks: means.stripe_blocks as u32,
        mean_shift: means.page_keys.ilog2(),
        means: call.means.is_some().into(),
        ..Params::zeroed()
    })
}
