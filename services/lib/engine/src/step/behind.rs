//! Layers that are queued on a device, whose keys and values are on their way to the host: their tiles are written later.

use std::collections::VecDeque;

use longshore_attention::{Promise, PromisedMeans, Tile};
use longshore_model::{Activations, KeptAppend, Promised, RowsRead};

use crate::{Engine, Error, StepInput, StepObserver};

/// Layers that stay behind while the next one is queued: with more of them more rows would lie on the device and in staging memory.
pub(super) const LAYERS_BEHIND: usize = 1;

/// Keys and values of a layer.
#[derive(Debug)]
struct LayerBehind {
    layer: usize,
    keys: RowsRead,
    values: RowsRead,
    /// Of each sequence the versions that the tiles get which its rows go to: their pages are made. None of any, where there are no pages.
    promised: Vec<Vec<Promise>>,
    /// The same of the tiles of means; `None`: a policy needs those of the host.
    means: Vec<Option<PromisedMeans>>,
}

/// Layers whose tiles are not written yet, in order. Dropped, none of them will be, and nothing has their promised versions.
#[derive(Debug)]
pub(crate) struct Behind<'a> {
    layers: VecDeque<LayerBehind>,
    /// Row of each sequence's first token.
    first: &'a [usize],
}

impl<'a> Behind<'a> {
    pub(super) fn new(first: &'a [usize]) -> Self {
        Self { layers: VecDeque::new(), first }
    }

    /// Whether all tiles are written.
    pub(super) fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// Whether the tiles of a layer are written, or pages are there in their stead.
    pub(crate) fn has_pages(&self, layer: usize) -> bool {
        self.of(layer).is_none_or(|behind| !behind.promised.is_empty())
    }

    /// Whether a policy has what it reads of a sequence in a layer: tiles that are written, or pages of them and of means.
    pub(crate) fn has_means(&self, layer: usize, input: usize) -> bool {
        self.of(layer).is_none_or(|behind| behind.means.get(input).is_some_and(Option::is_some))
    }

    /// The promised versions of a sequence in a layer; none where its tiles are written.
    pub(crate) fn promised(&self, layer: usize, input: usize) -> Promised<'_> {
        let Some(behind) = self.of(layer) else { return Promised::default() };
        let means = behind.means.get(input).and_then(Option::as_ref);
        Promised {
            tiles: behind.promised.get(input).map_or(&[], Vec::as_slice),
            means: means.map_or(&[], PromisedMeans::tiles),
        }
    }

    fn of(&self, layer: usize) -> Option<&LayerBehind> {
        self.layers.iter().find(|behind| behind.layer == layer)
    }
}

impl Engine {
    /// Begins to bring keys and values of a layer to the host. Where an executor takes them on their device they become pages first.
    pub(super) fn begin_keys(
        &self,
        layer: usize,
        batch: &mut [StepInput<'_>],
        (k, v): (Activations, Activations),
        behind: &mut Behind<'_>,
    ) -> Result<(), Error> {
        let promised = self.promise(layer, batch, (&k, &v), behind.first)?;
        let (keys, values) = (k.begin_read()?, v.begin_read()?);
        let means = self.promise_means(layer, batch, &promised)?;
        behind.layers.push_back(LayerBehind { layer, keys, values, promised, means });
        Ok(())
    }

    /// Pages of the means of blocks that were promised, for those sequences whose policy chooses by them.
    fn promise_means(
        &self,
        layer: usize,
        batch: &mut [StepInput<'_>],
        promised: &[Vec<Promise>],
    ) -> Result<Vec<Option<PromisedMeans>>, Error> {
        let Some(kept) = &self.kept else { return Ok(Vec::new()) };
        let means = batch.iter_mut().zip(promised).map(|(input, promised)| {
            input.sequence.promise_means(layer, promised, |means| Ok(kept.append_means(means)?))
        });
        means.collect()
    }

    /// Pages of the rows of all sequences, under versions that their tiles get later.
    fn promise(
        &self,
        layer: usize,
        batch: &[StepInput<'_>],
        (k, v): (&Activations, &Activations),
        first: &[usize],
    ) -> Result<Vec<Vec<Promise>>, Error> {
        let on_device = k.on_device().is_some() && v.on_device().is_some();
        let Some(kept) = self.kept.as_ref().filter(|_| on_device) else { return Ok(Vec::new()) };
        let open: Vec<(usize, Vec<&Tile>)> =
            batch.iter().map(|input| input.sequence.open_tiles(layer)).collect();
        let promise = |tiles: &Vec<&Tile>| tiles.iter().map(|_| Tile::promise()).collect();
        let promised: Vec<Vec<Promise>> = open.iter().map(|(_, tiles)| promise(tiles)).collect();
        let mut parts = Vec::with_capacity(batch.len());
        for (((input, &first), (offset, tiles)), promised) in batch.iter().zip(first).zip(open).zip(&promised)
        {
            parts.push(KeptAppend { rows: first..first + input.tokens.len(), offset, tiles, promised });
        }
        Ok(if kept.append_kept(k, v, &parts)? { promised } else { Vec::new() })
    }

    /// Writes the tiles of layers that are behind, in order, until so many are left, and tells of them.
    pub(crate) fn settle(
        &self,
        behind: &mut Behind<'_>,
        left: usize,
        batch: &mut [StepInput<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<(), Error> {
        let heads = self.backend().config().heads;
        let width = heads.kv_heads * heads.head_dim;
        while behind.layers.len() > left {
            let Some(LayerBehind { layer, keys, values, promised, means }) = behind.layers.pop_front() else {
                break;
            };
            let (keys, values) = RowsRead::finish_both(keys, values)?;
            let promised = promised.into_iter().chain(std::iter::repeat_with(Vec::new));
            let means = means.into_iter().map(Option::unwrap_or_default);
            let means = means.chain(std::iter::repeat_with(PromisedMeans::default));
            let promised = promised.zip(means);
            for ((input, &first), (promised, means)) in batch.iter_mut().zip(behind.first).zip(promised) {
                let elements = first * width..(first + input.tokens.len()) * width;
                let rows = (&keys[elements.clone()], &values[elements]);
                input.sequence.write(&self.pool, layer, rows, promised)?;
                input.sequence.summarise(&self.pool, layer, means)?;
            }
            observer.layer_done(layer, batch)?;
        }
        Ok(())
    }
}
