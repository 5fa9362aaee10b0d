//! Pages, their ways, checksums and summaries, against the CPU.

use std::sync::Arc;

use longshore_attention::{KvDtype, Mean, Tile, TileShape};

use super::material::{Pages, Random, differing, e4m3, pages_of, random_tiles, relative};
use crate::{
    Buffer, Checksums, Device, Error, MeanBuilder, MeanOutputs, PageElement, PageQuantiser, PageShape,
    PageTranscoder,
};

/// Bytes that differ after tiles became pages on the device, and tiles again.
pub(super) fn transcode(device: &Arc<dyn Device>, shape: TileShape) -> Result<f64, Error> {
    let tiles = random_tiles(&mut Random(11), shape, 3, 2.0);
    let bodies: Vec<Vec<u8>> = tiles.iter().map(|tile| tile.as_bytes().to_vec()).collect();
    let transcoder = PageTranscoder::new(device, PageShape::of(shape)?)?;
    let travelling = Pages::new(device, &bodies)?;
    let pages = Pages::empty(device, 3, shape.bytes())?;
    let back = Pages::empty(device, 3, shape.bytes())?;
    transcoder.to_rows(travelling.table.whole(), pages.table.whole(), 3)?;
    transcoder.to_panels(pages.table.whole(), back.table.whole(), 3)?;
    let wrong = differing(&pages.bodies()?.concat(), &pages_of(&tiles).concat());
    Ok(wrong + differing(&back.bodies()?.concat(), &bodies.concat()))
}

/// A tile with what rounding finds hard in its first tokens.
fn difficult(shape: TileShape) -> Vec<Tile> {
    let mut random = Random(12);
    let mut tiles = random_tiles(&mut random, shape, 2, 3.0);
    let row = shape.kv_heads * shape.head_dim;
    let hard = [
        vec![0.0; row],
        vec![f32::NAN; row],
        vec![f32::INFINITY; row],
        (0..row).map(|i| if i % 2 == 0 { f32::NEG_INFINITY } else { 1.0 }).collect(),
        vec![1e-42; row],
        (0..row).map(|i| (i % 255) as f32 - 127.0 + 0.5).collect(),
        random.numbers(row, 6e4),
        random.numbers(row, 1e-4),
    ];
    for (token, keys) in hard.iter().enumerate() {
        let values: Vec<f32> = keys.iter().map(|x| -x).collect();
        tiles[0].write(token, keys, &values).expect("a token of the tile");
    }
    tiles
}

/// Bytes of int8 pages that differ from what the CPU writes.
pub(super) fn quantise_int8(device: &Arc<dyn Device>, shape: TileShape) -> Result<f64, Error> {
    let tiles = difficult(shape);
    let wanted: Vec<Tile> = tiles
        .iter()
        .map(|tile| {
            let mut narrow = Tile::zeroed(TileShape { dtype: KvDtype::Int8, ..shape });
            for token in 0..shape.block_tokens {
                let (keys, values) = tile.read(token).expect("a token of the tile");
                narrow.write(token, &keys, &values).expect("a token of the tile");
            }
            narrow
        })
        .collect();
    let quantiser = PageQuantiser::new(device, PageShape::of(shape)?, PageElement::Int8)?;
    let from = Pages::new(device, &pages_of(&tiles))?;
    let to = Pages::empty(device, tiles.len(), quantiser.shape().bytes())?;
    quantiser.launch(from.table.whole(), to.table.whole(), tiles.len())?;
    Ok(differing(&to.bodies()?.concat(), &pages_of(&wanted).concat()))
}

/// Elements of E4M3 pages further from the source than half a step, and scales that are wrong.
pub(super) fn quantise_e4m3(device: &Arc<dyn Device>, shape: TileShape) -> Result<f64, Error> {
    let tiles = random_tiles(&mut Random(13), shape, 2, 3.0);
    let quantiser = PageQuantiser::new(device, PageShape::of(shape)?, PageElement::E4m3)?;
    let (from, to) = (pages_of(&tiles), Pages::empty(device, 2, quantiser.shape().bytes())?);
    let sources = Pages::new(device, &from)?;
    quantiser.launch(sources.table.whole(), to.table.whole(), 2)?;
    let page = quantiser.shape();
    let mut wrong = 0.0;
    for (tile, body) in tiles.iter().zip(to.bodies()?) {
        for token in 0..shape.block_tokens {
            let (keys, values) = tile.read(token).expect("a token of the tile");
            for (side, numbers) in [keys, values].iter().enumerate() {
                for (head, numbers) in numbers.chunks_exact(shape.head_dim).enumerate() {
                    let own = &body[head * page.head_bytes()..][..page.head_bytes()];
                    wrong += f64::from(wrong_e4m3(&page, own, side * page.tokens + token, numbers));
                }
            }
        }
    }
    Ok(wrong)
}

/// Elements of a row (of K and V together) that are not the nearest.
fn wrong_e4m3(page: &PageShape, head: &[u8], row: usize, numbers: &[f32]) -> u32 {
    let scale = &head[2 * page.side_bytes() + 4 * row..][..4];
    let scale = f32::from_le_bytes(scale.try_into().expect("4 bytes"));
    let largest = numbers.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    let stored = &head[row * page.head_dim..][..page.head_dim];
    let nearest = |x: f32| {
        let steps = x / scale;
        (0..=0xfe_u8)
            .filter(|bits| bits & 0x7f != 0x7f)
            .min_by(|&a, &b| {
                let off = |bits| (f64::from(e4m3(bits)) - f64::from(steps)).abs();
                // Of two as near, the even one.
                off(a).total_cmp(&off(b)).then((a & 1).cmp(&(b & 1)))
            })
            .map(e4m3)
    };
    let wrong = stored.iter().zip(numbers).filter(|&(&bits, &x)| nearest(x) != Some(e4m3(bits)));
    wrong.count() as u32 + u32::from(scale != largest / 448.0)
}

