//! Energies of blocks, and whole plans, against the CPU's policies.

use std::collections::BTreeSet;
use std::sync::Arc;

use longshore_attention::{
    CpuExecutor, Executor, HeadShape, KvDtype, PlanInput, PrefillPolicy, QUERY_TILE, Queries, SparseWork,
    Summaries, Tile, TileShape, Tiles, Visit,
};

use super::material::{Random, random_tiles, rounded};
use crate::{
    BlockScorer, BlockSelector, Buffer, Device, Error, PageElement, ScoreCall, SelectCall, SelectGuards,
    Selector,
};

const BLOCK: usize = 16;
const STRIPE: u32 = 32;

/// A prompt: queries of its last tiles, all its keys, their means.
pub(super) struct Prompt {
    heads: HeadShape,
    element: PageElement,
    /// Of the first query row.
    first_position: usize,
    rows: usize,
    queries: Vec<f32>,
    tiles: Tiles,
    summaries: Summaries,
    /// Mean keys, `[kv_heads][blocks][head_dim]`, rounded to the element.
    means: Vec<f32>,
}

impl Prompt {
    /// `tiles` query tiles after `before` positions; keys lean one way block by block, so that some blocks matter more.
    pub(super) fn new(heads: HeadShape, element: PageElement, before: usize, tiles: usize) -> Self {
        let mut random = Random(61);
        let (kv_heads, head_dim, rows) = (heads.kv_heads, heads.head_dim, tiles * QUERY_TILE);
        let shape = TileShape { block_tokens: BLOCK, kv_heads, head_dim, dtype: KvDtype::F32 };
        let blocks = (before + rows) / BLOCK;
        let mut all = random_tiles(&mut random, shape, blocks, 0.5);
        for tile in &mut all {
            lean(tile, &mut random);
        }
        let mut queries = random.numbers(rows * heads.query_heads() * head_dim, 2.0);
        rounded(element, &mut queries);
        let mut summaries = Summaries::new(shape, STRIPE, 0).expect("a shape of ours");
        let mut means = vec![0.0; kv_heads * blocks * head_dim];
        for (block, tile) in all.iter().enumerate() {
            let mean = longshore_attention::Mean::of(tile);
            for (head, key) in mean.key().chunks_exact(head_dim).enumerate() {
                means[(head * blocks + block) * head_dim..][..head_dim].copy_from_slice(key);
            }
            summaries.push(block as u64, tile).expect("the next block");
        }
        rounded(element, &mut means);
        Self {
            heads,
            element,
            first_position: before,
            rows,
            queries,
            tiles: Tiles { shape, tiles: all },
            summaries,
            means,
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.heads.head_dim as f32).sqrt()
    }

    fn tiles(&self) -> usize {
        self.rows / QUERY_TILE
    }

    fn blocks(&self) -> usize {
        self.tiles.tiles.len()
    }

    /// Blocks that end before a query tile.
    fn scored(&self, tile: usize) -> usize {
        (self.first_position + tile * QUERY_TILE) / BLOCK
    }

    fn upload(&self, device: &Arc<dyn Device>, numbers: &[f32]) -> Result<Buffer, Error> {
        let narrow = |narrow: fn(f32) -> u16| numbers.iter().map(|&x| narrow(x)).collect::<Vec<u16>>();
        match self.element {
            PageElement::F32 => Buffer::from_slice(device, numbers),
            PageElement::Bf16 => Buffer::from_slice(device, &narrow(|x| half::bf16::from_f32(x).to_bits())),
            _ => Buffer::from_slice(device, &narrow(|x| half::f16::from_f32(x).to_bits())),
        }
    }

