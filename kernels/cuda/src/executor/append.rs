//! Rows of keys and values that become pages where the backend left them, before their tiles are written.

use std::sync::Arc;

use longshore_attention::{Error as AttentionError, TileShape};
use longshore_model::KeptAppend;

use super::pages::{Content, TilePages};
use super::{CudaExecutor, eighths, list_element};
use crate::{AppendCall, Buffer, Error, KeptRows, Pinned, RowAppender};

/// The pages of a call, and what becomes of their tokens.
struct Plan<'a> {
    contents: Vec<Content<'a>>,
    /// Versions whose pages may be taken over for others.
    continued: Vec<(u64, u64)>,
    /// Of rows, then of blanks: tokens from the first page on.
    places: Vec<u64>,
    rows: usize,
}

impl<'a> Plan<'a> {
    fn new(parts: &'a [KeptAppend<'a>], block_tokens: usize) -> Self {
        let (mut contents, mut continued) = (Vec::new(), Vec::new());
        let (mut places, mut blanks) = (Vec::new(), Vec::new());
        for part in parts {
            let first = contents.len() * block_tokens;
            let end = part.offset + part.rows.len();
            for (block, (tile, promise)) in part.tiles.iter().zip(part.promised).enumerate() {
                let begun = (block == 0 && part.offset > 0).then_some(*tile);
                continued.extend(begun.map(|tile| (tile.version(), promise.version())));
                contents.push(Content::Begun(promise.version(), begun));
            }
            places.extend((part.offset..end).map(|token| (first + token) as u64));
            // A tile is zero where nothing was written yet, and a page that is continued already is.
            if part.tiles.len() > 1 || part.offset == 0 {
                blanks.extend((end..part.tiles.len() * block_tokens).map(|token| (first + token) as u64));
            }
        }
        let rows = places.len();
        places.extend(blanks);
        Self { contents, continued, places, rows }
    }

    fn versions(&self) -> Vec<u64> {
        self.contents.iter().map(Content::version).collect()
    }
}

impl CudaExecutor {
    /// Queues it; false: there are no pages for these rows, or no room, and none was made.
    pub(super) fn append_rows(
        &self,
        k: &KeptRows,
        v: &KeptRows,
        parts: &[KeptAppend<'_>],
    ) -> Result<bool, AttentionError> {
        let tile = check(k, v, parts)?;
        self.unless_short(&self.fallbacks.appends, || self.append(tile, (k, v), parts))
    }

    fn append(
        &self,
        tile: TileShape,
        rows: (&KeptRows, &KeptRows),
        parts: &[KeptAppend<'_>],
    ) -> Result<bool, Error> {
        let element = list_element(tile);
        if element != tile.dtype.into() {
            return Ok(false);
        }
        let Some(pages) = known(self.pages(tile, element, eighths(tile, element)))? else { return Ok(false) };
        let plan = Plan::new(parts, tile.block_tokens);
        pages.check_room(plan.contents.len())?;
        let taken: Vec<(u64, u64)> =
            plan.continued.iter().copied().filter(|&(from, to)| pages.take_over(from, to)).collect();
        let outcome = self.append_to(&pages, rows, &plan);
        if outcome.is_err() {
            // Nothing was queued that writes to them. Where somebody brought the old version meanwhile, they are discarded with the others.
            for (from, to) in taken {
                let _ = pages.take_over(to, from);
            }
            pages.discard(&plan.versions());
        }
        outcome.map(|()| true)
    }

    fn append_to(
        &self,
        pages: &Arc<TilePages>,
        (k, v): (&KeptRows, &KeptRows),
        plan: &Plan<'_>,
    ) -> Result<(), Error> {
        let pinned = pages.pin_contents(&plan.contents)?;
        check_all(&pinned, plan.contents.len())?;
        let table = Buffer::from_slice(&self.device, &[pinned.addresses(), &plan.places].concat())?;
        RowAppender::new(&self.device, pages.shape())?.launch(&AppendCall {
            keys: k.buffer().whole(),
            values: v.buffer().whole(),
            rows: plan.rows,
            pages: table.whole(),
            places: table.whole().after(size_of_val(pinned.addresses())),
            blanks: plan.places.len() - plan.rows,
        })
    }
}

/// What there is for a shape; `None`: there is no kernel for it.
pub(super) fn known<T>(outcome: Result<T, Error>) -> Result<Option<T>, Error> {
    match outcome {
        Err(Error::Invalid { .. }) => Ok(None),
        outcome => outcome.map(Some),
    }
}

/// Refuses fewer pages than are wanted at once.
pub(super) fn check_all(pinned: &Pinned<'_>, wanted: usize) -> Result<(), Error> {
    if pinned.len() == wanted {
        return Ok(());
    }
    let problem = format!("others have pinned all but {} of {wanted}", pinned.len());
    Err(Error::OutOfPages { problem })
}

/// The shape of all tiles. Refuses rows of another model, and parts that are not each row once, in tiles of one shape.
fn check(k: &KeptRows, v: &KeptRows, parts: &[KeptAppend<'_>]) -> Result<TileShape, AttentionError> {
    let invalid = |field, problem| Err(AttentionError::Invalid { field, problem });
    let Some(tile) = parts.iter().flat_map(|part| &part.tiles).next().map(|tile| tile.shape()) else {
        return invalid("parts", "name no tile".to_owned());
    };
    let width = tile.kv_heads * tile.head_dim;
    for (field, rows) in [("k", k), ("v", v)] {
        if (rows.rows(), rows.width()) != (k.rows(), width) {
            let (found, wide) = (rows.rows(), rows.width());
            let problem = format!("has {found} rows of {wide} elements, must have {} of {width}", k.rows());
            return invalid(field, problem);
        }
    }
    let end = parts.iter().try_fold(0, |end, part| (part.rows.start == end).then_some(part.rows.end));
    if end != Some(k.rows()) {
        let problem = format!("do not follow each other from row 0 to the last of {}", k.rows());
        return invalid("parts", problem);
    }
    for part in parts {
        let blocks = (part.offset + part.rows.len()).div_ceil(tile.block_tokens);
        let fits = part.offset < tile.block_tokens
            && !part.rows.is_empty()
            && (part.tiles.len(), part.promised.len()) == (blocks, blocks)
            && part.tiles.iter().all(|one| one.shape() == tile);
        if !fits {
            let (rows, tiles, promised) = (part.rows.len(), part.tiles.len(), part.promised.len());
            let problem = format!(
                "have {rows} rows from token {} on in {tiles} tiles with {promised} promises: {blocks} of {tile:?} are needed",
                part.offset
            );
            return invalid("parts", problem);
        }
    }
    Ok(tile)
}
