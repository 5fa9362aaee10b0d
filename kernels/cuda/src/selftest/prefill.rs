//! Prefill attention against the CPU's executor.

use std::ops::Range;
use std::sync::Arc;

use longshore_attention::{
    AttendItem, Column, CpuExecutor, ExactBlock, Executor, HeadShape, KvDtype, Partials, QUERY_TILE, Queries,
    SparseItem, SparseWork, Tile, TileShape, Tiles, Visit, WorkList,
};

use super::material::{Random, pages_of, relative, rounded, spoil};
use crate::{
    Buffer, DenseKeys, Device, Error, KeyLists, MeanPages, PageElement, PageShape, PrefillAttention,
    PrefillCall,
};

/// What the numbers are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Numbers {
    /// From −1 to 1, queries larger: logits of a few units.
    Ordinary,
    /// Whole numbers, of which every sum is exact: logits up to ±10,000 and more, many of them equal.
    Extreme,
    /// All logits are equal.
    Equal,
    /// All logits are equal, and so are all values: an output is a value, and errors of sums that lean one way are seen.
    Same,
}

/// Which keys rows visit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keys {
    /// All up to their own.
    Dense,
    /// Blocks, columns and means by chance; some lists are empty.
    Lists,
    /// The columns of a work list, with bias, beside some blocks.
    Biased,
}

/// How the device is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Way {
    /// The kernel without matrix units.
    pub(super) scalar: bool,
    /// The kernel of warp groups.
    pub(super) wgmma: bool,
    /// Cuts lists after so many visits.
    pub(super) part_visits: Option<u64>,
    /// Whether the result is folded onto a partial of earlier keys.
    pub(super) earlier: bool,
    /// Each page an allocation of its own.
    pub(super) apart: bool,
    /// How far below the running maximum blocks are left out.
    pub(super) skip_below: Option<u8>,
}

/// A comparison.
#[derive(Debug, Clone, Copy)]
pub(super) struct Prefill {
    pub(super) seed: u64,
    pub(super) element: PageElement,
    pub(super) tokens: usize,
    pub(super) heads: HeadShape,
    /// Keys before the first row.
    pub(super) prefix: usize,
    pub(super) rows: usize,
    /// Blocks of a stripe.
    pub(super) stripe: usize,
    pub(super) numbers: Numbers,
    pub(super) keys: Keys,
    pub(super) way: Way,
}

/// A sequence as the CPU has it, and its pages.
struct Sequence {
    tiles: Tiles,
    pages: Vec<Vec<u8>>,
    means: Tiles,
    mean_pages: Vec<Vec<u8>>,
    queries: Vec<f32>,
    /// Of keys that come before all.
    earlier: Partials,
    work: Work,
}

enum Work {
    Listed(SparseWork),
    Flat(WorkList),
}

/// Pages on the device, each where it likes or side by side, and the table of their addresses.
struct Placed {
    addresses: Vec<u64>,
    table: Buffer,
    _pages: Vec<Buffer>,
}

impl Placed {
    fn new(device: &Arc<dyn Device>, bodies: &[Vec<u8>], apart: bool) -> Result<Self, Error> {
        let size = bodies.first().map_or(0, Vec::len);
        let (pages, addresses): (Vec<Buffer>, Vec<u64>) = if apart {
            let pages =
                bodies.iter().map(|body| Buffer::from_slice(device, body)).collect::<Result<Vec<_>, _>>()?;
            let addresses = pages.iter().map(Buffer::address).collect();
            (pages, addresses)
        } else {
            // The last comes first: neighbours in the table are none in memory.
            let slab =
                Buffer::from_slice(device, &bodies.iter().rev().flatten().copied().collect::<Vec<u8>>())?;
            let place = |index: usize| slab.address() + ((bodies.len() - 1 - index) * size) as u64;
            let addresses = (0..bodies.len()).map(place).collect();
            (vec![slab], addresses)
        };
        let table = Buffer::from_slice(device, &addresses)?;
        Ok(Self { addresses, table, _pages: pages })
    }
}

impl Prefill {
    fn page(&self) -> PageShape {
        let HeadShape { kv_heads, head_dim, .. } = self.heads;
        PageShape { tokens: self.tokens, kv_heads, head_dim, element: self.element }
    }