/// Checksums that differ from those bit by bit.
pub(super) fn checksum(device: &Arc<dyn Device>, bytes: usize) -> Result<f64, Error> {
    let mut random = Random(bytes as u64);
    let bodies: Vec<Vec<u8>> = (0..4).map(|_| (0..bytes).map(|_| random.next() as u8).collect()).collect();
    let tiles = Pages::new(device, &bodies)?;
    let checksums = Buffer::from_slice(device, &[0_u32; 4])?;
    Checksums::new(device, bytes)?.launch(tiles.table.whole(), checksums.whole(), 4)?;
    let wanted: Vec<u32> = bodies.iter().map(|body| crc32c(body)).collect();
    Ok(differing(&checksums.to_vec::<u32>()?, &wanted))
}

/// CRC-32C, bit by bit.
pub(super) fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), |crc, _| step(crc)))
}

/// Means, spreads and cosines whose bits are not the CPU's, and bounds that are not the least and the largest.
pub(super) fn means(device: &Arc<dyn Device>, shape: TileShape) -> Result<f64, Error> {
    const CAPACITY: usize = 5;
    const FIRST: usize = 1;
    let tiles = random_tiles(&mut Random(14), shape, 3, 2.0);
    let pages = Pages::new(device, &pages_of(&tiles))?;
    let builder = MeanBuilder::new(device, PageShape::of(shape)?, PageElement::F32)?;
    let (heads, dim) = (shape.kv_heads, shape.head_dim);
    let room = || Buffer::from_slice(device, &vec![7.0_f32; heads * CAPACITY * dim]);
    let (key, value, spread, least, most) = (room()?, room()?, room()?, room()?, room()?);
    let cosines = Buffer::from_slice(device, &vec![7.0_f32; heads * CAPACITY])?;
    let outputs = MeanOutputs {
        key: Some(key.whole()),
        value: Some(value.whole()),
        spread: Some(spread.whole()),
        cosines: Some(cosines.whole()),
        key_least: Some(least.whole()),
        key_most: Some(most.whole()),
        ..MeanOutputs::default()
    };
    builder.launch(pages.table.whole(), tiles.len(), FIRST, CAPACITY, &outputs)?;
    let blank = || vec![7.0; heads * CAPACITY * dim];
    let mut wanted = [blank(), blank(), blank(), blank(), blank(), vec![7.0; heads * CAPACITY]];
    for (block, tile) in tiles.iter().enumerate() {
        let mean = Mean::of(tile);
        let (lower, upper) = bounds(tile);
        for head in 0..heads {
            let place = head * CAPACITY + FIRST + block;
            for (to, from) in wanted.iter_mut().zip([mean.key(), mean.value(), mean.spread(), &lower, &upper])
            {
                to[place * dim..][..dim].copy_from_slice(&from[head * dim..][..dim]);
            }
            wanted[5][place] = mean.cosines()[head];
        }
    }
    let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let mut wrong = 0.0;
    for (found, wanted) in [&key, &value, &spread, &least, &most, &cosines].into_iter().zip(&wanted) {
        wrong += differing(&bits(&found.to_vec::<f32>()?), &bits(wanted));
    }
    Ok(wrong)
}

/// Least and largest of each element of the keys of a tile.
fn bounds(tile: &Tile) -> (Vec<f32>, Vec<f32>) {
    let elements = tile.shape().kv_heads * tile.shape().head_dim;
    let (mut least, mut most) = (vec![f32::INFINITY; elements], vec![f32::NEG_INFINITY; elements]);
    for token in 0..tile.shape().block_tokens {
        let (keys, _) = tile.read(token).expect("a token of the tile");
        for ((least, most), x) in least.iter_mut().zip(&mut most).zip(keys) {
            (*least, *most) = (least.min(x), most.max(x));
        }
    }
    (least, most)
}

/// How far rounded means lie from the means.
pub(super) fn rounded_means(
    device: &Arc<dyn Device>,
    shape: TileShape,
    element: PageElement,
) -> Result<f64, Error> {
    let tiles = random_tiles(&mut Random(15), shape, 2, 2.0);
    let pages = Pages::new(device, &pages_of(&tiles))?;
    let elements = shape.kv_heads * tiles.len() * shape.head_dim;
    let (key, value) = (Buffer::new(device, 2 * elements)?, Buffer::new(device, 2 * elements)?);
    let outputs = MeanOutputs {
        key_rounded: Some(key.whole()),
        value_rounded: Some(value.whole()),
        ..MeanOutputs::default()
    };
    let builder = MeanBuilder::new(device, PageShape::of(shape)?, element)?;
    builder.launch(pages.table.whole(), tiles.len(), 0, tiles.len(), &outputs)?;
    let widen = |buffer: &Buffer| -> Result<Vec<f32>, Error> {
        let narrow = buffer.to_vec::<u16>()?;
        Ok(narrow
            .iter()
            .map(|&bits| match element {
                PageElement::Bf16 => half::bf16::from_bits(bits).to_f32(),
                _ => half::f16::from_bits(bits).to_f32(),
            })
            .collect())
    };
    let all: Vec<Mean> = tiles.iter().map(Mean::of).collect();
    let wanted = |part: fn(&Mean) -> &[f32]| -> Vec<f32> {
        (0..shape.kv_heads)
            .flat_map(|head| {
                all.iter().flat_map(move |mean| &part(mean)[head * shape.head_dim..][..shape.head_dim])
            })
            .copied()
            .collect()
    };
    Ok(relative(&widen(&key)?, &wanted(Mean::key)).max(relative(&widen(&value)?, &wanted(Mean::value))))
}
