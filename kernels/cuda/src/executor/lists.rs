//! Lists over pages: many rows, or keys that do not follow each other.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use longshore_attention::{
    Column, ExactBlock, Partials, Queries, SparseItem, SparseWork, TileShape, Visit, WorkList,
};

use super::pages::TilePages;
use super::refused;
use super::wave::{record_bytes, record_shape};
use crate::{
    Buffer, Device, Error, KeyLists, MeanPages, PageShape, Pinned, PrefillAttention, PrefillCall, Span,
};

/// Which tiles and means the lists of an item visit, in ascending order.
pub(super) struct Visited {
    tiles: BTreeMap<u32, u32>,
    means: BTreeMap<u32, u32>,
}

impl Visited {
    /// `None`: the lists visit nothing.
    pub(super) fn of(item: &SparseItem<'_>) -> Option<Self> {
        let (mut tiles, mut means) = (BTreeMap::new(), BTreeMap::new());
        let work = item.work;
        for (kv_head, tile) in pairs(work) {
            for visit in work.list(kv_head, tile) {
                match visit {
                    Visit::Block(block) => _ = tiles.insert(block.tile, 0),
                    Visit::Means { tile, .. } => _ = means.insert(*tile, 0),
                    Visit::Columns { .. } | Visit::EndOfStripe => {}
                }
            }
        }
        tiles.extend(work.columns().iter().map(|column| (column.tile, 0)));
        for named in [&mut tiles, &mut means] {
            named.values_mut().zip(0..).for_each(|(place, index)| *place = index);
        }
        (!tiles.is_empty() || !means.is_empty()).then_some(Self { tiles, means })
    }

    /// Shape of the tiles as they lie in memory, of which the item may show one head.
    pub(super) fn tile_shape(&self, item: &SparseItem<'_>) -> TileShape {
        let all_heads = |means: TileShape| TileShape { kv_heads: means.kv_heads, ..item.kv.shape() };
        let of_means = || self.mean_shape(item).map_or(item.kv.shape(), all_heads);
        self.tiles.keys().next().map_or_else(of_means, |&tile| item.kv.tile(tile as usize).shape())
    }

    /// The same of the tiles of means; `None`: no means are visited.
    pub(super) fn mean_shape(&self, item: &SparseItem<'_>) -> Option<TileShape> {
        self.means.keys().next().map(|&tile| item.summaries.tile(tile as usize).shape())
    }

    /// What the lists visit in `turn`, over tiles and means that are counted from its first.
    fn renamed(&self, work: &SparseWork, turn: &Turn) -> Result<SparseWork, Error> {
        let rows = (0..work.tiles()).map(|tile| work.rows(tile).end as u32).collect();
        let lists = pairs(work).map(|(kv_head, tile)| {
            let mut columns = Vec::new();
            let visits = work.list(kv_head, tile).iter();
            let visits = visits.filter_map(|visit| self.rename(visit, work, turn, &mut columns)).collect();
            (visits, columns)
        });
        SparseWork::new(work.kv_heads(), rows, lists.collect()).map_err(refused)
    }

    /// `None`: this is for another turn.
    fn rename(
        &self,
        visit: &Visit,
        work: &SparseWork,
        turn: &Turn,
        columns: &mut Vec<Column>,
    ) -> Option<Visit> {
        let tile_of = |tile: u32| place(&turn.tiles, self.tiles[&tile]);
        Some(match *visit {
            Visit::Block(block) => Visit::Block(ExactBlock { tile: tile_of(block.tile)?, ..block }),
            Visit::Means { tile, first, keys } => {
                Visit::Means { tile: place(&turn.means, self.means[&tile])?, first, keys }
            }
            Visit::Columns { first, count } => {
                let of = &work.columns()[first as usize..][..count as usize];
                let begun = columns.len() as u32;
                let here = |column: &Column| Some(Column { tile: tile_of(column.tile)?, ..*column });
                columns.extend(of.iter().filter_map(here));
                let count = columns.len() as u32 - begun;
                (count > 0).then_some(Visit::Columns { first: begun, count })?
            }
            Visit::EndOfStripe => Visit::EndOfStripe,
        })
    }
}

/// What is visited at once, by places among the tiles and means of all lists.
struct Turn {
    tiles: Range<u32>,
    means: Range<u32>,
}

/// Where what has this place lies in a range.
fn place(range: &Range<u32>, place: u32) -> Option<u32> {
    range.contains(&place).then(|| place - range.start)
}

fn pairs(work: &SparseWork) -> impl Iterator<Item = (usize, usize)> {
    let tiles = work.tiles();
    (0..work.kv_heads()).flat_map(move |kv_head| (0..tiles).map(move |tile| (kv_head, tile)))
}

/// A call of some rows over pages of one shape.
pub(super) struct ListCall<'a> {
    device: &'a Arc<dyn Device>,
    pages: &'a TilePages,
    /// Pages as the rows see them: of all heads, or of one.
    shape: PageShape,
    queries: Queries<'a>,
    rows: Rc<Buffer>,
    kernel: PrefillAttention,
}

/// Where the partial of a call stands: what was visited before, and where the whole goes.
pub(super) struct Chain<'r> {
    so_far: Option<Buffer>,
    result: Span<'r>,
}

