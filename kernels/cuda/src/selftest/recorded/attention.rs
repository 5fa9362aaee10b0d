//! Tiles of numbers, their pages, checksums and means; attention of many rows over them, partials of one row block by block, and their
//! merge.

use std::sync::Arc;

use longshore_attention::{
    AttendItem, CpuExecutor, ExactBlock, Executor, HeadShape, KvDtype, Mean, Partials, Queries, Tile,
    TileShape, Tiles, WorkList,
};

use super::Twin;
use super::file::Arrays;
use crate::selftest::executor::{distance, refused};
use crate::selftest::material::{Pages, Random, differing, pages_of, rounded};
use crate::selftest::tile::crc32c;
use crate::{
    Buffer, Checksums, CudaExecutor, Device, Error, MeanBuilder, MeanOutputs, PageElement, PageQuantiser,
    PageShape, PageTranscoder,
};

const HEADS: HeadShape = HeadShape { kv_heads: 2, group: 2, head_dim: 64 };
const TOKENS: usize = 16;
const BLOCKS: usize = 3;
/// Rows of the prompt: as packed rows of a KV head more than go to the decode kernel.
const ROWS: usize = 18;
/// Elements of the keys of a token, and of a query row.
const WIDTH: usize = HEADS.kv_heads * HEADS.head_dim;
const ROW: usize = WIDTH * HEADS.group;
/// Bytes of the device for copies of tiles.
const PAGE_BYTES: usize = 1 << 22;

/// With KV of a type.
pub(super) struct Attention(pub(super) KvDtype);

/// What is computed, by whichever executor.
struct Computed {
    prefill: Partials,
    /// Of the last row over each block alone.
    decode: Vec<Partials>,
}

impl Attention {
    fn shape(&self) -> TileShape {
        shape_of(self.0)
    }

    fn tiles(&self, inputs: &Arrays) -> Result<Vec<Tile>, Error> {
        tiles_of(inputs, self.shape())
    }

    /// Means of tiles and their spreads and cosines, `[kv_heads][blocks][…]`, as the kernel puts them.
    fn means(tiles: &[Tile]) -> [Vec<f32>; 4] {
        let means: Vec<Mean> = tiles.iter().map(Mean::of).collect();
        let by_head = |part: fn(&Mean) -> &[f32], size: usize| {
            let heads = 0..HEADS.kv_heads;
            let of = |head: usize| means.iter().flat_map(move |mean| &part(mean)[head * size..][..size]);
            heads.flat_map(of).copied().collect()
        };
        let dim = HEADS.head_dim;
        [
            by_head(Mean::key, dim),
            by_head(Mean::value, dim),
            by_head(Mean::spread, dim),
            by_head(Mean::cosines, 1),
        ]
    }

    fn compute(&self, executor: &dyn Executor, tiles: Vec<Tile>, queries: &[f32]) -> Result<Computed, Error> {
        let kv = Tiles { shape: self.shape(), tiles };
        let blocks: Vec<ExactBlock> = (0..BLOCKS).map(block).collect();
        let works = std::iter::once(&blocks[..]).chain(blocks.chunks(1));
        let works: Vec<WorkList> =
            works.map(|exact| WorkList { exact: exact.to_vec(), ..WorkList::default() }).collect();
        let items = works.iter().enumerate().map(|(index, work)| {
            let rows = if index == 0 { ROWS } else { 1 };
            let data = &queries[queries.len() - rows * ROW..];
            let first_position = (BLOCKS * TOKENS - rows) as u64;
            let queries = Queries { shape: HEADS, first_position, scale: 0.125, data };
            AttendItem { queries, kv: &kv, work, initial: None }
        });
        let mut all = executor.attend(&items.collect::<Vec<_>>()).map_err(refused)?.into_iter();
        let prefill = all.next().expect("a partial for each item");
        Ok(Computed { prefill, decode: all.collect() })
    }

