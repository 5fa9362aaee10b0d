//! Random sequences with their summaries, and lists taken apart.

use std::collections::BTreeSet;

use longshore_attention::{
    CpuExecutor, HeadShape, KvDtype, PlanInput, PrefillPolicy, Queries, SparseWork, Tile, TileShape, Tiles,
    Visit,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Generator of a test; prints its seed, which a failing test shows.
pub(crate) fn generator(seed: u64) -> ChaCha8Rng {
    println!("seed {seed}");
    ChaCha8Rng::seed_from_u64(seed)
}

/// What varies between cases.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) heads: HeadShape,
    pub(crate) block: usize,
    pub(crate) dtype: KvDtype,
    pub(crate) stripe: usize,
    pub(crate) tokens: usize,
    /// Deviation of the queries.
    pub(crate) size: f32,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            heads: HeadShape { kv_heads: 2, group: 3, head_dim: 8 },
            block: 16,
            dtype: KvDtype::F32,
            stripe: 8,
            tokens: 700,
            size: 3.0,
        }
    }
}

impl Shape {
    /// Any shape, of up to `tokens` positions.
    pub(crate) fn random(rng: &mut ChaCha8Rng, tokens: usize) -> Self {
        let pick = |rng: &mut ChaCha8Rng, of: &[usize]| of[rng.random_range(0..of.len())];
        Self {
            heads: HeadShape {
                kv_heads: pick(rng, &[1, 2]),
                group: pick(rng, &[1, 3, 4, 7]),
                head_dim: pick(rng, &[8, 20, 64]),
            },
            block: pick(rng, &[16, 32, 64, 128]),
            dtype: KvDtype::ALL[rng.random_range(0..4)],
            stripe: pick(rng, &[4, 8, 16, 32]),
            tokens: rng.random_range(tokens / 2..tokens),
            size: [0.0, 1.0, 3.0, 12.0][rng.random_range(0..4)],
        }
    }

    pub(crate) fn case(self, rng: &mut ChaCha8Rng) -> Case {
        let HeadShape { kv_heads, head_dim, .. } = self.heads;
        let mut numbers = |count: usize, size: f32| -> Vec<f32> {
            (0..count).map(|_| (0..3).map(|_| rng.random_range(-size..=size)).sum()).collect()
        };
        let width = kv_heads * head_dim;
        let mut keys = numbers(self.tokens * width, 0.6);
        // Blocks differ, as they do in a text: a shift of its own for each.
        let shifts = numbers(self.tokens.div_ceil(self.block) * width, 0.6);
        for (index, key) in keys.iter_mut().enumerate() {
            *key += shifts[index / width / self.block * width + index % width];
        }
        let q = numbers(self.tokens * self.heads.query_heads() * head_dim, self.size);
        Case::new(self, &keys, q)
    }
}

/// A sequence, all of its positions with queries.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) shape: Shape,
    pub(crate) kv: Tiles,
    pub(crate) summaries: Tiles,
    pub(crate) spreads: Tiles,
    pub(crate) q: Vec<f32>,
    pub(crate) scale: f32,
    /// As stored, `[tokens, kv_heads, head_dim]`.
    pub(crate) keys: Vec<f32>,
    /// As stored, `[full blocks, kv_heads, head_dim]`.
    pub(crate) means: Vec<f32>,
    /// Variances of the elements of keys, likewise.
    pub(crate) variances: Vec<f32>,
}

impl Case {
    pub(crate) fn new(shape: Shape, keys: &[f32], q: Vec<f32>) -> Self {
        let HeadShape { kv_heads, head_dim, .. } = shape.heads;
        let width = kv_heads * head_dim;
        let tile = TileShape { block_tokens: shape.block, kv_heads, head_dim, dtype: shape.dtype };
        let tiles: Vec<Tile> = keys
            .chunks(shape.block * width)
            .map(|keys| {
                let mut stored = Tile::zeroed(tile);
                stored.write(0, keys, keys).unwrap();
                stored
            })
            .collect();
        let token = |token: usize| tiles[token / shape.block].read(token % shape.block).unwrap().0;
        let keys: Vec<f32> = (0..shape.tokens).flat_map(token).collect();
        let mean = |block: &[f32]| -> Vec<f32> {
            let sum = |i| block.iter().skip(i).step_by(width).map(|&x| f64::from(x)).sum::<f64>();
            (0..width).map(|i| (sum(i) / shape.block as f64) as f32).collect()
        };
        let means: Vec<f32> = keys.chunks_exact(shape.block * width).flat_map(mean).collect();
        let of_stripe = TileShape { block_tokens: shape.stripe.max(16), dtype: KvDtype::F32, ..tile };
        let variance = |(block, mean): (&[f32], &[f32])| -> Vec<f32> {
            let square = |i: usize, x: f32| (f64::from(x) - f64::from(mean[i])).powi(2);
            let sum = |i| block.iter().skip(i).step_by(width).map(|&x| square(i, x)).sum::<f64>();
            (0..width).map(|i| (sum(i) / shape.block as f64) as f32).collect()
        };
        let blocks = keys.chunks_exact(shape.block * width).zip(means.chunks_exact(width));
        let variances: Vec<f32> = blocks.flat_map(variance).collect();
        let stripes = |elements: &[f32]| {
            let stripe = |part: &[f32]| {
                let mut stripe = Tile::zeroed(of_stripe);
                stripe.write(0, part, part).unwrap();
                stripe
            };
            Tiles { shape: of_stripe, tiles: elements.chunks(shape.stripe * width).map(stripe).collect() }
        };
        let (summaries, spreads) = (stripes(&means), stripes(&variances));
        let scale = 1.0 / (head_dim as f32).sqrt();
        Self { shape, kv: Tiles { shape: tile, tiles }, summaries, spreads, q, scale, keys, means, variances }
    }