impl<'a> ListCall<'a> {
    /// `rows` holds the queries; `kernel` is for pages as the rows see them.
    pub(super) fn new(
        device: &'a Arc<dyn Device>,
        pages: &'a TilePages,
        (shape, kernel): (PageShape, PrefillAttention),
        queries: Queries<'a>,
        rows: Rc<Buffer>,
    ) -> Self {
        Self { device, pages, shape, queries, rows, kernel }
    }

    /// Begins with `earlier`; the whole goes to `result`.
    pub(super) fn chain<'r>(&self, earlier: Option<&Partials>, result: Span<'r>) -> Result<Chain<'r>, Error> {
        let records = earlier.map(Partials::to_interleaved);
        let so_far = records.map(|records| Buffer::from_slice(self.device, &records)).transpose()?;
        Ok(Chain { so_far, result })
    }

    /// Queues all rows over the same blocks and columns, folded onto `chain`; `last` completes it.
    pub(super) fn flat(
        &self,
        work: &WorkList,
        pages: &[u64],
        chain: &mut Chain<'_>,
        last: bool,
    ) -> Result<(), Error> {
        let lists = KeyLists::of_work(work, &self.shape, pages, self.queries.rows())?;
        self.queue(&lists, pages, (None, None), chain, last)
    }

    /// Queues the lists of `item`, folded onto `chain`: at once, or, where there are fewer pages than tiles, in turns of ascending tiles.
    pub(super) fn sparse<'p>(
        &self,
        item: &SparseItem<'_>,
        visited: &Visited,
        mean_pages: Option<&'p TilePages>,
        chain: &mut Chain<'_>,
    ) -> Result<(), Error> {
        let tiles: Vec<_> = visited.tiles.keys().map(|&tile| item.kv.tile(tile as usize)).collect();
        let means: Vec<_> = visited.means.keys().map(|&tile| item.summaries.tile(tile as usize)).collect();
        let (mut tiles_done, mut means_done) = (0, 0);
        while tiles_done < tiles.len() || means_done < means.len() {
            let pinned = self.pages.pin(&tiles[tiles_done..])?;
            // Pages of both may be of one shape: who holds some does not wait for more.
            let pin_means = |pages: &'p TilePages| match pinned.is_empty() {
                true => pages.pin(&means[means_done..]),
                false => pages.pin_beside(&means[means_done..]),
            };
            let pinned_means = mean_pages.map(pin_means).transpose()?;
            let ends = (tiles_done + pinned.len(), means_done + pinned_means.as_ref().map_or(0, Pinned::len));
            let turn =
                Turn { tiles: tiles_done as u32..ends.0 as u32, means: means_done as u32..ends.1 as u32 };
            (tiles_done, means_done) = ends;
            let last = tiles_done == tiles.len() && means_done == means.len();
            let work = visited.renamed(item.work, &turn)?;
            let pages = one_head(pinned.addresses(), item.kv.only_head(), &self.pages.shape());
            let means = pinned_means.as_ref().zip(mean_pages);
            let means = means.map(|(pinned, of)| {
                let addresses = one_head(pinned.addresses(), item.summaries.only_head(), &of.shape());
                (addresses, of.shape().tokens)
            });
            self.lists(item, &work, (&pages, means), chain, last)?;
        }
        Ok(())
    }

    /// Queues lists over pages and, with their number in each, pages of means.
    fn lists(
        &self,
        item: &SparseItem<'_>,
        work: &SparseWork,
        (pages, means): (&[u64], Option<(Vec<u64>, usize)>),
        chain: &mut Chain<'_>,
        last: bool,
    ) -> Result<(), Error> {
        let tokens = means.as_ref().map_or(0, |(_, tokens)| *tokens);
        let lists = KeyLists::of_sparse(work, &self.shape, pages, tokens)?;
        let table = means.map(|(addresses, _)| Buffer::from_slice(self.device, &addresses)).transpose()?;
        let means =
            table.as_ref().map(|table| MeanPages { pages: table.whole(), tokens, weight: self.shape.tokens });
        self.queue(&lists, pages, (means, item.skip_below), chain, last)
    }

    fn queue(
        &self,
        lists: &KeyLists,
        pages: &[u64],
        (means, skip_below): (Option<MeanPages<'_>>, Option<f32>),
        chain: &mut Chain<'_>,
        last: bool,
    ) -> Result<(), Error> {
        let bytes = record_bytes(record_shape(&self.queries));
        let room = (!last).then(|| Buffer::new(self.device, bytes)).transpose()?;
        let table = Buffer::from_slice(self.device, pages)?;
        let call = PrefillCall {
            queries: self.rows.whole(),
            rows: self.queries.rows(),
            first_position: self.queries.first_position,
            scale: self.queries.scale,
            pages: table.whole(),
            means,
            earlier: chain.so_far.as_ref().map(Buffer::whole),
            output: room.as_ref().map_or(chain.result, Buffer::whole),
            divide: false,
            skip_below,
        };
        self.kernel.lists(&call, lists)?;
        // What was folded onto is given back when the launch is done.
        chain.so_far = room;
        Ok(())
    }
}

/// Addresses of pages, or of the one KV head in them that is shown.
fn one_head(pages: &[u64], head: Option<usize>, shape: &PageShape) -> Vec<u64> {
    let offset = head.map_or(0, |head| head * shape.head_bytes()) as u64;
    pages.iter().map(|page| page + offset).collect()
}
