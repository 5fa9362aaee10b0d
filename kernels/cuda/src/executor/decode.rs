//! Few rows of several sequences over blocks that follow each other: one launch, keys split over the device.

use std::collections::HashMap;
use std::sync::Arc;

use longshore_attention::{AttendItem, ExactBlock, HeadShape};

use super::pages::TilePages;
use crate::{
    Buffer, DecodeAttention, DecodeCall, DecodeItem, Device, Error, MergeItem, PageElement, PartialMerger,
    Pinned, Span, split_keys,
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

    /// Queues everything; the partial of each item goes to its place in `results`. What does not fit the pages at once is done in
    /// turns, each folded onto the one before, on the device.
    pub(super) fn queue(&self, results: &[Span<'_>]) -> Result<(), Error> {
        let place = |(item, result): (&&AttendItem<'_>, &Span<'_>)| {
            result.for_kernel("output", &[self.bytes(item.queries.rows())], 1)
        };
        let results = self.items.iter().zip(results).map(place).collect::<Result<Vec<u64>, _>>()?;
        let mut fold = Fold { results: &results, so_far: Vec::new(), kept: Vec::new() };
        self.begin(&mut fold)?;
        let rows = self.rows()?;
        let mut rest: Vec<&[ExactBlock]> = self.items.iter().map(|item| &item.work.exact[..]).collect();
        while rest.iter().any(|blocks| !blocks.is_empty()) {
            let turns = self.turns(&mut rest)?;
            self.launch(&turns, &rest, &rows, &mut fold)?;
        }
        Ok(())
    }

    /// Brings what items fold onto, all together.
    fn begin(&self, fold: &mut Fold<'_>) -> Result<(), Error> {
        let mut records: Vec<f32> = Vec::new();
        let starts: Vec<Option<usize>> = self
            .items
            .iter()
            .map(|item| {
                let initial = item.initial?.to_interleaved();
                let start = records.len();
                records.extend(initial);
                Some(start)
            })
            .collect();
        if records.is_empty() {
            fold.so_far = vec![None; self.items.len()];
            return Ok(());
        }
        let buffer = Buffer::from_slice(self.device, &records)?;
        let address = |start: usize| buffer.address() + (start * size_of::<f32>()) as u64;
        fold.so_far = starts.into_iter().map(|start| start.map(address)).collect();
        fold.kept.push(buffer);
        Ok(())
    }

    /// Brings the rows that ask, those that several items share once.
    fn rows(&self) -> Result<Rows, Error> {
        let (mut data, mut first) = (Vec::new(), Vec::with_capacity(self.items.len()));
        let mut places: HashMap<(*const f32, usize), u32> = HashMap::new();
        let row = self.heads.query_heads() * self.heads.head_dim;
        for item in self.items {
            let own = item.queries.data;
            // Items borrow their rows while this runs: the same place holds the same rows.
            let place = *places.entry((own.as_ptr(), own.len())).or_insert_with(|| {
                let place = (data.len() / row) as u32;
                data.extend_from_slice(own);
                place
            });
            first.push(place);
        }
        Ok(Rows { buffer: Buffer::from_slice(self.device, &data)?, first })
    }

    /// Pins pages for as many blocks as there is room for; takes them off `rest`.
    fn turns(&self, rest: &mut [&'a [ExactBlock]]) -> Result<Vec<Turn<'a>>, Error> {
        let mut turns: Vec<Turn<'a>> = Vec::new();
        for (item, blocks) in rest.iter_mut().enumerate().filter(|(_, blocks)| !blocks.is_empty()) {
            let kv = self.items[item].kv;
            let tiles: Vec<_> = blocks.iter().map(|block| kv.tile(block.tile as usize)).collect();
            let pinned = match turns.is_empty() {
                true => self.pages.pin(&tiles)?,
                // The next turn has the pages of this one.
                false => self.pages.pin_beside(&tiles)?,
            };
            if pinned.is_empty() {
                break;
            }
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

    fn launch(
        &self,
        turns: &[Turn<'_>],
        rest: &[&[ExactBlock]],
        rows: &Rows,
        fold: &mut Fold<'_>,
    ) -> Result<(), Error> {
        let mut batch = Batch::default();
        for turn in turns {
            self.add(turn, rows.first[turn.item], &mut batch);
        }
        let pages = Buffer::from_slice(self.device, &batch.pages)?;
        let parts = Buffer::new(self.device, self.bytes(batch.part_rows))?;
        let mut merges = Merges::default();
        let mut first = 0;
        for (turn, &splits) in turns.iter().zip(&batch.splits) {
            let whole = rest[turn.item].is_empty();
            let target = if whole { fold.results[turn.item] } else { self.room(turn, fold)? };
            let items = &mut batch.items[first..first + splits];
            if let ([item], None) = (&mut *items, fold.so_far[turn.item]) {
                item.output = target;
            } else {
                for (item, row) in items.iter_mut().zip(&batch.part_of[first..]) {
                    item.output = parts.address() + self.bytes(*row) as u64;
                }
                let sources = fold.so_far[turn.item].into_iter().chain(items.iter().map(|item| item.output));
                merges.add(target, sources, self.items[turn.item].queries.rows() * self.heads.query_heads());
            }
            fold.so_far[turn.item] = Some(target);
            first += splits;
        }
        let items = Buffer::from_slice(self.device, &batch.items)?;
        let most_rows = batch.items.iter().map(|item| item.rows as usize).max().unwrap_or(0);
        self.kernel.launch(&DecodeCall {
            queries: rows.buffer.whole(),
            pages: pages.whole(),
            items: items.whole(),
            count: batch.items.len(),
            most_rows,
            scale: self.items[0].queries.scale,
        })?;
        self.merge(&merges)
    }

    /// Bytes of the partials of so many rows.
    fn bytes(&self, rows: usize) -> usize {
        super::wave::record_bytes((rows, self.heads.query_heads(), self.heads.head_dim))
    }

    /// Room for a partial onto which the next turn is folded.
    fn room(&self, turn: &Turn<'_>, fold: &mut Fold<'_>) -> Result<u64, Error> {
        let buffer = Buffer::new(self.device, self.bytes(self.items[turn.item].queries.rows()))?;
        let address = buffer.address();
        fold.kept.push(buffer);
        Ok(address)
    }

    /// Adds the splits of one turn, whose rows begin at `query`.
    fn add(&self, turn: &Turn<'_>, query: u32, batch: &mut Batch) {
        let item = self.items[turn.item];
        let (rows, tokens) = (item.queries.rows(), self.pages.shape().tokens as u64);
        let keys: u64 = turn.blocks.iter().map(|block| u64::from(block.len)).sum();
        let split = split_keys(keys);
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
    fn merge(&self, merges: &Merges) -> Result<(), Error> {
        if merges.items.is_empty() {
            return Ok(());
        }
        let most_records = merges.items.iter().map(|merge| merge.records as usize).max().unwrap_or(0);
        let sources = Buffer::from_slice(self.device, &merges.sources)?;
        let table = Buffer::from_slice(self.device, &merges.items)?;
        self.merger.merge(table.whole(), sources.whole(), merges.items.len(), most_records)
    }
}

/// Rows on the device, and the first of each item.
struct Rows {
    buffer: Buffer,
    first: Vec<u32>,
}

/// Where items stand.
struct Fold<'a> {
    /// Where the partial of each item goes in the end.
    results: &'a [u64],
    /// Address of the partial of what was visited before.
    so_far: Vec<Option<u64>>,
    /// What lies at these addresses, until everything is queued.
    kept: Vec<Buffer>,
}

/// Merges of a launch.
#[derive(Default)]
struct Merges {
    items: Vec<MergeItem>,
    sources: Vec<u64>,
}

impl Merges {
    fn add(&mut self, output: u64, sources: impl Iterator<Item = u64>, records: usize) {
        let first_source = self.sources.len() as u32;
        self.sources.extend(sources);
        let sources = self.sources.len() as u32 - first_source;
        self.items.push(MergeItem { output, first_source, sources, records: records as u32, unused: 0 });
    }
}

/// Tables of a launch.
#[derive(Default)]
struct Batch {
    pages: Vec<u64>,
    items: Vec<DecodeItem>,
    /// First row of each item's partial among the parts.
    part_of: Vec<usize>,
    part_rows: usize,
    /// Items of each turn.
    splits: Vec<usize>,
}
