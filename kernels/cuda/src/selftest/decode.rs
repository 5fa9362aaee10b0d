//! Decode attention and merges, against the CPU's executor.

use std::sync::Arc;

use longshore_attention::{
    AttendItem, CpuExecutor, ExactBlock, Executor, HeadShape, KvDtype, Partials, Queries, Tile, TileShape,
    Tiles, WorkList,
};

use super::material::{Pages, Random, pages_of, random_tiles, relative, rounded, spoil, widened};
use crate::{
    Buffer, DecodeAttention, DecodeCall, DecodeItem, Device, Error, MergeItem, PageElement, PageQuantiser,
    PageShape, PartialMerger,
};

/// Heads, pages and elements of a comparison.
#[derive(Debug, Clone, Copy)]
pub(super) struct DecodeShape {
    pub(super) element: PageElement,
    pub(super) tokens: usize,
    pub(super) heads: HeadShape,
    /// Largest query element: logits are about its square root of the head size times as large.
    pub(super) size: f32,
}

/// A sequence of a batch: keys, rows, and the position of the first row (keys after a row are hidden).
#[derive(Debug, Clone, Copy)]
pub(super) struct DecodeRequest {
    pub(super) keys: usize,
    pub(super) rows: usize,
    pub(super) first_position: u64,
}

impl DecodeRequest {
    /// A decode step: one row, the last position.
    pub(super) fn step(keys: usize) -> Self {
        Self { keys, rows: 1, first_position: (keys as u64).saturating_sub(1) }
    }

    /// The last `rows` positions of a sequence.
    pub(super) fn tail(keys: usize, rows: usize) -> Self {
        Self { keys, rows, first_position: (keys - rows) as u64 }
    }
}

/// A sequence as the CPU has it, and its pages.
struct Sequence {
    request: DecodeRequest,
    tiles: Tiles,
    pages: Vec<Vec<u8>>,
    queries: Vec<f32>,
}

impl DecodeShape {
    fn page(&self) -> PageShape {
        let HeadShape { kv_heads, head_dim, .. } = self.heads;
        PageShape { tokens: self.tokens, kv_heads, head_dim, element: self.element }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.heads.head_dim as f32).sqrt()
    }

    /// Values of a record: m, l, o.
    fn width(&self) -> usize {
        2 + self.heads.head_dim
    }

    /// Tiles of the CPU and pages of the device with the same content. E4M3 is narrowed on the device and widened here.
    fn content(
        &self,
        device: &Arc<dyn Device>,
        random: &mut Random,
        count: usize,
    ) -> Result<(Tiles, Vec<Vec<u8>>), Error> {
        let page = self.page();
        let Some(shape) = page.tile() else {
            let floats = PageShape { element: PageElement::F32, ..page };
            let shape = TileShape {
                block_tokens: page.tokens,
                kv_heads: page.kv_heads,
                head_dim: page.head_dim,
                dtype: KvDtype::F32,
            };
            let tiles = random_tiles(random, shape, count, 1.0);
            let (from, to) =
                (Pages::new(device, &pages_of(&tiles))?, Pages::empty(device, count, page.bytes())?);
            let quantiser = PageQuantiser::new(device, floats, PageElement::E4m3)?;
            quantiser.launch(from.table.whole(), to.table.whole(), count)?;
            let pages = to.bodies()?;
            let tiles: Vec<Tile> = pages.iter().map(|body| widened(&page, body)).collect();
            return Ok((Tiles { shape, tiles }, pages));
        };
        let tiles = random_tiles(random, shape, count, 1.0);
        let pages = pages_of(&tiles);
        Ok((Tiles { shape, tiles }, pages))
    }

    fn sequence(
        &self,
        device: &Arc<dyn Device>,
        request: DecodeRequest,
        seed: u64,
    ) -> Result<Sequence, Error> {
        let mut random = Random(seed);
        let (tiles, mut pages) = self.content(device, &mut random, request.keys.div_ceil(self.tokens))?;
        if let (Some(last), rest @ 1..) = (pages.last_mut(), request.keys % self.tokens) {
            spoil(&self.page(), last, rest);
        }
        let elements = request.rows * self.heads.query_heads() * self.heads.head_dim;
        let mut queries = random.numbers(elements, self.size);
        rounded(self.element, &mut queries);
        Ok(Sequence { request, tiles, pages, queries })
    }

    /// What the CPU gets over some blocks of the sequence.
    fn expected(&self, sequence: &Sequence, blocks: &[usize]) -> Partials {
        let keys = sequence.request.keys;
        let exact = blocks.iter().map(|&block| ExactBlock {
            tile: block as u32,
            first_position: (block * self.tokens) as u64,
            len: self.tokens.min(keys - block * self.tokens) as u32,
        });
        let work = WorkList { exact: exact.collect(), ..WorkList::default() };
        let queries = Queries {
            shape: self.heads,
            first_position: sequence.request.first_position,
            scale: self.scale(),
            data: &sequence.queries,
        };
        let item = AttendItem { queries, kv: &sequence.tiles, work: &work, initial: None };
        let partials = CpuExecutor::serial().attend(&[item]).expect("a call of ours");
        partials.into_iter().next().expect("one item")
    }

    fn expected_of_all(&self, sequence: &Sequence) -> Partials {
        let blocks: Vec<usize> = (0..sequence.request.keys.div_ceil(self.tokens)).collect();
        self.expected(sequence, &blocks)
    }
}

