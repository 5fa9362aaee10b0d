//! One sequence through a backend, by a plain loop over the layers: what engines do, without their queues.

use longshore_attention::{
    AttendItem, ExactBlock, Executor, KvDtype, Queries, Tile, TileShape, Tiles, WorkList,
};
use longshore_model::{Activations, Backend, Error};

const BLOCK_TOKENS: usize = 16;

/// A sequence, its keys and values in memory of the host.
pub(crate) struct Walk<'a> {
    backend: &'a dyn Backend,
    executor: &'a dyn Executor,
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
        Self { backend, executor, first_position, tokens: 0, layers }
    }

    /// Appends tokens; returns their rows of the residual stream after the last layer.
    pub(crate) fn append(&mut self, tokens: &[u32]) -> Result<Activations, Error> {
        let first = self.tokens;
        self.tokens += tokens.len();
        let positions: Vec<u64> =
            (first..self.tokens).map(|token| self.first_position + token as u64).collect();
        let mut x = self.backend.embed(tokens)?;
        for layer in 0..self.layers.len() {
            let qkv = self.backend.qkv(layer, &x, &positions)?;
            let width = qkv.k.len() / tokens.len();
            for (row, (k, v)) in qkv.k.chunks_exact(width).zip(qkv.v.chunks_exact(width)).enumerate() {
                self.write(layer, first + row, k, v);
            }
            let attention = self.attend(layer, first, &qkv.q)?;
            x = self.backend.finish(layer, x, &attention)?;
        }
        Ok(x)
    }

    /// Appends tokens; returns the logits of all of them.
    pub(crate) fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, Error> {
        let x = self.append(tokens)?;
        self.backend.logits(&x, &(0..tokens.len()).collect::<Vec<_>>())
    }

    fn write(&mut self, layer: usize, token: usize, k: &[f32], v: &[f32]) {
        let kv = &mut self.layers[layer];
        if token == kv.tiles.len() * BLOCK_TOKENS {
            kv.tiles.push(Tile::zeroed(kv.shape));
        }
        kv.tiles[token / BLOCK_TOKENS].write(token % BLOCK_TOKENS, k, v).expect("a token of the tile");
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
        let failed = |error| Error::Device { exhausted: false, source: Box::new(error) };
        let partials = self.executor.attend(&[item]).map_err(failed)?;
        Ok(partials.into_iter().next().expect("a partial for the item").finish())
    }
}

/// The likeliest token; of equals the lowest.
pub(crate) fn likeliest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i)));
    best.map_or(0, |(token, _)| token as u32)
}