    /// Pages, int8 pages of the same numbers, checksums and means of the device that are not the CPU's, by bytes.
    fn wrong_bytes(&self, device: &Arc<dyn Device>, inputs: &Arrays, results: &Arrays) -> Result<f64, Error> {
        let tiles = self.recorded_tiles(results)?;
        let (shape, bytes) = (PageShape::of(self.shape())?, self.shape().bytes());
        let bodies: Vec<Vec<u8>> = tiles.iter().map(|tile| tile.as_bytes().to_vec()).collect();
        let (travelling, pages) = (Pages::new(device, &bodies)?, Pages::empty(device, BLOCKS, bytes)?);
        PageTranscoder::new(device, shape)?.to_rows(travelling.table.whole(), pages.table.whole(), BLOCKS)?;
        let wanted = pages_of(&tiles).concat();
        let mut wrong = differing(&pages.bodies()?.concat(), &wanted);
        for (pages, name) in [(&travelling, "tile_checksums"), (&pages, "page_checksums")] {
            let sums = Buffer::from_slice(device, &[0_u32; BLOCKS])?;
            Checksums::new(device, bytes)?.launch(pages.table.whole(), sums.whole(), BLOCKS)?;
            wrong += differing(&sums.to_vec::<u32>()?, &results.get(name)?);
        }
        if self.0 == KvDtype::Int8 {
            let floats = Pages::new(device, &pages_of(&tiles_of(inputs, shape_of(KvDtype::F32))?))?;
            let narrow = Pages::empty(device, BLOCKS, bytes)?;
            PageQuantiser::new(device, PageShape::of(shape_of(KvDtype::F32))?, PageElement::Int8)?.launch(
                floats.table.whole(),
                narrow.table.whole(),
                BLOCKS,
            )?;
            wrong += differing(&narrow.bodies()?.concat(), &wanted);
        }
        Ok(wrong + wrong_means(device, shape, &pages, results)?)
    }

    fn recorded_tiles(&self, results: &Arrays) -> Result<Vec<Tile>, Error> {
        let bytes = results.get::<u8>("tiles")?;
        let tile = |body| Tile::from_bytes(self.shape(), body).map_err(refused);
        bytes.chunks(self.shape().bytes()).map(tile).collect()
    }
}

/// Elements of summaries of the device whose bits are not the CPU's.
fn wrong_means(
    device: &Arc<dyn Device>,
    shape: PageShape,
    pages: &Pages,
    results: &Arrays,
) -> Result<f64, Error> {
    let room = |elements: usize| Buffer::from_slice(device, &vec![7.0_f32; elements]);
    let elements = BLOCKS * WIDTH;
    let found = [room(elements)?, room(elements)?, room(elements)?, room(BLOCKS * HEADS.kv_heads)?];
    let [key, value, spread, cosines] = found.each_ref().map(|buffer| Some(buffer.whole()));
    let outputs = MeanOutputs { key, value, spread, cosines, ..MeanOutputs::default() };
    let builder = MeanBuilder::new(device, shape, PageElement::F32)?;
    builder.launch(pages.table.whole(), BLOCKS, 0, BLOCKS, &outputs)?;
    let mut wrong = 0.0;
    for (found, name) in found.iter().zip(MEANS) {
        // Compared as words: bits.
        wrong += differing(&found.to_vec::<u32>()?, &results.get(name)?);
    }
    Ok(wrong)
}

const MEANS: [&str; 4] = ["mean_keys", "mean_values", "spreads", "cosines"];

fn shape_of(dtype: KvDtype) -> TileShape {
    TileShape { block_tokens: TOKENS, kv_heads: HEADS.kv_heads, head_dim: HEADS.head_dim, dtype }
}

fn tiles_of(inputs: &Arrays, shape: TileShape) -> Result<Vec<Tile>, Error> {
    let (keys, values) = (inputs.get::<f32>("keys")?, inputs.get::<f32>("values")?);
    let tile = |(keys, values): (&[f32], &[f32])| {
        let mut tile = Tile::zeroed(shape);
        tile.write(0, keys, values).map_err(refused)?;
        Ok(tile)
    };
    keys.chunks(TOKENS * WIDTH).zip(values.chunks(TOKENS * WIDTH)).map(tile).collect()
}

