//! One sequence through a backend, by a plain loop over the layers: what engines do, without their queues.

use std::ops::Range;

use longshore_attention::{
    AttendItem, ExactBlock, Executor, KvDtype, Promise, Queries, Tile, TileShape, Tiles, WorkList,
};
use longshore_model::{
    Activations, Backend, Error, KeptAppend, KeptAttention, KeptPart, KeptQkv, KeptVisits, RowsRead,
};

const BLOCK_TOKENS: usize = 16;

/// A sequence, its keys and values in memory of the host.
pub(crate) struct Walk<'a> {
    backend: &'a dyn Backend,
    executor: &'a dyn Executor,
    kept: Option<&'a dyn KeptAttention>,
    first_position: u64,
    tokens: usize,
    layers: Vec<Tiles>,
}

impl<'a> Walk<'a> {
    /// An empty sequence whose first token is at `first_position`.
    pub(crate) fn new(
        backend: &'a dyn Backend,
        executor: &'a dyn Executor,
        (dtype, first_position): (KvDtype, u64),
    ) -> Self {
        let config = backend.config();
        let (kv_heads, head_dim) = (config.heads.kv_heads, config.heads.head_dim);
        let shape = TileShape { block_tokens: BLOCK_TOKENS, kv_heads, head_dim, dtype };
        let layers = (0..config.layers).map(|_| Tiles { shape, tiles: Vec::new() }).collect();
        Self { backend, executor, kept: None, first_position, tokens: 0, layers }
    }

    /// The same with rows that stay where the backend leaves them, where `kept` takes them: keys and values become pages there, and tiles are written
    /// when what follows is queued.
    pub(crate) fn with_kept(self, kept: Option<&'a dyn KeptAttention>) -> Self {
        Self { kept, ..self }
    }

    /// Appends tokens; returns their rows of the residual stream after the last layer.
    pub(crate) fn append(&mut self, tokens: &[u32]) -> Result<Activations, Error> {
        let first = self.tokens;
        self.tokens += tokens.len();
        let positions: Vec<u64> =
            (first..self.tokens).map(|token| self.first_position + token as u64).collect();
        let mut x = self.backend.embed(tokens)?;
        for layer in 0..self.layers.len() {
            let KeptQkv { q, k, v } = self.backend.qkv_kept(layer, &x, &positions)?;
            let open = self.open(layer, first);
            let promised = self.promise(layer, first, (&k, &v))?;
            let reads = (k.begin_read()?, v.begin_read()?);
            match self.attend_kept(layer, first, (&q, &promised))? {
                Some(attention) => {
                    x = self.backend.finish_kept(layer, x, &attention)?;
                    self.write(layer, (first, open), reads, promised)?;
                }
                None => {
                    self.write(layer, (first, open), reads, promised)?;
                    let attention = self.attend(layer, first, &q.to_host()?)?;
                    let attention = Activations::from_host(q.width(), attention);
                    x = self.backend.finish_kept(layer, x, &attention)?;
                }
            }
        }
        Ok(x)
    }

    /// Appends tokens; returns the logits of all of them.
    pub(crate) fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, Error> {
        let x = self.append(tokens)?;
        self.backend.logits(&x, &(0..tokens.len()).collect::<Vec<_>>())
    }

    /// Makes tiles for the new tokens, from `first` on; which of them these go to.
    fn open(&mut self, layer: usize, first: usize) -> Range<usize> {
        let (kv, end) = (&mut self.layers[layer], self.tokens.div_ceil(BLOCK_TOKENS));
        let shape = kv.shape;
        kv.tiles.resize_with(end, || Tile::zeroed(shape));
        first / BLOCK_TOKENS..end
    }

    /// Pages of the new rows, before their tiles; none where nobody makes them.
    fn promise(
        &self,
        layer: usize,
        first: usize,
        (k, v): (&Activations, &Activations),
    ) -> Result<Vec<Promise>, Error> {
        let Some(kept) = self.kept else { return Ok(Vec::new()) };
        let tiles: Vec<&Tile> = self.layers[layer].tiles[first / BLOCK_TOKENS..].iter().collect();
        let promised: Vec<Promise> = tiles.iter().map(|_| Tile::promise()).collect();
        let part = KeptAppend { rows: 0..k.rows(), offset: first % BLOCK_TOKENS, tiles, promised: &promised };
        let has_pages = kept.append_kept(k, v, &[part]).map_err(failed)?;
        Ok(if has_pages { promised } else { Vec::new() })
    }

    fn write(
        &mut self,
        layer: usize,
        (first, open): (usize, Range<usize>),
        (keys, values): (RowsRead, RowsRead),
        promised: Vec<Promise>,
    ) -> Result<(), Error> {
        let (keys, values) = RowsRead::finish_both(keys, values)?;
        let kv = &mut self.layers[layer];
        let width = kv.shape.kv_heads * kv.shape.head_dim;
        let mut promised = promised.into_iter();
        for tile in open {
            let from = first.max(tile * BLOCK_TOKENS);
            let to = self.tokens.min((tile + 1) * BLOCK_TOKENS);
            let rows = (from - first) * width..(to - first) * width;
            let (offset, keys, values) = (from % BLOCK_TOKENS, &keys[rows.clone()], &values[rows]);
            let tile = &mut kv.tiles[tile];
            let written = match promised.next() {
                Some(promise) => tile.write_promised(promise, offset, keys, values),
                None => tile.write(offset, keys, values),
            };
            written.map_err(failed)?;
        }
        Ok(())
    }

    fn attend_kept(
        &self,
        layer: usize,
        first: usize,
        (q, promised): (&Activations, &[Promise]),
    ) -> Result<Option<Activations>, Error> {
        let Some(kept) = self.kept else { return Ok(None) };
        let config = self.backend.config();
        let visits = KeptVisits::All { kv: &self.layers[layer], first_key: self.first_position, promised };
        let part = KeptPart { rows: 0..q.rows(), first_position: self.first_position + first as u64, visits };
        let shape = (config.heads, config.attention_scale());
        kept.attend_kept(shape, q, &[part]).map_err(failed)
    }

    fn attend(&self, layer: usize, first: usize, q: &[f32]) -> Result<Vec<f32>, Error> {
        let config = self.backend.config();
        let kv = &self.layers[layer];
        let first_position = self.first_position + first as u64;
        let queries =
            Queries { shape: config.heads, first_position, scale: config.attention_scale(), data: q };
        let block = |tile: usize| ExactBlock {
            tile: tile as u32,
            first_position: self.first_position + (tile * BLOCK_TOKENS) as u64,
            len: (self.tokens - tile * BLOCK_TOKENS).min(BLOCK_TOKENS) as u32,
        };
        let work = WorkList { exact: (0..kv.tiles.len()).map(block).collect(), ..WorkList::default() };
        let item = AttendItem { queries, kv, work: &work, initial: None };
        let partials = self.executor.attend(&[item]).map_err(failed)?;
        Ok(partials.into_iter().next().expect("a partial for the item").finish())
    }
}

fn failed(error: longshore_attention::Error) -> Error {
    Error::Device { exhausted: false, source: Box::new(error) }
}

/// The likeliest token; of equals the lowest.
pub(crate) fn likeliest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i)));
    best.map_or(0, |(token, _)| token as u32)
}