    /// Means of a page.
    fn mean_tokens(&self) -> usize {
        self.stripe.next_power_of_two().max(16)
    }

    fn scale(&self) -> f32 {
        match self.numbers {
            // A power of two, so that logits are as exact as their sums.
            Numbers::Extreme => 1.0,
            _ => 1.0 / (self.heads.head_dim as f32).sqrt(),
        }
    }

    fn tile_shape(&self) -> TileShape {
        self.page().tile().expect("a type that tiles have")
    }

    fn keys(&self) -> usize {
        self.prefix + self.rows
    }

    /// Numbers that the type of the keys has.
    fn numbers(&self, random: &mut Random, count: usize, query: bool) -> Vec<f32> {
        let mut numbers: Vec<f32> = match self.numbers {
            Numbers::Ordinary => random.numbers(count, if query { 3.0 } else { 1.0 }),
            Numbers::Extreme => {
                let size = if query { 120.0 } else { 8.0 };
                random.numbers(count, size).into_iter().map(f32::round).collect()
            }
            Numbers::Same => vec![if query { 0.0 } else { 0.7 }; count],
            Numbers::Equal => random.numbers(count, if query { 0.0 } else { 1.0 }),
        };
        rounded(self.element, &mut numbers);
        numbers
    }

    fn tiles_of(&self, shape: TileShape, keys: &[f32], values: &[f32]) -> Tiles {
        let elements = shape.block_tokens * shape.kv_heads * shape.head_dim;
        let tiles = keys.chunks(elements).zip(values.chunks(elements)).map(|(keys, values)| {
            let mut tile = Tile::zeroed(shape);
            tile.write(0, keys, values).expect("as many tokens as the tile has");
            tile
        });
        Tiles { shape, tiles: tiles.collect() }
    }

    fn sequence(&self) -> Sequence {
        let mut random = Random(self.seed);
        let width = self.heads.kv_heads * self.heads.head_dim;
        let of_keys = |random: &mut Random, count: usize| {
            let keys = self.numbers(random, count * width, false);
            // Values are ordinary whatever the keys are, but for one kind.
            let mut values = match self.numbers {
                Numbers::Same => vec![0.7; count * width],
                _ => random.numbers(count * width, 1.0),
            };
            rounded(self.element, &mut values);
            (keys, values)
        };
        let (keys, values) = of_keys(&mut random, self.keys());
        let tiles = self.tiles_of(self.tile_shape(), &keys, &values);
        let mut pages = pages_of(&tiles.tiles);
        if let (Some(last), rest @ 1..) = (pages.last_mut(), self.keys() % self.tokens) {
            spoil(&self.page(), last, rest);
        }
        let stripes = tiles.tiles.len().div_ceil(self.stripe);
        let (mean_keys, mean_values) = of_keys(&mut random, stripes * self.mean_tokens());
        let shape = TileShape { block_tokens: self.mean_tokens(), ..self.tile_shape() };
        let mean_pages = pages_of(&self.tiles_of(shape, &mean_keys, &mean_values).tiles);
        let means = self.tiles_of(TileShape { dtype: KvDtype::F32, ..shape }, &mean_keys, &mean_values);
        let queries =
            self.numbers(&mut random, self.rows * self.heads.query_heads() * self.heads.head_dim, true);
        let earlier = self.earlier(&mut random);
        let work = self.work(&mut random);
        Sequence { tiles, pages, means, mean_pages, queries, earlier, work }
    }

    /// Partials of keys that nobody has any more; some rows had none.
    fn earlier(&self, random: &mut Random) -> Partials {
        let (heads, dim) = (self.heads.query_heads(), self.heads.head_dim);
        let mut records = Vec::new();
        for _ in 0..self.rows * heads {
            let (m, l) = (random.number() * 4.0, 1.5 + random.number());
            if !self.way.earlier || random.below(4) == 0 {
                records.extend([f32::NEG_INFINITY, 0.0]);
                records.extend(vec![0.0; dim]);
            } else {
                records.extend([m, l]);
                records.extend(random.numbers(dim, 1.0));
            }
        }
        Partials::from_interleaved(self.rows, heads, dim, &records).expect("records of ours")
    }

