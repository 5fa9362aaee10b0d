//! Tiles of the host as pages of the device.

use std::sync::Arc;

use longshore_attention::{PagedKv, Promise, Tile, TileShape};

use super::arrivals::Arrivals;
use crate::{
    Buffer, Device, Error, FreshPage, PageCache, PageElement, PageShape, PageStats, PageTranscoder, Pinned,
};

/// Bytes of tiles that wait on the device to become pages, at most, of one call.
const ARRIVED_BYTES: usize = 16 << 20;

/// What a page is to hold.
#[derive(Debug, Clone, Copy)]
pub(super) enum Content<'a> {
    /// A tile, under its version.
    Tile(&'a Tile),
    /// What was appended on the device under this version, which no tile has yet: it has no bytes on the host, so a page that is not there any
    /// more cannot be brought.
    Promised(u64),
    /// Rows that are going to be appended under this version, behind those of a tile, if any.
    Begun(u64, Option<&'a Tile>),
}

impl<'a> Content<'a> {
    pub(super) fn version(&self) -> u64 {
        match self {
            Self::Tile(tile) => tile.version(),
            Self::Promised(version) | Self::Begun(version, _) => *version,
        }
    }

    /// The tile whose bytes come first, if any.
    fn tile(&self) -> Result<Option<&'a Tile>, Error> {
        match *self {
            Self::Tile(tile) => Ok(Some(tile)),
            Self::Begun(_, tile) => Ok(tile),
            Self::Promised(version) => {
                let problem = format!("that of version {version} made way before its tile was written");
                Err(Error::OutOfPages { problem })
            }
        }
    }

    /// Its version, if it cannot be brought.
    fn promised(&self) -> Option<u64> {
        match self {
            Self::Promised(version) => Some(*version),
            Self::Tile(_) | Self::Begun(..) => None,
        }
    }
}

/// Pages of tiles of one shape, in their own type or another float.
#[derive(Debug)]
pub(super) struct TilePages {
    device: Arc<dyn Device>,
    shape: PageShape,
    cache: PageCache,
    /// Tiles have the type of pages; those of another become tiles of that type on the host.
    as_it_is: bool,
    /// Makes rows of panels.
    transcoder: PageTranscoder,
    arrivals: Arc<Arrivals>,
}

impl TilePages {
    /// For tiles of `tile`, as pages of `element`, in up to `budget_bytes`. Takes nothing of the device.
    pub(super) fn new(
        device: &Arc<dyn Device>,
        arrivals: &Arc<Arrivals>,
        tile: TileShape,
        element: PageElement,
        budget_bytes: usize,
    ) -> Result<Self, Error> {
        let own = PageShape::of(tile)?;
        let shape = PageShape { element, ..own };
        let transcoder = PageTranscoder::new(device, shape)?;
        let page_bytes = shape.bytes().next_multiple_of(256);
        if budget_bytes < page_bytes {
            let problem = format!("of {page_bytes} bytes {budget_bytes} are for pages of {tile:?}");
            return Err(Error::OutOfPages { problem });
        }
        let cache = PageCache::new(Arc::clone(device), page_bytes, budget_bytes)?;
        let (device, as_it_is, arrivals) = (Arc::clone(device), element == own.element, Arc::clone(arrivals));
        Ok(Self { device, shape, cache, as_it_is, transcoder, arrivals })
    }

    /// Shape of the pages.
    pub(super) fn shape(&self) -> PageShape {
        self.shape
    }

    /// Pages that the budget has room for.
    pub(super) fn limit(&self) -> usize {
        self.cache.limit()
    }

    /// Refuses more pages at once than the budget has room for.
    pub(super) fn check_room(&self, count: usize) -> Result<(), Error> {
        if count <= self.limit() {
            return Ok(());
        }
        let problem = format!("{count} are wanted at once, there is room for {}", self.limit());
        Err(Error::OutOfPages { problem })
    }

