//! Attention of one decode step over pages, in the shape of a layer of Llama-3-8B.

use std::sync::Arc;

use anyhow::{Result, ensure};
use longshore_cuda::{
    Buffer, DecodeAttention, DecodeCall, DecodeItem, Device, PageElement, PageShape, split_keys,
};

use super::{
    Bench,
    report::{Beside, Peaks, Point},
};
use crate::console;

const KV_HEADS: usize = 8;
const GROUP: usize = 4;
const HEAD_DIM: usize = 128;
const PAGE_TOKENS: usize = 64;

/// Measures each element type at each length that the device has room for.
pub(super) fn measure(bench: &Bench, peaks: &Peaks, lengths: &[u32]) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    for element in [PageElement::Bf16, PageElement::Int8] {
        for &keys in lengths {
            let step = Step::shape(element);
            let (needed, (free, _)) =
                (step.bytes() * (keys as usize).div_ceil(PAGE_TOKENS), bench.device.memory()?);
            if needed + (needed >> 4) > free {
                let (needed, free) = (console::bytes(needed as u64), console::bytes(free as u64));
                console::note(format!(
                    "decode of {keys} keys in {element:?} needs {needed}, {free} are free: left out"
                ));
                continue;
            }
            points.push(point(bench, peaks, element, u64::from(keys))?);
        }
    }
    Ok(points)
}

fn point(bench: &Bench, peaks: &Peaks, element: PageElement, keys: u64) -> Result<Point> {
    let step = Step::new(&bench.queue, element, keys)?;
    let seconds = bench.sample(|| step.launch())?;
    ensure!(
        step.is_finite()?,
        "decode attention over {keys} keys gave what is no number: its time means nothing"
    );
    // K and V of every key once, with their scales.
    let bytes = Step::shape(element).bytes() as f64 / PAGE_TOKENS as f64 * keys as f64;
    let name = match element {
        PageElement::Bf16 => "bf16",
        _ => "int8",
    };
    let point = Point::bytes(format!("decode {keys} keys, {name} KV"), seconds, bytes, &peaks.copy_gbps);
    Ok(match element {
        PageElement::Bf16 => point.beside(Beside::Decode, keys as usize),
        _ => point,
    })
}

/// Everything on the device for one step.
struct Step {
    attention: DecodeAttention,
    queries: Buffer,
    _slab: Buffer,
    table: Buffer,
    items: Buffer,
    output: Buffer,
    count: usize,
}

impl Step {
    fn shape(element: PageElement) -> PageShape {
        PageShape { tokens: PAGE_TOKENS, kv_heads: KV_HEADS, head_dim: HEAD_DIM, element }
    }

    /// One sequence of `keys` keys, split as the length says; its pages lie in one slab and hold small numbers.
    fn new(device: &Arc<dyn Device>, element: PageElement, keys: u64) -> Result<Self> {
        let shape = Self::shape(element);
        let pages = keys.div_ceil(PAGE_TOKENS as u64);
        let slab = Buffer::new(device, pages as usize * shape.bytes())?;
        let page = vec![0_u8; shape.bytes()];
        for index in 0..pages {
            slab.span(index as usize * shape.bytes(), shape.bytes())?.write(&page)?;
        }
        let addresses: Vec<u64> =
            (0..pages).map(|index| slab.address() + index * shape.bytes() as u64).collect();
        let split = split_keys(keys);
        let partial = (KV_HEADS * GROUP * (2 + HEAD_DIM) * size_of::<f32>()) as u64;
        let output = Buffer::new(device, (keys.div_ceil(split) * partial) as usize)?;
        let item = |index: u64| DecodeItem {
            first_position: keys,
            first_key: index * split,
            output: output.address() + index * partial,
            query: 0,
            rows: 1,
            page: (index * split / PAGE_TOKENS as u64) as u32,
            page_stride: 0,
            keys: split.min(keys - index * split) as u32,
            unused: 0,
        };
        let items: Vec<DecodeItem> = (0..keys.div_ceil(split)).map(item).collect();
        let queries: Vec<f32> =
            (0..KV_HEADS * GROUP * HEAD_DIM).map(|index| (index % 17) as f32 / 17.0 - 0.5).collect();
        Ok(Self {
            attention: DecodeAttention::new(device, shape, GROUP)?,
            queries: Buffer::from_slice(device, &queries)?,
            _slab: slab,
            table: Buffer::from_slice(device, &addresses)?,
            items: Buffer::from_slice(device, &items)?,
            output,
            count: items.len(),
        })
    }

    fn launch(&self) -> Result<()> {
        Ok(self.attention.launch(&DecodeCall {
            queries: self.queries.whole(),
            pages: self.table.whole(),
            items: self.items.whole(),
            count: self.count,
            most_rows: 1,
            scale: 1.0 / (HEAD_DIM as f32).sqrt(),
        })?)
    }

    /// Whether every partial is there: with keys of zeros each sum is the number of its keys.
    fn is_finite(&self) -> Result<bool> {
        let partials: Vec<f32> = self.output.to_vec()?;
        Ok(partials.chunks_exact(2 + HEAD_DIM).all(|p| p[0].is_finite() && p[1] >= 1.0 && p[1].is_finite()))
    }
}