    fn blocks(&self) -> Vec<ExactBlock> {
        let blocks = (0..self.keys().div_ceil(self.tokens)).map(|block| ExactBlock {
            tile: block as u32,
            first_position: (block * self.tokens) as u64,
            len: self.tokens.min(self.keys() - block * self.tokens) as u32,
        });
        blocks.collect()
    }

    fn work(&self, random: &mut Random) -> Work {
        match self.keys {
            Keys::Dense => Work::Flat(WorkList { exact: self.blocks(), ..WorkList::default() }),
            Keys::Biased => {
                let (exact, rest): (Vec<_>, Vec<_>) =
                    self.blocks().into_iter().partition(|_| random.below(2) == 0);
                let columns: Vec<Column> =
                    rest.iter().flat_map(|block| some_columns(block, random)).collect();
                let column_bias = columns.iter().map(|_| random.number() * 3.0).collect();
                Work::Flat(WorkList { exact, columns, column_bias, ..WorkList::default() })
            }
            Keys::Lists => {
                let ends = row_ends(self.prefix, self.rows);
                let lists = (0..self.heads.kv_heads * ends.len()).map(|index| {
                    let tile = index % ends.len();
                    let start = if tile == 0 { 0 } else { ends[tile - 1] as usize };
                    self.list(random, self.prefix + start..self.prefix + ends[tile] as usize)
                });
                let lists = lists.collect();
                Work::Listed(SparseWork::new(self.heads.kv_heads, ends, lists).expect("lists of ours"))
            }
        }
    }

    /// What the rows at some positions visit; also of what lies after them, which nobody sees.
    fn list(&self, random: &mut Random, positions: Range<usize>) -> (Vec<Visit>, Vec<Column>) {
        let (mut visits, mut columns) = (Vec::new(), Vec::new());
        if random.below(8) == 0 {
            return (visits, columns);
        }
        for (stripe, blocks) in self.blocks().chunks(self.stripe).enumerate() {
            let mut gathered = Vec::new();
            for block in blocks {
                let own = positions.contains(&(block.first_position as usize));
                match random.below(if own { 6 } else { 10 }) {
                    0..3 => visits.push(Visit::Block(*block)),
                    3..6 => gathered.extend(some_columns(block, random)),
                    _ => {}
                }
            }
            for some in gathered.chunks(1 + random.below(self.tokens)) {
                visits.push(Visit::Columns { first: columns.len() as u32, count: some.len() as u32 });
                columns.extend_from_slice(some);
            }
            for first in (0..self.mean_tokens()).step_by(64) {
                let room = self.mean_tokens().min(first + 64) - first;
                let keys = (random.next() | random.next()) >> (64 - room);
                if keys != 0 && random.below(3) > 0 {
                    visits.push(Visit::Means { tile: stripe as u32, first: first as u32, keys });
                }
            }
            visits.push(Visit::EndOfStripe);
        }
        (visits, columns)
    }