fn block(index: usize) -> ExactBlock {
    ExactBlock { tile: index as u32, first_position: (index * TOKENS) as u64, len: TOKENS as u32 }
}

fn merged(partials: &[Partials]) -> Result<Partials, Error> {
    let mut merged = Partials::identity(1, HEADS.query_heads(), HEADS.head_dim);
    partials.iter().try_for_each(|partial| merged.merge(partial).map_err(refused))?;
    Ok(merged)
}

impl Twin for Attention {
    fn inputs(&self) -> Result<Arrays, Error> {
        let mut random = Random(71);
        let numbers = BLOCKS * TOKENS * WIDTH;
        let mut queries = random.numbers(ROWS * ROW, 3.0);
        rounded(self.0.into(), &mut queries);
        Ok(Arrays::default()
            .with("queries", &queries)
            .with("keys", &random.numbers(numbers, 1.0))
            .with("values", &random.numbers(numbers, 1.0)))
    }

    fn on_cpu(&self, inputs: &Arrays) -> Result<Arrays, Error> {
        let tiles = self.tiles(inputs)?;
        let sums = |bodies: Vec<&[u8]>| bodies.into_iter().map(crc32c).collect::<Vec<u32>>();
        let bodies: Vec<u8> = tiles.iter().flat_map(Tile::as_bytes).copied().collect();
        let pages = pages_of(&tiles);
        let mut results = Arrays::default()
            .with("tiles", &bodies)
            .with("tile_checksums", &sums(tiles.iter().map(Tile::as_bytes).collect()))
            .with("page_checksums", &sums(pages.iter().map(Vec::as_slice).collect()));
        for (name, numbers) in MEANS.into_iter().zip(Self::means(&tiles)) {
            results = results.with(name, &numbers);
        }
        let Computed { prefill, decode } =
            self.compute(&CpuExecutor::serial(), tiles, &inputs.get::<f32>("queries")?)?;
        let partials: Vec<f32> = decode.iter().flat_map(Partials::to_interleaved).collect();
        Ok(results
            .with("prefill", &prefill.to_interleaved())
            .with("decode_partials", &partials)
            .with("decode", &merged(&decode)?.finish()))
    }

    fn on_device(&self, device: &Arc<dyn Device>, inputs: &Arrays, results: &Arrays) -> Result<f64, Error> {
        if self.wrong_bytes(device, inputs, results)? > 0.0 {
            return Ok(f64::INFINITY);
        }
        let executor = CudaExecutor::new(Arc::clone(device), CpuExecutor::serial(), PAGE_BYTES);
        let tiles = self.recorded_tiles(results)?;
        let Computed { prefill, decode } = self.compute(&executor, tiles, &inputs.get::<f32>("queries")?)?;
        let (heads, dim) = (HEADS.query_heads(), HEADS.head_dim);
        let partials =
            |rows, numbers: &[f32]| Partials::from_interleaved(rows, heads, dim, numbers).map_err(refused);
        let wanted = partials(ROWS, &results.get::<f32>("prefill")?)?;
        let wanted_decode = results.get::<f32>("decode_partials")?;
        let wanted_decode = wanted_decode
            .chunks(heads * (2 + dim))
            .map(|of| partials(1, of))
            .collect::<Result<Vec<_>, _>>()?;
        let merged = crate::selftest::material::relative(&merged(&decode)?.finish(), &results.get("decode")?);
        Ok(distance(&[prefill], &[wanted]).max(distance(&decode, &wanted_decode)).max(merged))
    }

    fn limit(&self) -> f64 {
        match self.0 {
            KvDtype::F32 => 1e-5,
            KvDtype::F16 => 2e-3,
            KvDtype::Bf16 | KvDtype::Int8 => 8e-3,
        }
    }
}