/// What a batch gives: outputs, and partials of every split, sequence by sequence.
struct Found {
    outputs: Vec<Vec<f32>>,
    partials: Vec<Vec<f32>>,
}

/// Runs a batch on the device, each sequence in splits of `split` keys (one where there is none).
fn run(
    device: &Arc<dyn Device>,
    shape: &DecodeShape,
    batch: &[&Sequence],
    split: usize,
) -> Result<Found, Error> {
    let heads = shape.heads.query_heads();
    let pages: Vec<Vec<u8>> = batch.iter().flat_map(|sequence| sequence.pages.clone()).collect();
    let pages = Pages::new(device, &pages)?;
    let queries: Vec<f32> = batch.iter().flat_map(|sequence| sequence.queries.clone()).collect();
    let queries = Buffer::from_slice(device, &queries)?;
    let (mut items, mut sources, mut merges, mut partials, mut outputs) =
        (vec![], vec![], vec![], vec![], vec![]);
    let (mut row, mut page) = (0, 0);
    for sequence in batch {
        let DecodeRequest { keys, rows, first_position } = sequence.request;
        let splits = keys.div_ceil(split).max(1);
        let own = Buffer::from_slice(device, &vec![f32::NAN; splits * rows * heads * shape.width()])?;
        let first_source = sources.len() as u32;
        for number in 0..splits {
            let output = own.address() + (number * rows * heads * shape.width() * 4) as u64;
            sources.push(output);
            items.push(DecodeItem {
                first_position,
                first_key: (number * split) as u64,
                output,
                query: row as u32,
                rows: rows as u32,
                page: (page + number * split / shape.tokens) as u32,
                page_stride: 0,
                keys: split.min(keys - number * split) as u32,
                unused: 0,
            });
        }
        let output = Buffer::from_slice(device, &vec![f32::NAN; rows * heads * shape.heads.head_dim])?;
        let (splits, records) = (splits as u32, (rows * heads) as u32);
        merges.push(MergeItem {
            output: output.address(),
            first_source,
            sources: splits,
            records,
            unused: 0,
        });
        partials.push(own);
        outputs.push(output);
        row += rows;
        page += sequence.pages.len();
    }
    let most_rows = batch.iter().map(|sequence| sequence.request.rows).max().unwrap_or(0);
    let table = Buffer::from_slice(device, &items)?;
    DecodeAttention::new(device, shape.page(), shape.heads.group)?.launch(&DecodeCall {
        queries: queries.whole(),
        pages: pages.table.whole(),
        items: table.whole(),
        count: items.len(),
        most_rows,
        scale: shape.scale(),
    })?;
    let (merge_table, source_table) =
        (Buffer::from_slice(device, &merges)?, Buffer::from_slice(device, &sources)?);
    let merger = PartialMerger::new(device, shape.heads.head_dim, PageElement::F32)?;
    merger.merge_and_finish(merge_table.whole(), source_table.whole(), merges.len(), most_rows * heads)?;
    let read = |buffers: &[Buffer]| buffers.iter().map(Buffer::to_vec::<f32>).collect::<Result<Vec<_>, _>>();
    Ok(Found { outputs: read(&outputs)?, partials: read(&partials)? })
}