    /// A page for each stripe, whose keys are means; its values are nothing that may be read.
    fn mean_pages(&self, device: &Arc<dyn Device>) -> Result<Vec<Buffer>, Error> {
        let (stripe, dim, blocks) = (STRIPE as usize, self.heads.head_dim, self.blocks());
        let page = |first: usize| {
            let mut page = vec![f32::NAN; self.heads.kv_heads * 2 * stripe * dim];
            for (kv_head, head) in page.chunks_exact_mut(2 * stripe * dim).enumerate() {
                let count = stripe.min(blocks - first) * dim;
                head[..count].copy_from_slice(&self.means[(kv_head * blocks + first) * dim..][..count]);
            }
            self.upload(device, &page)
        };
        (0..blocks).step_by(stripe).map(page).collect()
    }

    /// Energies and peaks from the device, `[kv_heads][tiles][blocks]`.
    fn score(&self, device: &Arc<dyn Device>, normalise: bool) -> Result<(Buffer, Buffer), Error> {
        let room = self.heads.kv_heads * self.tiles() * self.blocks();
        let energies = Buffer::from_slice(device, &vec![f32::NAN; room])?;
        let peaks = Buffer::from_slice(device, &vec![f32::NAN; room])?;
        let (queries, pages) = (self.upload(device, &self.queries)?, self.mean_pages(device)?);
        let addresses: Vec<u64> = pages.iter().map(Buffer::address).collect();
        let means = Buffer::from_slice(device, &addresses)?;
        BlockScorer::new(device, self.heads, self.element)?.launch(&ScoreCall {
            queries: queries.whole(),
            means: means.whole(),
            energies: energies.whole(),
            peaks: Some(peaks.whole()),
            first_position: self.first_position as u64,
            first_row: 0,
            tiles: self.tiles(),
            stripes: pages.len(),
            stripe_blocks: STRIPE as usize,
            page_keys: STRIPE as usize,
            stride: self.blocks(),
            block_tokens: BLOCK,
            scale: self.scale(),
            normalise,
        })?;
        device.synchronize()?;
        Ok((energies, peaks))
    }

    /// Logits of the packed rows of a tile against the blocks before it, base 2.
    fn logits(&self, kv_head: usize, tile: usize) -> Vec<Vec<f64>> {
        let HeadShape { group, head_dim, .. } = self.heads;
        let scale = f64::from(self.scale()) * std::f64::consts::LOG2_E;
        let row = |packed: usize| {
            let position = tile * QUERY_TILE + packed / group;
            let head = position * self.heads.query_heads() + kv_head * group + packed % group;
            let query = &self.queries[head * head_dim..][..head_dim];
            (0..self.scored(tile)).map(move |block| {
                let mean = &self.means[(kv_head * self.blocks() + block) * head_dim..][..head_dim];
                query.iter().zip(mean).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>() * scale
            })
        };
        (0..QUERY_TILE * group).map(|packed| row(packed).collect()).collect()
    }
}

/// Moves all keys of a tile the same way.
pub(super) fn lean(tile: &mut Tile, random: &mut Random) {
    let shape = tile.shape();
    let way = random.numbers(shape.kv_heads * shape.head_dim, 1.5);
    for token in 0..shape.block_tokens {
        let (mut keys, values) = tile.read(token).expect("a token of the tile");
        keys.iter_mut().zip(&way).for_each(|(key, way)| *key += way);
        tile.write(token, &keys, &values).expect("a token of the tile");
    }
}

fn log_sum(powers: impl Iterator<Item = f64>) -> f64 {
    powers.map(f64::exp2).sum::<f64>().log2()
}

