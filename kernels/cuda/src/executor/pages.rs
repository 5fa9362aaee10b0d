//! Tiles of the host as pages of the device.

use std::sync::Arc;

use longshore_attention::{Tile, TileShape};

use crate::{
    Buffer, Device, Error, PageCache, PageElement, PageShape, PageStats, PageTranscoder, Pinned, Span,
    page_of,
};

/// Pages of tiles of one shape, in their own type or another float.
#[derive(Debug)]
pub(super) struct TilePages {
    shape: PageShape,
    cache: PageCache,
    way: Way,
}

/// How a tile becomes a page.
#[derive(Debug)]
enum Way {
    /// The tile is copied as it is and its panels become rows on the device.
    Device {
        transcoder: Box<PageTranscoder>,
        /// A tile, then its address and that of the page.
        scratch: Buffer,
    },
    /// Its elements become others on the host.
    Host,
}

impl TilePages {
    /// For tiles of `tile`, as pages of `element`, in up to `budget_bytes`.
    pub(super) fn new(
        device: &Arc<dyn Device>,
        tile: TileShape,
        element: PageElement,
        budget_bytes: usize,
    ) -> Result<Self, Error> {
        let own = PageShape::of(tile)?;
        let shape = PageShape { element, ..own };
        let way = if element == own.element {
            // Aligned, so that the addresses behind the tile are.
            let scratch = Buffer::new(device, shape.bytes().next_multiple_of(16) + 2 * size_of::<u64>())?;
            Way::Device { transcoder: Box::new(PageTranscoder::new(device, shape)?), scratch }
        } else {
            Way::Host
        };
        if budget_bytes < shape.bytes().next_multiple_of(256) {
            let problem = format!("of {} bytes {budget_bytes} are for pages of {tile:?}", shape.bytes());
            return Err(Error::OutOfPages { problem });
        }
        let cache = PageCache::new(Arc::clone(device), shape.bytes().next_multiple_of(256), budget_bytes)?;
        Ok(Self { shape, cache, way })
    }

    /// Shape of the pages.
    pub(super) fn shape(&self) -> PageShape {
        self.shape
    }

    pub(super) fn stats(&self) -> PageStats {
        self.cache.stats()
    }

    /// Pages of the first of `tiles`, as many as there is room for.
    pub(super) fn pin(&self, tiles: &[&Tile]) -> Result<Pinned<'_>, Error> {
        let versions: Vec<u64> = tiles.iter().map(|tile| tile.version()).collect();
        self.cache.pin(&versions, |index, page| self.fill(tiles[index], page))
    }

    fn fill(&self, tile: &Tile, page: Span<'_>) -> Result<(), Error> {
        match &self.way {
            Way::Device { transcoder, scratch } => {
                let table = scratch.span(self.shape.bytes().next_multiple_of(16), 2 * size_of::<u64>())?;
                scratch.span(0, self.shape.bytes())?.write(tile.as_bytes())?;
                table.write(&[scratch.address(), page.address()])?;
                transcoder.to_rows(table.address(), table.address() + size_of::<u64>() as u64, 1)
            }
            Way::Host => page.first(self.shape.bytes())?.write(&page_of(&converted(tile, self.shape)?)?),
        }
    }
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