    fn queries<'a>(&self, sequence: &'a Sequence) -> Queries<'a> {
        Queries {
            shape: self.heads,
            first_position: self.prefix as u64,
            scale: self.scale(),
            data: &sequence.queries,
        }
    }

    fn expected(&self, sequence: &Sequence) -> Partials {
        let (queries, kv) = (self.queries(sequence), &sequence.tiles);
        let cpu = CpuExecutor::serial();
        let partials = match &sequence.work {
            Work::Flat(work) => {
                cpu.attend(&[AttendItem { queries, kv, work, initial: Some(&sequence.earlier) }])
            }
            Work::Listed(work) => cpu.attend_sparse(&[SparseItem {
                queries,
                kv,
                summaries: &sequence.means,
                work,
                earlier: Some(&sequence.earlier),
                stripe: None,
                skip_below: self.way.skip_below.map(f32::from),
            }]),
        };
        partials.expect("a call of ours").remove(0)
    }

    /// What the device gives, as records, or divided.
    fn found(&self, device: &Arc<dyn Device>, sequence: &Sequence, divide: bool) -> Result<Vec<f32>, Error> {
        let mut attention = PrefillAttention::new(device, &self.page(), self.heads.group)?;
        if self.way.wgmma {
            attention = attention.with_wgmma_always();
        }
        if self.way.scalar {
            attention = attention.scalar();
        }
        if let Some(visits) = self.way.part_visits {
            attention = attention.with_part_visits(visits);
        }
        let pages = Placed::new(device, &sequence.pages, self.way.apart)?;
        let means = Placed::new(device, &sequence.mean_pages, false)?;
        let queries = Buffer::from_slice(device, &sequence.queries)?;
        let earlier = Buffer::from_slice(device, &sequence.earlier.to_interleaved())?;
        let pairs = self.rows * self.heads.query_heads();
        let width = self.heads.head_dim + if divide { 0 } else { 2 };
        let output = Buffer::new(device, pairs * width * size_of::<f32>())?;
        let mean_pages =
            MeanPages { pages: means.table.whole(), tokens: self.mean_tokens(), weight: self.tokens };
        let call = PrefillCall {
            queries: queries.whole(),
            rows: self.rows,
            first_position: self.prefix as u64,
            scale: self.scale(),
            pages: pages.table.whole(),
            means: Some(mean_pages),
            earlier: self.way.earlier.then(|| earlier.whole()),
            output: output.whole(),
            divide,
            skip_below: self.way.skip_below.map(f32::from),
        };
        let page = self.page();
        match &sequence.work {
            Work::Flat(_) if self.keys == Keys::Dense => {
                attention.dense(&call, DenseKeys { first_position: 0, count: self.keys() as u64 })?;
            }
            Work::Flat(work) => {
                attention.lists(&call, &KeyLists::of_work(work, &page, &pages.addresses, self.rows)?)?;
            }
            Work::Listed(work) => {
                attention
                    .lists(&call, &KeyLists::of_sparse(work, &page, &pages.addresses, mean_pages.tokens)?)?;
            }
        }
        output.to_vec()
    }

    /// The larger of the relative distance of the outputs and that of the logarithms of the sums; infinite when rows without keys are not
    /// the identity.
    pub(super) fn run(&self, device: &Arc<dyn Device>) -> Result<f64, Error> {
        let sequence = self.sequence();
        let expected = self.expected(&sequence);
        let records = self.found(device, &sequence, false)?;
        let (heads, dim) = (self.heads.query_heads(), self.heads.head_dim);
        let Ok(found) = Partials::from_interleaved(self.rows, heads, dim, &records) else {
            return Ok(f64::INFINITY);
        };
        let sums = distance_of_sums(&found, &expected);
        let output = relative(&found.finish(), &expected.clone().finish());
        let divided = relative(&self.found(device, &sequence, true)?, &expected.finish());
        Ok(sums.max(output).max(divided))
    }
}

/// Largest difference of the logarithms of the sums, relative where they are large.
fn distance_of_sums(found: &Partials, expected: &Partials) -> f64 {
    let (rows, heads, _) = expected.shape();
    let pairs = (0..rows).flat_map(|row| (0..heads).map(move |head| (row, head)));
    let distances = pairs.map(|(row, head)| {
        let sum = |partials: &Partials| {
            let (m, l, _) = partials.row(row, head);
            f64::from(m) + f64::from(l).log2()
        };
        let (found, expected) = (sum(found), sum(expected));
        if found == expected { 0.0 } else { (found - expected).abs() / expected.abs().max(1.0) }
    });
    distances.fold(0.0, |worst, distance| if distance.is_nan() { f64::INFINITY } else { worst.max(distance) })
}

/// Ends of the query tiles that `rows` positions from `first` on lie in.
fn row_ends(first: usize, rows: usize) -> Vec<u32> {
    let end = first + rows;
    let inner = (first / QUERY_TILE + 1..).map(|tile| tile * QUERY_TILE).take_while(|at| *at < end);
    inner.chain([end]).filter(|_| rows > 0).map(|at| (at - first) as u32).collect()
}

fn some_columns(block: &ExactBlock, random: &mut Random) -> Vec<Column> {
    let every = 1 + random.below(6);
    let offsets = (0..block.len).filter(|_| random.below(every) == 0);
    let column =
        |offset| Column { tile: block.tile, offset, position: block.first_position + u64::from(offset) };
    offsets.collect::<Vec<_>>().into_iter().map(column).collect()
}
