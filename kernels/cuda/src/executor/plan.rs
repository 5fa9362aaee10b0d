//! Which blocks a sparse prefill visits, chosen on the device: energies by mean keys, then a selector with its guards.

use std::sync::Arc;

use longshore_attention::{BlockChoice, BlockChooser, BlockSelection, Error as AttentionError, QUERY_TILE};

use super::{CudaExecutor, SCORE_EIGHTHS, failed, pages::TilePages};
use crate::{
    BlockScorer, BlockSelector, Buffer, Error, PageElement, ScoreCall, SelectCall, SelectGuards, Selector,
    Span,
};

/// Pairs of query tile and block below which the CPU plans sooner than a device is asked.
pub(super) const CHOICES_MIN: usize = 1 << 14;
/// Bytes of energies of the tiles that are scored at once, and as many of peaks.
pub(super) const ENERGY_BYTES: usize = 64 << 20;

impl BlockChooser for CudaExecutor {
    fn choose(&self, choice: &BlockChoice<'_>) -> Result<Option<Vec<u32>>, AttentionError> {
        let lists = choice.queries.shape.kv_heads * choice.tiles;
        if lists * choice.blocks < self.choices_min.max(1) {
            return Ok(None);
        }
        let parts = match self.chooser_parts(choice) {
            Ok(parts) => parts,
            // No kernel for these heads, or no pages of these means, on this device: the CPU plans.
            Err(Error::Invalid { .. }) => return Ok(None),
            Err(error) if self.fallbacks.note(&error) => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        match self.with_room(|| self.choose_blocks(choice, &parts)) {
            Ok(bits) => Ok(Some(bits)),
            // No room: the CPU plans. What launches refuse is a fault of ours, and no reason to plan elsewhere in silence.
            Err(error) if self.fallbacks.note(&error) => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }
}

/// What a device has for a choice, before anything is asked of it.
struct ChooserParts {
    scorer: BlockScorer,
    mean_pages: Arc<TilePages>,
}

/// Tiles that are scored together.
struct Run {
    first: usize,
    tiles: usize,
    /// First of its words among all bits.
    word: usize,
}

impl CudaExecutor {
    /// Refuses heads and shapes of means that there are no kernels for.
    fn chooser_parts(&self, choice: &BlockChoice<'_>) -> Result<ChooserParts, Error> {
        let scorer = BlockScorer::new(&self.device, choice.queries.shape, PageElement::F32)?;
        let mean_pages = self.pages(choice.summaries.shape(), PageElement::F32, SCORE_EIGHTHS)?;
        Ok(ChooserParts { scorer, mean_pages })
    }

    fn choose_blocks(&self, choice: &BlockChoice<'_>, parts: &ChooserParts) -> Result<Vec<u32>, Error> {
        let ChooserParts { scorer, mean_pages } = parts;
        let (heads, words) = (choice.queries.shape, choice.words());
        let runs = runs(choice);
        let most = runs.iter().map(|run| run.tiles).max().unwrap_or(0);
        let room = heads.kv_heads * most * choice.blocks * size_of::<f32>();
        let queries = Buffer::from_slice(&self.device, choice.queries.data)?;
        let tiles: Vec<_> = (0..choice.blocks.div_ceil(choice.stripe_blocks))
            .map(|stripe| choice.summaries.tile(stripe))
            .collect();
        let pinned = mean_pages.pin(&tiles)?;
        if pinned.len() < tiles.len() {
            let problem = format!("{} of {} pages of means have room", pinned.len(), tiles.len());
            return Err(Error::OutOfPages { problem });
        }
        let means = Buffer::from_slice(&self.device, pinned.addresses())?;
        let energies = Buffer::new(&self.device, room)?;
        let peaks = choice.peak.map(|_| Buffer::new(&self.device, room)).transpose()?;
        let always = always(choice, words);
        let always = if always.is_empty() { None } else { Some(Buffer::from_slice(&self.device, &always)?) };
        let lists = heads.kv_heads * choice.tiles;
        let bits = Buffer::new(&self.device, lists * words * size_of::<u32>())?;
        let counts = Buffer::new(&self.device, lists * size_of::<u32>())?;
        let ends = Buffer::from_slice(&self.device, &ends(choice))?;
        for run in &runs {
            scorer.launch(&ScoreCall {
                queries: queries.whole(),
                means: means.whole(),
                energies: energies.whole(),
                peaks: peaks.as_ref().map(Buffer::whole),
                first_position: position(choice, run.first),
                first_row: choice.first_row + run.first * QUERY_TILE,
                tiles: run.tiles,
                stripes: tiles.len(),
                stripe_blocks: choice.stripe_blocks,
                page_keys: mean_pages.shape().tokens,
                stride: choice.blocks,
                block_tokens: choice.block_tokens,
                scale: choice.queries.scale,
                normalise: choice.normalise,
            })?;
            BlockSelector::new(&self.device).launch(&SelectCall {
                energies: energies.whole(),
                peaks: peaks.as_ref().map(Buffer::whole),
                always: always.as_ref().map(Buffer::whole),
                ends: words_from(&ends, 2 * run.first)?,
                bits: words_from(&bits, run.word)?,
                counts: words_from(&counts, heads.kv_heads * run.first)?,
                kv_heads: heads.kv_heads,
                tiles: run.tiles,
                stride: choice.blocks,
                words,
                selector: selector(choice.selection),
                most: u32::try_from(choice.most).unwrap_or(u32::MAX),
                guards: guards(choice),
            })?;
        }
        // Whoever needs pages need not wait for the bits.
        drop(pinned);
        Ok(in_order(choice, &runs, &bits.to_vec::<u32>()?))
    }
}

/// Words of 32 bits from one on.
pub(super) fn words_from(buffer: &Buffer, first: usize) -> Result<Span<'_>, Error> {
    let offset = first * size_of::<u32>();
    buffer.span(offset, buffer.bytes().saturating_sub(offset))
}

/// Runs of tiles whose energies have room.
fn runs(choice: &BlockChoice<'_>) -> Vec<Run> {
    let kv_heads = choice.queries.shape.kv_heads;
    let tile_bytes = kv_heads * choice.blocks * size_of::<f32>();
    let at_once = (ENERGY_BYTES / tile_bytes).max(1);
    let run = |first: usize| Run {
        first,
        tiles: at_once.min(choice.tiles - first),
        word: kv_heads * first * choice.words(),
    };
    (0..choice.tiles).step_by(at_once).map(run).collect()
}

/// The bits of runs, `[kv_heads][tiles of the run][words]` each, as `[kv_heads][tiles][words]`.
fn in_order(choice: &BlockChoice<'_>, runs: &[Run], bits: &[u32]) -> Vec<u32> {
    let (kv_heads, words) = (choice.queries.shape.kv_heads, choice.words());
    let mut ordered = Vec::with_capacity(bits.len());
    for kv_head in 0..kv_heads {
        for run in runs {
            let of = run.tiles * words;
            ordered.extend_from_slice(&bits[run.word + kv_head * of..][..of]);
        }
    }
    ordered
}

fn position(choice: &BlockChoice<'_>, tile: usize) -> u64 {
    choice.queries.first_position + (choice.first_row + tile * QUERY_TILE) as u64
}

/// Blocks that each tile scores, twice: its list ends with them.
fn ends(choice: &BlockChoice<'_>) -> Vec<u32> {
    let scored = |tile: usize| (position(choice, tile) / choice.block_tokens as u64) as u32;
    (0..choice.tiles).flat_map(|tile| [scored(tile); 2]).collect()
}

/// A bit for each block that is always kept, `[kv_heads][words]`, of which there are enough.
pub(super) fn always(choice: &BlockChoice<'_>, words: usize) -> Vec<u32> {
    let word = |blocks: &[bool]| blocks.iter().rev().fold(0, |word, &kept| word << 1 | u32::from(kept));
    let of_head = |head: &[bool]| -> Vec<u32> {
        head.chunks(32).map(word).chain(std::iter::repeat(0)).take(words).collect()
    };
    choice.always.chunks(choice.blocks).flat_map(of_head).collect()
}

pub(super) fn selector(selection: BlockSelection) -> Selector {
    match selection {
        BlockSelection::Alpha(alpha) => Selector::Alpha(alpha),
        BlockSelection::Mass(share) => Selector::Mass(share),
        BlockSelection::TopK(count) => Selector::TopK(u32::try_from(count).unwrap_or(u32::MAX)),
    }
}

pub(super) fn guards(choice: &BlockChoice<'_>) -> SelectGuards {
    let count = |blocks: u64| u32::try_from(blocks).unwrap_or(u32::MAX);
    SelectGuards { sink: count(choice.sink), local: count(choice.local), peak: choice.peak }
}
