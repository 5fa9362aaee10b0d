//! Attention of prompts over pages, in the shape of a layer of Llama-3-8B: dense and causal, and over lists of blocks, chunk by chunk.

use std::sync::Arc;

use anyhow::{Result, ensure};
use longshore_attention::{ExactBlock, QUERY_TILE, SparseWork, Visit};
use longshore_cuda::{
    Buffer, DenseKeys, Device, KeyLists, PageElement, PageShape, PrefillAttention, PrefillCall,
};

use super::{
    Bench, Spread,
    report::{Beside, Peaks, Point},
};
use crate::console;

const SHAPE: PageShape = PageShape { tokens: 64, kv_heads: 8, head_dim: 128, element: PageElement::Bf16 };
const GROUP: usize = 4;
const HEADS: usize = SHAPE.kv_heads * GROUP;
/// Longer prompts take minutes for one dense sample, since the work grows with their square.
const DENSE_TOKENS_MAX: usize = 1 << 17;
/// Prompts up to this are measured as often as asked for over lists, longer ones once: their chunks are many samples.
const SPARSE_REPEATED_MAX: usize = 1 << 17;
/// Rows of a chunk of a prompt, which visits lists.
const CHUNK: usize = 4096;
/// A list has every so manieth block before its rows: with those that the rows lie in less than 6 % of the pairs of a prompt of 128K.
const EVERY: usize = 18;
/// 1.0 in bf16.
const ONE: u16 = 0x3f80;

/// What is measured of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// All rows over all keys up to themselves.
    Dense,
    /// All rows over lists.
    Sparse,
}

/// Measures each length that the device has room for, by warps (`mma.sync`) or by warp groups (`wgmma`).
pub(super) fn measure(bench: &Bench, peaks: &Peaks, lengths: &[u32], wgmma: bool) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    for kind in [Kind::Dense, Kind::Sparse] {
        for tokens in lengths.iter().map(|&tokens| tokens as usize) {
            if kind == Kind::Dense && tokens > DENSE_TOKENS_MAX {
                continue;
            }
            let needed = tokens.div_ceil(SHAPE.tokens) * SHAPE.bytes() + 2 * row_bytes() * kind.rows(tokens);
            let (free, _) = bench.device.memory()?;
            if needed + (needed >> 4) > free {
                let (needed, free) = (console::bytes(needed as u64), console::bytes(free as u64));
                console::note(format!(
                    "a prompt of {tokens} tokens needs {needed}, {free} are free: left out"
                ));
                continue;
            }
            points.push(point(bench, peaks, (kind, wgmma), tokens)?);
        }
    }
    Ok(points)
}

impl Kind {
    fn rows(self, tokens: usize) -> usize {
        match self {
            Self::Dense => tokens,
            Self::Sparse => tokens.min(CHUNK),
        }
    }
}

/// Bytes of the queries, or of the output, of a position.
fn row_bytes() -> usize {
    HEADS * SHAPE.head_dim * size_of::<f32>()
}

fn point(bench: &Bench, peaks: &Peaks, (kind, wgmma): (Kind, bool), tokens: usize) -> Result<Point> {
    let prompt = Prompt::new(&bench.queue, tokens, kind.rows(tokens), wgmma)?;
    let by = if wgmma { ", by wgmma" } else { "" };
    let all = tokens as f64 * (tokens as f64 + 1.0) / 2.0;
    let (pairs, seconds, name) = match kind {
        Kind::Dense => {
            let seconds = bench.sample(|| prompt.dense())?;
            (all, seconds, format!("dense prefill of {tokens} tokens, bf16 KV{by}"))
        }
        Kind::Sparse => {
            let (pairs, seconds) = sparse(bench, &prompt)?;
            let share = 100.0 * pairs / all;
            (
                pairs,
                seconds,
                format!("prefill of {tokens} tokens over lists of {share:.1} % of the pairs, bf16 KV{by}"),
            )
        }
    };
    ensure!(prompt.is_right()?, "{name} gave a wrong result: its time means nothing");
    // Two products for each pair of a row and a key that it sees.
    let flops = 4.0 * (HEADS * SHAPE.head_dim) as f64 * pairs;
    let point = Point::flops(name, seconds, flops, &peaks.matrix_bf16_tflops);
    Ok(match kind {
        // Other programs, and lists, are compared with what runs by default.
        _ if wgmma => point,
        Kind::Dense => point.beside(Beside::DensePrefill, tokens),
        Kind::Sparse => point.beside(Beside::SparsePrefill, tokens),
    })
}