    /// Refuses what was promised and has no page any more: so that nothing else makes way for a call that cannot be.
    pub(super) fn check_promised(&self, contents: &[Content<'_>]) -> Result<(), Error> {
        let promised: Vec<u64> = contents.iter().filter_map(Content::promised).collect();
        let missing = if promised.is_empty() { 0 } else { self.cache.missing(&promised) };
        if missing == 0 {
            return Ok(());
        }
        let problem = format!("{missing} of {} made way before their tiles were written", promised.len());
        Err(Error::OutOfPages { problem })
    }

    /// How many have no page.
    pub(super) fn missing(&self, contents: &[Content<'_>]) -> usize {
        self.cache.missing(&versions(contents))
    }

    /// What the cache did; `None` while somebody looks for pages.
    pub(super) fn stats(&self) -> Option<PageStats> {
        self.cache.try_stats()
    }

    /// Gives memory of pages that nobody has pinned back to the device: so many bytes, or as many as there are.
    pub(super) fn give_back(&self, bytes: usize) -> usize {
        self.cache.give_back(bytes)
    }

    /// Bytes that it could give.
    pub(super) fn idle_bytes(&self) -> usize {
        self.cache.idle_bytes()
    }

    /// Pages of the first of `tiles`, as many as there is room for: at least one. For who has pinned none.
    pub(super) fn pin(&self, tiles: &[&Tile]) -> Result<Pinned<'_>, Error> {
        self.pin_contents(&contents(tiles))
    }

    /// The same of what is not all tiles.
    pub(super) fn pin_contents(&self, contents: &[Content<'_>]) -> Result<Pinned<'_>, Error> {
        self.check_promised(contents)?;
        self.cache.pin(&versions(contents), |fresh| self.fill(contents, fresh))
    }

    /// See [`PageCache::take_over`].
    pub(super) fn take_over(&self, from: u64, to: u64) -> bool {
        self.cache.take_over(from, to)
    }

    /// See [`PageCache::discard`].
    pub(super) fn discard(&self, versions: &[u64]) {
        self.cache.discard(versions);
    }

    /// The same for who has pinned others: perhaps none.
    pub(super) fn pin_beside(&self, tiles: &[&Tile]) -> Result<Pinned<'_>, Error> {
        self.pin_contents_beside(&contents(tiles))
    }

    /// The same of what is not all tiles.
    pub(super) fn pin_contents_beside(&self, contents: &[Content<'_>]) -> Result<Pinned<'_>, Error> {
        self.check_promised(contents)?;
        self.cache.pin_beside(&versions(contents), |fresh| self.fill(contents, fresh))
    }

    fn fill(&self, contents: &[Content<'_>], fresh: &[FreshPage]) -> Result<(), Error> {
        let tiles = fresh.iter().map(|page| Ok(contents[page.index()].tile()?.map(|tile| (page, tile))));
        let brought: Vec<(&FreshPage, &Tile)> =
            tiles.filter_map(Result::transpose).collect::<Result<_, _>>()?;
        let mut at_once = (ARRIVED_BYTES / self.shape.bytes()).clamp(1, fresh.len());
        let mut rest = &brought[..];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(at_once.min(rest.len()));
            match self.bring(now) {
                Ok(()) => rest = later,
                Err(Error::OutOfMemory { .. }) if self.arrivals.clear() > 0 => {}
                Err(Error::OutOfMemory { .. }) if at_once > 1 => at_once = at_once.div_ceil(8),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Queues copies of tiles, and one launch that makes pages of them. The copies wait for no launch but those that use the same memory on
    /// the way: pages are written by the launch, in the order of launches, however late their former content is read.
    fn bring(&self, fresh: &[(&FreshPage, &Tile)]) -> Result<(), Error> {
        let apart = self.shape.bytes().next_multiple_of(16);
        let fill = |arrived: &Buffer| {
            fresh.iter().enumerate().try_for_each(|(place, (_, tile))| {
                let arrives = arrived.span(place * apart, self.shape.bytes())?;
                match self.as_it_is {
                    true => arrives.write_apart(tile.as_bytes()),
                    false => arrives.write_apart(converted(tile, self.shape)?.as_bytes()),
                }
            })
        };
        let read = |arrived: &Buffer| {
            let mut table = Vec::with_capacity(2 * fresh.len());
            table.extend((0..fresh.len()).map(|place| arrived.address() + (place * apart) as u64));
            for (page, _) in fresh {
                table.push(page.span()?.address());
            }
            let table = Buffer::from_slice(&self.device, &table)?;
            let targets = table.whole().after(fresh.len() * size_of::<u64>());
            self.transcoder.to_rows(table.whole(), targets, fresh.len())
        };
        self.arrivals.bring(fresh.len() * apart, fill, read)
    }
}

/// The first `count` tiles, of `len` that there are: the last of these, of which there is nothing yet but pages, by their promised versions.
pub(super) fn contents_of<'a>(
    kv: &'a dyn PagedKv,
    count: usize,
    len: usize,
    promised: &[Promise],
) -> Vec<Content<'a>> {
    let written = len.saturating_sub(promised.len());
    let content = |index: usize| match index.checked_sub(written).and_then(|index| promised.get(index)) {
        Some(promise) => Content::Promised(promise.version()),
        None => Content::Tile(kv.tile(index)),
    };
    (0..count).map(content).collect()
}

fn contents<'a>(tiles: &[&'a Tile]) -> Vec<Content<'a>> {
    tiles.iter().map(|tile| Content::Tile(tile)).collect()
}

fn versions(contents: &[Content<'_>]) -> Vec<u64> {
    contents.iter().map(Content::version).collect()
}

/// The tile with its elements rounded to the type of `page`.
fn converted(tile: &Tile, page: PageShape) -> Result<Tile, Error> {
    let shape = page.tile().expect("pages of tiles have a type that tiles have");
    let mut other = Tile::zeroed(shape);
    for token in 0..shape.block_tokens {
        let (keys, values) = tile.read(token).map_err(super::refused)?;
        other.write(token, &keys, &values).map_err(super::refused)?;
    }
    Ok(other)
}