/// The largest relative distance from the CPU's output of any sequence of a batch that is split every `split` keys. Infinite when
/// partials are none, or when a sequence alone has other bits than in the batch.
pub(super) fn decode(
    device: &Arc<dyn Device>,
    shape: &DecodeShape,
    requests: &[DecodeRequest],
    split: usize,
) -> Result<f64, Error> {
    let sequences = requests.iter().zip(21..).map(|(&request, seed)| shape.sequence(device, request, seed));
    let sequences = sequences.collect::<Result<Vec<_>, _>>()?;
    let found = run(device, shape, &sequences.iter().collect::<Vec<_>>(), split)?;
    let mut worst = 0.0_f64;
    for (index, sequence) in sequences.iter().enumerate() {
        let wanted = shape.expected_of_all(sequence);
        worst = worst.max(relative(&found.outputs[index], &wanted.finish()));
        worst = worst.max(wrong_partials(shape, sequence, &found.partials[index], split));
    }
    if let Some(last) = sequences.last() {
        let alone = run(device, shape, &[last], split)?;
        let bits = |numbers: Option<&Vec<f32>>| {
            numbers.map(|numbers| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
        };
        if bits(alone.partials.last()) != bits(found.partials.last()) {
            worst = f64::INFINITY;
        }
    }
    Ok(worst)
}

/// How far sums of splits are from the CPU's, as log2 of a sum; infinite where a partial breaks the rules of partials.
fn wrong_partials(shape: &DecodeShape, sequence: &Sequence, found: &[f32], split: usize) -> f64 {
    let DecodeRequest { keys, rows, .. } = sequence.request;
    let heads = shape.heads.query_heads();
    let mut worst = 0.0_f64;
    for (number, records) in found.chunks_exact(rows * heads * shape.width()).enumerate() {
        let Ok(partials) = Partials::from_interleaved(rows, heads, shape.heads.head_dim, records) else {
            return f64::INFINITY;
        };
        let first = number * split / shape.tokens;
        let end = keys.min((number + 1) * split).div_ceil(shape.tokens);
        let wanted = shape.expected(sequence, &(first..end).collect::<Vec<_>>());
        for index in 0..rows * heads {
            let log = |partials: &Partials| {
                let (m, l, _) = partials.row(index / heads, index % heads);
                f64::from(m) + f64::from(l).log2()
            };
            let (found, wanted) = (log(&partials), log(&wanted));
            // The relative error of the sum; of nothing there is none.
            let off = if found == wanted { 0.0 } else { (found - wanted).abs() * std::f64::consts::LN_2 };
            worst = worst.max(if off.is_nan() { f64::INFINITY } else { off });
        }
    }
    worst
}

/// The same where each KV head visits pages of its own, in one split: the newest page and every second or third before it.
pub(super) fn chosen_pages(device: &Arc<dyn Device>, shape: &DecodeShape, keys: usize) -> Result<f64, Error> {
    let sequence = shape.sequence(device, DecodeRequest::step(keys), 31)?;
    let HeadShape { kv_heads, group, head_dim } = shape.heads;
    let blocks = keys.div_ceil(shape.tokens);
    let count = blocks.div_ceil(3);
    let chosen: Vec<Vec<usize>> = (0..kv_heads)
        .map(|head| (0..count).rev().map(|back| blocks - 1 - back * (2 + head % 2)).collect())
        .collect();
    let pages = Pages::new(device, &sequence.pages)?;
    let table: Vec<u64> = chosen.iter().flatten().map(|&block| pages.addresses[block]).collect();
    let table = Buffer::from_slice(device, &table)?;
    let queries = Buffer::from_slice(device, &sequence.queries)?;
    let output = Buffer::from_slice(device, &vec![f32::NAN; kv_heads * group * shape.width()])?;
    let visited = (count - 1) * shape.tokens + (keys - 1) % shape.tokens + 1;
    let first_position = sequence.request.first_position;
    let item = DecodeItem {
        first_position,
        first_key: first_position + 1 - visited as u64,
        output: output.address(),
        query: 0,
        rows: 1,
        page: 0,
        page_stride: count as u32,
        keys: visited as u32,
        unused: 0,
    };
    let items = Buffer::from_slice(device, &[item])?;
    DecodeAttention::new(device, shape.page(), group)?.launch(&DecodeCall {
        queries: queries.whole(),
        pages: table.whole(),
        items: items.whole(),
        count: 1,
        most_rows: 1,
        scale: shape.scale(),
    })?;
    let found = Partials::from_interleaved(1, kv_heads * group, head_dim, &output.to_vec::<f32>()?);
    let Ok(found) = found else { return Ok(f64::INFINITY) };
    let found = found.finish();
    let mut worst = 0.0_f64;
    for (head, blocks) in chosen.iter().enumerate() {
        let wanted = shape.expected(&sequence, blocks).finish();
        let own = head * group * head_dim..(head + 1) * group * head_dim;
        worst = worst.max(relative(&found[own.clone()], &wanted[own]));
    }
    Ok(worst)
}

/// Numbers whose bits differ after partials were merged on the device and here, undivided and divided; some are empty.
pub(super) fn merge(
    device: &Arc<dyn Device>,
    head_dim: usize,
    sources: usize,
    records: usize,
) -> Result<f64, Error> {
    let mut random = Random(41);
    let partials: Vec<Vec<f32>> =
        (0..sources).map(|_| random_records(&mut random, head_dim, records)).collect();
    let (merged, divided) = merged_on_device(device, head_dim, &partials, records)?;
    let mut wanted = Partials::identity(records, 1, head_dim);
    for records_of in &partials {
        let later = Partials::from_interleaved(records, 1, head_dim, records_of).expect("partials of ours");
        wanted.merge(&later).expect("the same shape");
    }
    let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let undivided = super::material::differing(&bits(&merged), &bits(&wanted.to_interleaved()));
    Ok(undivided + super::material::differing(&bits(&divided), &bits(&wanted.finish())))
}

/// The merge of partials of `records` records each, and the same divided.
pub(super) fn merged_on_device(
    device: &Arc<dyn Device>,
    head_dim: usize,
    partials: &[Vec<f32>],
    records: usize,
) -> Result<(Vec<f32>, Vec<f32>), Error> {
    let buffers =
        partials.iter().map(|records| Buffer::from_slice(device, records)).collect::<Result<Vec<_>, _>>()?;
    let addresses: Vec<u64> = buffers.iter().map(Buffer::address).collect();
    let table = Buffer::from_slice(device, &addresses)?;
    let merged = Buffer::from_slice(device, &vec![7.0_f32; records * (2 + head_dim)])?;
    let divided = Buffer::from_slice(device, &vec![7.0_f32; records * head_dim])?;
    let merger = PartialMerger::new(device, head_dim, PageElement::F32)?;
    let launch = |output: &Buffer, divide: bool| {
        let (sources, records) = (partials.len() as u32, records as u32);
        let item = MergeItem { output: output.address(), first_source: 0, sources, records, unused: 0 };
        let items = Buffer::from_slice(device, &[item])?;
        match divide {
            true => merger.merge_and_finish(items.whole(), table.whole(), 1, records as usize),
            false => merger.merge(items.whole(), table.whole(), 1, records as usize),
        }?;
        output.to_vec::<f32>()
    };
    Ok((launch(&merged, false)?, launch(&divided, true)?))
}

/// Records (m, l, o); every fifth is empty, and so are all of record 3.
pub(super) fn random_records(random: &mut Random, head_dim: usize, records: usize) -> Vec<f32> {
    let mut all = Vec::with_capacity(records * (2 + head_dim));
    for record in 0..records {
        if record == 3 || random.below(5) == 0 {
            all.extend([f32::NEG_INFINITY, 0.0]);
            all.extend(vec![0.0; head_dim]);
            continue;
        }
        all.extend([random.number() * 40.0, 1.0 + random.number().abs() * 300.0]);
        all.extend(random.numbers(head_dim, 100.0));
    }
    all
}
