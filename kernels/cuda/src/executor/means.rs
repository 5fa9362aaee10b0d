//! Means of full blocks that are made where their pages are, before tiles of either are written.

use std::sync::Arc;

use longshore_attention::{Error as AttentionError, PagedKv as _, Promise};
use longshore_model::KeptMeans;

use super::append::{check_all, known};
use super::pages::{Content, TilePages};
use super::{CudaExecutor, MEAN_EIGHTHS, SCORE_EIGHTHS, eighths, list_element};
use crate::{AppendCall, Buffer, Error, MeanBuilder, PageElement, Pinned, RowAppender};

impl CudaExecutor {
    /// Queues it; false: there are no pages for these means, or no room, and none was made.
    pub(super) fn make_means(&self, means: &KeptMeans<'_>) -> Result<bool, AttentionError> {
        check(means)?;
        self.unless_short(&self.fallbacks.means, || self.means_of(means))
    }

    fn means_of(&self, means: &KeptMeans<'_>) -> Result<bool, Error> {
        let (tile, shape) = (means.tile, means.summaries.shape());
        let element = list_element(tile);
        if element != tile.dtype.into() {
            return Ok(false);
        }
        let Some(blocks) = known(self.pages(tile, element, eighths(tile, element)))? else {
            return Ok(false);
        };
        let builder = MeanBuilder::new(&self.device, blocks.shape(), PageElement::F32);
        let visited = (means.visited && element != PageElement::F32).then_some((element, MEAN_EIGHTHS));
        let targets = std::iter::once((PageElement::F32, SCORE_EIGHTHS)).chain(visited);
        let targets: Result<Vec<_>, Error> =
            targets.map(|(element, eighths)| self.pages(shape, element, eighths)).collect();
        let (Some(builder), Some(targets)) = (known(builder)?, known(targets)?) else { return Ok(false) };
        blocks.check_promised(&sources(means))?;
        let first = means.summaries.len() - means.promised.len();
        let changes: Vec<(u64, u64)> = (first..)
            .zip(means.promised)
            .map(|(tile, promise)| (means.summaries.tile(tile).version(), promise.version()))
            .collect();
        for (pages, &(from, to)) in
            targets.iter().flat_map(|pages| changes.iter().map(move |one| (pages, one)))
        {
            // Where there is none, or others have it, one is made anew.
            let _ = pages.take_over(from, to);
        }
        let outcome = self.means_to((&blocks, &builder), &targets, means);
        if outcome.is_err() {
            // Some may have been written to: they are not what their old versions name any more.
            let promised: Vec<u64> = changes.iter().map(|&(_, to)| to).collect();
            targets.iter().for_each(|pages| pages.discard(&promised));
        }
        outcome.map(|()| true)
    }

    fn means_to(
        &self,
        (blocks, builder): (&TilePages, &MeanBuilder),
        targets: &[Arc<TilePages>],
        means: &KeptMeans<'_>,
    ) -> Result<(), Error> {
        let (count, summaries) = (means.blocks.len(), means.summaries);
        let sources = blocks.pin_contents(&sources(means))?;
        check_all(&sources, count)?;
        let first = summaries.len() - means.promised.len();
        let begun = |(tile, promise): (usize, &Promise)| {
            Content::Begun(promise.version(), Some(summaries.tile(tile)))
        };
        let begun: Vec<Content<'_>> = (first..).zip(means.promised).map(begun).collect();
        // Who holds some does not wait for more.
        let pinned: Vec<Pinned<'_>> =
            targets.iter().map(|pages| pages.pin_contents_beside(&begun)).collect::<Result<_, _>>()?;
        pinned.iter().try_for_each(|pinned| check_all(pinned, begun.len()))?;
        let bytes = count * means.tile.kv_heads * means.tile.head_dim * size_of::<f32>();
        let (keys, values) = (Buffer::new(&self.device, bytes)?, Buffer::new(&self.device, bytes)?);
        let table = Buffer::from_slice(&self.device, sources.addresses())?;
        builder.rows(table.whole(), count, (keys.whole(), values.whole()))?;
        let places = places(means);
        for (pages, pinned) in targets.iter().zip(&pinned) {
            let table = Buffer::from_slice(&self.device, &[pinned.addresses(), &places].concat())?;
            RowAppender::new(&self.device, pages.shape())?.launch(&AppendCall {
                keys: keys.whole(),
                values: values.whole(),
                rows: count,
                pages: table.whole(),
                places: table.whole().after(size_of_val(pinned.addresses())),
                blanks: 0,
            })?;
        }
        Ok(())
    }
}

/// The blocks.
fn sources(means: &KeptMeans<'_>) -> Vec<Content<'static>> {
    means.blocks.iter().map(|promise| Content::Promised(promise.version())).collect()
}

/// Of each block the key of the promised tiles, from the first on, that its mean becomes.
fn places(means: &KeptMeans<'_>) -> Vec<u64> {
    let first = means.summaries.len() - means.promised.len();
    let place = |block: u64| {
        let (tile, key) = means.summaries.place(block);
        ((tile - first) * means.summaries.shape().block_tokens + key) as u64
    };
    (means.first_block..).take(means.blocks.len()).map(place).collect()
}

/// Refuses tiles of another shape than the summaries are of, blocks that are not the next ones, and promises that are not those of their tiles of means.
fn check(means: &KeptMeans<'_>) -> Result<(), AttentionError> {
    let KeptMeans { tile, summaries, blocks, first_block, promised, .. } = means;
    if *tile != summaries.block_shape() {
        let problem =
            format!("are of blocks of {tile:?}, the summaries are of {:?}", summaries.block_shape());
        return Err(AttentionError::Invalid { field: "means", problem });
    }
    let end = first_block + blocks.len() as u64;
    let next = *first_block == summaries.blocks().end && !blocks.is_empty();
    let tiles = next.then(|| summaries.place(*first_block).0..summaries.place(end - 1).0 + 1);
    if tiles.is_some_and(|tiles| tiles.end == summaries.len() && tiles.len() == promised.len()) {
        return Ok(());
    }
    let problem = format!(
        "are {} from block {first_block} on with {} promises, the next is block {} and there are {} tiles",
        blocks.len(),
        promised.len(),
        summaries.blocks().end,
        summaries.len()
    );
    Err(AttentionError::Invalid { field: "means", problem })
}