/// The largest distance of an energy or a peak from what the rule says, in units of the logarithm.
pub(super) fn energies(device: &Arc<dyn Device>, prompt: &Prompt, normalise: bool) -> Result<f64, Error> {
    let (energies, peaks) = prompt.score(device, normalise)?;
    let (energies, peaks) = (energies.to_vec::<f32>()?, peaks.to_vec::<f32>()?);
    let mut worst = 0.0_f64;
    for list in 0..prompt.heads.kv_heads * prompt.tiles() {
        let (kv_head, tile) = (list / prompt.tiles(), list % prompt.tiles());
        let mut logits = prompt.logits(kv_head, tile);
        if normalise {
            for row in &mut logits {
                let all = log_sum(row.iter().copied());
                row.iter_mut().for_each(|t| *t -= all);
            }
        }
        let place = list * prompt.blocks();
        for block in 0..prompt.scored(tile) {
            let column = || logits.iter().map(|row| row[block]);
            let wanted = (log_sum(column()), column().fold(f64::NEG_INFINITY, f64::max));
            let found = (f64::from(energies[place + block]), f64::from(peaks[place + block]));
            let off = (found.0 - wanted.0).abs().max((found.1 - wanted.1).abs());
            worst = worst.max(if off.is_nan() { f64::INFINITY } else { off });
        }
        let rest = &energies[place + prompt.scored(tile)..place + prompt.blocks()];
        if rest.iter().any(|energy| !energy.is_nan()) {
            return Ok(f64::INFINITY);
        }
    }
    Ok(worst)
}

/// Blocks that the device visits and the CPU's policy does not, or the other way round, of f32 prompts.
pub(super) fn plan(
    device: &Arc<dyn Device>,
    prompt: &Prompt,
    policy: &str,
    (normalise, selector, most, guards): (bool, Selector, u32, SelectGuards),
) -> Result<f64, Error> {
    let work = cpu_plan(prompt, policy);
    let (energies, peaks) = prompt.score(device, normalise)?;
    let (kv_heads, tiles, words) = (prompt.heads.kv_heads, prompt.tiles(), prompt.blocks().div_ceil(32));
    let ends: Vec<u32> = (0..tiles)
        .flat_map(|tile| [prompt.scored(tile), prompt.scored(tile) + QUERY_TILE / BLOCK])
        .map(|end| end as u32)
        .collect();
    let ends = Buffer::from_slice(device, &ends)?;
    let bits = Buffer::from_slice(device, &vec![u32::MAX; kv_heads * tiles * words])?;
    let counts = Buffer::from_slice(device, &vec![0_u32; kv_heads * tiles])?;
    BlockSelector::new(device).launch(&SelectCall {
        energies: energies.whole(),
        peaks: Some(peaks.whole()),
        always: None,
        ends: ends.whole(),
        bits: bits.whole(),
        counts: counts.whole(),
        kv_heads,
        tiles,
        stride: prompt.blocks(),
        words,
        selector,
        most,
        guards,
    })?;
    let bits = bits.to_vec::<u32>()?;
    let mut wrong = 0;
    for (list, words) in bits.chunks_exact(words).enumerate() {
        let found: BTreeSet<u32> = (0..32 * words.len())
            .filter(|&block| words[block / 32] >> (block % 32) & 1 == 1)
            .map(|block| block as u32)
            .collect();
        let wanted = visited(&work, list / tiles, list % tiles);
        wrong += found.symmetric_difference(&wanted).count();
    }
    Ok(wrong as f64)
}

fn cpu_plan(prompt: &Prompt, policy: &str) -> SparseWork {
    let policy = PrefillPolicy::parse(policy, None).expect("a policy of ours");
    let input = PlanInput {
        queries: Queries {
            shape: prompt.heads,
            first_position: prompt.first_position as u64,
            scale: prompt.scale(),
            data: &prompt.queries,
        },
        layer: 5,
        kv: &prompt.tiles,
        first_block: 0,
        summaries: &prompt.summaries,
        stripe_blocks: STRIPE,
        dense_from: u64::MAX,
        spreads: None,
        cosines: None,
    };
    CpuExecutor::serial().plan(&policy, &input).expect("a call of ours")
}

/// Blocks that a list visits.
fn visited(work: &SparseWork, kv_head: usize, tile: usize) -> BTreeSet<u32> {
    let visits = work.list(kv_head, tile).iter();
    visits
        .filter_map(|visit| match visit {
            Visit::Block(block) => Some(block.tile),
            Visit::Columns { .. } | Visit::Means { .. } | Visit::EndOfStripe => None,
        })
        .collect()
}