    /// Elements of a query row.
    pub(crate) fn row_width(&self) -> usize {
        self.shape.heads.query_heads() * self.shape.heads.head_dim
    }

    /// The query of a head at a position.
    pub(crate) fn query(&self, position: usize, head: usize) -> &[f32] {
        let dim = self.shape.heads.head_dim;
        &self.q[position * self.row_width() + head * dim..][..dim]
    }

    /// The key of a KV head at a position.
    pub(crate) fn key(&self, position: usize, kv_head: usize) -> &[f32] {
        let HeadShape { kv_heads, head_dim, .. } = self.shape.heads;
        &self.keys[(position * kv_heads + kv_head) * head_dim..][..head_dim]
    }

    /// The mean key of a block.
    pub(crate) fn mean(&self, block: usize, kv_head: usize) -> &[f32] {
        let HeadShape { kv_heads, head_dim, .. } = self.shape.heads;
        &self.means[(block * kv_heads + kv_head) * head_dim..][..head_dim]
    }

    /// The variances of the elements of a block's keys.
    pub(crate) fn variance(&self, block: usize, kv_head: usize) -> &[f32] {
        let HeadShape { kv_heads, head_dim, .. } = self.shape.heads;
        &self.variances[(block * kv_heads + kv_head) * head_dim..][..head_dim]
    }

    /// The call of all positions from `first` to `end`.
    pub(crate) fn input(&self, first: usize, end: usize) -> PlanInput<'_> {
        let width = self.row_width();
        PlanInput {
            queries: Queries {
                shape: self.shape.heads,
                first_position: first as u64,
                scale: self.scale,
                data: &self.q[first * width..end * width],
            },
            layer: 5,
            kv: &self.kv,
            first_block: 0,
            summaries: &self.summaries,
            stripe_blocks: self.shape.stripe as u32,
            dense_from: u64::MAX,
            spreads: Some(&self.spreads),
            cosines: None,
        }
    }

    pub(crate) fn plan(&self, policy: &PrefillPolicy) -> SparseWork {
        policy.plan(&CpuExecutor::serial(), &self.input(0, self.shape.tokens)).unwrap()
    }
}

/// What a list visits.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Seen {
    pub(crate) blocks: BTreeSet<usize>,
    pub(crate) columns: BTreeSet<usize>,
    pub(crate) means: BTreeSet<usize>,
}

/// Takes a list apart, and checks all that every list must hold; `first` is the position of row 0 of the call.
pub(crate) fn seen(case: &Case, work: &SparseWork, first: usize, kv_head: usize, tile: usize) -> Seen {
    let (block, stripe) = (case.shape.block, case.shape.stripe);
    let rows = work.rows(tile);
    let last = first + rows.end - 1;
    let mut seen = Seen::default();
    // (stripe, 0 exact, 1 columns, 2 means, 3 end; block or position): ascends.
    let mut before = (0, 0, 0);
    let mut ended = true;
    for visit in work.list(kv_head, tile) {
        let places: Vec<(usize, usize, usize)> = match *visit {
            Visit::Block(exact) => {
                let number = exact.tile as usize;
                assert_eq!(exact.first_position, (number * block) as u64);
                assert_eq!(
                    exact.len as usize,
                    block.min(last + 1 - number * block),
                    "length of block {number}"
                );
                assert!(seen.blocks.insert(number), "block {number} twice");
                vec![(number / stripe, 0, number)]
            }
            Visit::Columns { first, count } => {
                assert!((1..=block).contains(&(count as usize)));
                let columns = &work.columns()[first as usize..][..count as usize];
                let place = columns.iter().map(|column| {
                    let position = column.tile as usize * block + column.offset as usize;
                    assert_eq!(column.position, position as u64);
                    assert!(position <= last, "column {position} after {last}");
                    assert!(seen.columns.insert(position), "column {position} twice");
                    (column.tile as usize / stripe, 1, position)
                });
                place.collect()
            }
            Visit::Means { tile, first, keys } => {
                assert!(keys != 0 && first % 16 == 0);
                let bits = (0..64).filter(|bit| keys & (1 << bit) != 0);
                let place = bits.map(|bit| {
                    let number = tile as usize * stripe + first as usize + bit;
                    assert!(first as usize + bit < stripe);
                    assert!(seen.means.insert(number), "mean of block {number} twice");
                    (tile as usize, 2, number)
                });
                place.collect()
            }
            Visit::EndOfStripe => {
                assert!(!ended, "a stripe without anything");
                ended = true;
                before = (before.0, 3, 0);
                continue;
            }
        };
        for place in places {
            assert_eq!(
                ended,
                place.0 > before.0 || before == (0, 0, 0) && ended,
                "{before:?} then {place:?}"
            );
            assert!(place > before || before == (0, 0, 0), "{before:?} then {place:?}");
            (before, ended) = (place, false);
        }
    }
    assert!(ended, "the last stripe has no end");
    for number in (first + rows.start) / block..=last / block {
        assert!(seen.blocks.contains(&number), "the tile lies in block {number}");
    }
    let covered: BTreeSet<usize> = seen.columns.iter().map(|position| position / block).collect();
    assert!(covered.is_disjoint(&seen.blocks) && seen.means.is_disjoint(&seen.blocks), "a key twice");
    seen
}

/// Reads a policy.
pub(crate) fn policy(text: &str) -> PrefillPolicy {
    PrefillPolicy::parse(text, None).unwrap()
}