/// Pairs that the lists of a prompt have, and the seconds of all chunks together, lists going up with each.
fn sparse(bench: &Bench, prompt: &Prompt) -> Result<(f64, Spread)> {
    let repeats = if prompt.tokens > SPARSE_REPEATED_MAX { 1 } else { bench.repeats };
    let (mut pairs, mut samples) = (0.0, vec![0.0; repeats]);
    for first in (0..prompt.tokens).step_by(prompt.rows) {
        let rows = prompt.rows.min(prompt.tokens - first);
        let lists = lists(first, rows);
        pairs += lists.iter().map(|(rows, list)| seen(rows.clone(), list)).sum::<f64>();
        let visits = KeyLists::of_sparse(&work(&lists, first)?, &SHAPE, &prompt.addresses, 0)?;
        let launch = || prompt.sparse(&visits, (first, rows));
        if first == 0 {
            // Compiles.
            bench.timed(1, &launch)?;
        }
        for sample in &mut samples {
            *sample += bench.timed(1, &launch)?;
        }
    }
    Ok((pairs, Spread::of(samples)))
}

/// Positions of a query tile and the blocks that it visits.
type Visited = (std::ops::Range<usize>, Vec<usize>);

/// Lists of some rows: every sixteenth block before a tile, another one in each tile, and the blocks that the tile lies in.
fn lists(first: usize, rows: usize) -> Vec<Visited> {
    let mut lists = Vec::new();
    let (mut at, end) = (first, first + rows);
    while at < end {
        let next = end.min(at / QUERY_TILE * QUERY_TILE + QUERY_TILE);
        let own = at / SHAPE.tokens;
        let mut blocks: Vec<usize> = (at / QUERY_TILE % EVERY..own).step_by(EVERY).collect();
        blocks.extend(own..=(next - 1) / SHAPE.tokens);
        lists.push((at..next, blocks));
        at = next;
    }
    lists
}

/// Pairs of a row and a key of its list that it sees.
fn seen(rows: std::ops::Range<usize>, blocks: &[usize]) -> f64 {
    let of = |row: usize| {
        let keys = |block: &usize| (row + 1).saturating_sub(block * SHAPE.tokens).min(SHAPE.tokens);
        blocks.iter().map(keys).sum::<usize>() as f64
    };
    rows.map(of).sum()
}

fn work(lists: &[Visited], first: usize) -> Result<SparseWork> {
    let visit = |rows: &std::ops::Range<usize>, block: usize| {
        let first_position = block * SHAPE.tokens;
        let len = SHAPE.tokens.min(rows.end - first_position) as u32;
        Visit::Block(ExactBlock { tile: block as u32, first_position: first_position as u64, len })
    };
    let of_head = lists.iter().map(|(rows, blocks)| {
        let mut visits: Vec<Visit> = blocks.iter().map(|&block| visit(rows, block)).collect();
        visits.push(Visit::EndOfStripe);
        (visits, Vec::new())
    });
    let of_head: Vec<_> = of_head.collect();
    let ends = lists.iter().map(|(rows, _)| (rows.end - first) as u32).collect();
    let all = std::iter::repeat_n(of_head, SHAPE.kv_heads).flatten().collect();
    Ok(SparseWork::new(SHAPE.kv_heads, ends, all)?)
}

/// Everything on the device for the last rows of one prompt.
struct Prompt {
    attention: PrefillAttention,
    queries: Buffer,
    _slab: Buffer,
    addresses: Vec<u64>,
    table: Buffer,
    output: Buffer,
    tokens: usize,
    rows: usize,
}

