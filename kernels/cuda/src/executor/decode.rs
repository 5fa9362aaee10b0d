//! Few rows of several sequences over blocks that follow each other: one launch, keys split over the device.

use std::sync::Arc;

use longshore_attention::{AttendItem, ExactBlock, HeadShape, Partials};

use super::pages::TilePages;
use super::{read_partials, start};
use crate::{
    Buffer, DecodeAttention, DecodeCall, DecodeItem, Device, Error, MergeItem, PageElement, PartialMerger,
    Pinned, split_keys,
};

/// Items of one shape of tiles and heads, with one scale.
pub(super) struct DecodeBatch<'a> {
    device: &'a Arc<dyn Device>,
    pages: &'a TilePages,
    items: &'a [&'a AttendItem<'a>],
    heads: HeadShape,
    kernel: DecodeAttention,
    merger: PartialMerger,
}

/// Blocks of an item that one launch visits.
struct Turn<'a> {
    item: usize,
    blocks: &'a [ExactBlock],
    pinned: Pinned<'a>,
}

impl<'a> DecodeBatch<'a> {
    pub(super) fn new(
        device: &'a Arc<dyn Device>,
        pages: &'a TilePages,
        items: &'a [&'a AttendItem<'a>],
    ) -> Result<Self, Error> {
        let heads = items[0].queries.shape;
        let kernel = DecodeAttention::new(device, pages.shape(), heads.group)?;
        let merger = PartialMerger::new(device, heads.head_dim, PageElement::F32)?;
        Ok(Self { device, pages, items, heads, kernel, merger })
    }

    /// One partial per item. What does not fit the pages at once is done in turns, each folded onto the one before.
    pub(super) fn run(&self) -> Result<Vec<Partials>, Error> {
        let mut partials: Vec<Partials> =
            self.items.iter().map(|item| start(&item.queries, item.initial)).collect();
        let mut rest: Vec<&[ExactBlock]> = self.items.iter().map(|item| &item.work.exact[..]).collect();
        while rest.iter().any(|blocks| !blocks.is_empty()) {
            let turns = self.turns(&mut rest)?;
            self.launch(&turns, &mut partials)?;
        }
        Ok(partials)
    }