impl Prompt {
    /// Keys of zeros and values of ones, so that every output is 1.
    fn new(device: &Arc<dyn Device>, tokens: usize, rows: usize, wgmma: bool) -> Result<Self> {
        let side = SHAPE.tokens * SHAPE.head_dim;
        let page: Vec<u16> = [vec![0; side], vec![ONE; side]].concat().repeat(SHAPE.kv_heads);
        let pages = tokens.div_ceil(SHAPE.tokens);
        let slab = Buffer::new(device, pages * SHAPE.bytes())?;
        for index in 0..pages {
            slab.span(index * SHAPE.bytes(), SHAPE.bytes())?.write(&page)?;
        }
        let addresses: Vec<u64> =
            (0..pages).map(|index| slab.address() + (index * SHAPE.bytes()) as u64).collect();
        let row: Vec<f32> =
            (0..HEADS * SHAPE.head_dim).map(|index| (index % 17) as f32 / 17.0 - 0.5).collect();
        let queries = Buffer::new(device, rows * row_bytes())?;
        for index in 0..rows {
            queries.span(index * row_bytes(), row_bytes())?.write(&row)?;
        }
        Ok(Self {
            attention: PrefillAttention::new(device, &SHAPE, GROUP)?.with_wgmma(wgmma),
            queries,
            _slab: slab,
            table: Buffer::from_slice(device, &addresses)?,
            addresses,
            output: Buffer::new(device, rows * row_bytes())?,
            tokens,
            rows,
        })
    }

    fn call(&self, (first, rows): (usize, usize)) -> PrefillCall<'_> {
        PrefillCall {
            queries: self.queries.whole(),
            rows,
            first_position: first as u64,
            scale: 1.0 / (SHAPE.head_dim as f32).sqrt(),
            pages: self.table.whole(),
            means: None,
            earlier: None,
            output: self.output.whole(),
            divide: true,
            skip_below: None,
        }
    }

    fn dense(&self) -> Result<()> {
        let keys = DenseKeys { first_position: 0, count: self.tokens as u64 };
        Ok(self.attention.dense(&self.call((0, self.tokens)), keys)?)
    }

    /// Some rows of the prompt, which are alike.
    fn sparse(&self, lists: &KeyLists, rows: (usize, usize)) -> Result<()> {
        Ok(self.attention.lists(&self.call(rows), lists)?)
    }

    fn is_right(&self) -> Result<bool> {
        Ok(self.output.to_vec::<f32>()?.iter().all(|&output| (output - 1.0).abs() < 1e-3))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_less_than_six_in_a_hundred_pairs_and_every_row_its_own() {
        let (first, rows) = (100_000, 4096);
        let lists = lists(first, rows);
        assert_eq!((lists[0].0.start, lists.last().unwrap().0.end), (first, first + rows));
        for (rows, blocks) in &lists {
            assert!(blocks.is_sorted_by(|a, b| a < b), "{rows:?}: {blocks:?}");
            assert!(rows.clone().all(|row| blocks.contains(&(row / SHAPE.tokens))), "{rows:?}");
        }
        let pairs = |first, rows| {
            super::lists(first, rows).iter().map(|(rows, list)| seen(rows.clone(), list)).sum::<f64>()
        };
        let tokens = 1 << 17;
        let all: f64 = (0..tokens).step_by(CHUNK).map(|first| pairs(first, CHUNK)).sum();
        let share = all / (tokens as f64 * (tokens as f64 + 1.0) / 2.0);
        assert!((0.055..0.06).contains(&share), "{share}");
        let work = work(&lists, first).unwrap();
        let last = work.rows(work.tiles() - 1);
        assert_eq!((work.kv_heads(), work.tiles(), last.end), (SHAPE.kv_heads, lists.len(), rows));
        assert_eq!(seen(0..3, &[0]), 6.0);
    }
}