    /// Pins pages for as many blocks as there is room for; takes them off `rest`.
    fn turns(&self, rest: &mut [&'a [ExactBlock]]) -> Result<Vec<Turn<'a>>, Error> {
        let mut turns: Vec<Turn<'a>> = Vec::new();
        for (item, blocks) in rest.iter_mut().enumerate().filter(|(_, blocks)| !blocks.is_empty()) {
            let kv = self.items[item].kv;
            let tiles: Vec<_> = blocks.iter().map(|block| kv.tile(block.tile as usize)).collect();
            let pinned = match self.pages.pin(&tiles) {
                Ok(pinned) => pinned,
                // The next turn has the pages of this one.
                Err(Error::OutOfMemory { .. }) if !turns.is_empty() => break,
                Err(error) => return Err(error),
            };
            let (now, later) = blocks.split_at(pinned.len());
            *blocks = later;
            let short = !later.is_empty();
            turns.push(Turn { item, blocks: now, pinned });
            if short {
                break;
            }
        }
        Ok(turns)
    }

    fn launch(&self, turns: &[Turn<'_>], partials: &mut [Partials]) -> Result<(), Error> {
        let (record, heads) = (2 + self.heads.head_dim, self.heads.query_heads());
        let mut batch = Batch::default();
        for turn in turns {
            self.add(turn, &mut batch);
        }
        let queries = Buffer::from_slice(self.device, &batch.queries)?;
        let pages = Buffer::from_slice(self.device, &batch.pages)?;
        let bytes = |rows: usize| rows * heads * record * size_of::<f32>();
        let parts = Buffer::new(self.device, bytes(batch.part_rows))?;
        for (item, row) in batch.items.iter_mut().zip(&batch.part_of) {
            item.output = parts.address() + bytes(*row) as u64;
        }
        let items = Buffer::from_slice(self.device, &batch.items)?;
        let most_rows = batch.items.iter().map(|item| item.rows as usize).max().unwrap_or(0);
        self.kernel.launch(&DecodeCall {
            queries: queries.address(),
            pages: pages.address(),
            items: items.address(),
            count: batch.items.len(),
            most_rows,
            scale: self.items[0].queries.scale,
        })?;
        self.merge(turns, &batch, &parts, partials)
    }

    /// Adds the splits of one turn.
    fn add(&self, turn: &Turn<'_>, batch: &mut Batch) {
        let item = self.items[turn.item];
        let (rows, tokens) = (item.queries.rows(), self.pages.shape().tokens as u64);
        let keys: u64 = turn.blocks.iter().map(|block| u64::from(block.len)).sum();
        let split = split_keys(keys);
        let query = (batch.queries.len() / (self.heads.query_heads() * self.heads.head_dim)) as u32;
        batch.queries.extend_from_slice(item.queries.data);
        let page = batch.pages.len() as u64;
        batch.pages.extend_from_slice(turn.pinned.addresses());
        let before = batch.items.len();
        for at in (0..keys).step_by(split as usize) {
            batch.part_of.push(batch.part_rows);
            batch.part_rows += rows;
            batch.items.push(DecodeItem {
                first_position: item.queries.first_position,
                first_key: turn.blocks[0].first_position + at,
                output: 0,
                query,
                rows: rows as u32,
                page: (page + at / tokens) as u32,
                page_stride: 0,
                keys: split.min(keys - at) as u32,
                unused: 0,
            });
        }
        batch.splits.push(batch.items.len() - before);
    }

    /// Folds the splits of each turn, in order, onto what its item has so far.
    fn merge(
        &self,
        turns: &[Turn<'_>],
        batch: &Batch,
        parts: &Buffer,
        partials: &mut [Partials],
    ) -> Result<(), Error> {
        let (heads, dim) = (self.heads.query_heads(), self.heads.head_dim);
        let bytes = |rows: usize| (rows * heads * (2 + dim) * size_of::<f32>()) as u64;
        let (mut sources, mut merges, mut outputs, mut first) = (Vec::new(), Vec::new(), Vec::new(), 0);
        let mut earlier = Vec::new();
        for (turn, &splits) in turns.iter().zip(&batch.splits) {
            let rows = self.items[turn.item].queries.rows();
            let before = Buffer::from_slice(self.device, &partials[turn.item].to_interleaved())?;
            let output = Buffer::new(self.device, bytes(rows) as usize)?;
            let first_source = sources.len() as u32;
            sources.push(before.address());
            let of = &batch.part_of[first..first + splits];
            sources.extend(of.iter().map(|&row| parts.address() + bytes(row)));
            merges.push(MergeItem {
                output: output.address(),
                first_source,
                sources: 1 + splits as u32,
                records: (rows * heads) as u32,
                unused: 0,
            });
            first += splits;
            earlier.push(before);
            outputs.push(output);
        }
        let most_records = merges.iter().map(|merge| merge.records as usize).max().unwrap_or(0);
        let (sources, table) =
            (Buffer::from_slice(self.device, &sources)?, Buffer::from_slice(self.device, &merges)?);
        self.merger.merge(table.address(), sources.address(), merges.len(), most_records)?;
        for (turn, output) in turns.iter().zip(&outputs) {
            let rows = self.items[turn.item].queries.rows();
            partials[turn.item] = read_partials(output, rows, heads, dim)?;
        }
        Ok(())
    }
}

/// Tables of a launch.
#[derive(Default)]
struct Batch {
    queries: Vec<f32>,
    pages: Vec<u64>,
    items: Vec<DecodeItem>,
    /// First row of each item's partial among the parts.
    part_of: Vec<usize>,
    part_rows: usize,
    /// Items of each turn.
    splits: Vec<usize>,
}
