//! Planted heads: queries, keys and values whose heavy blocks are known because they were put there.
//!
//! Queries and keys are noise whose logits deviate by 1 (nats), plus what the kind of head adds. Values follow the segments of the
//! text (runs of 64 to 512 positions with one of 64 topics), with as much noise.

use anyhow::Result;
use longshore_attention::{HeadShape, KvDtype, Tile, TileShape, Tiles};

use super::layer::{Layer, QueryTile};
use crate::random::Random;

/// Elements of a head, and of the planted heads' groups.
const DIM: usize = 64;
const HEADS: HeadShape = HeadShape { kv_heads: 2, group: 3, head_dim: DIM };
const BLOCK: usize = 64;
const TOPICS: usize = 64;

/// Elements that tell positions: pairs from here to the end.
const TURNING: usize = 48;

/// What a head looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Everything, a little more what is of its topic (2 nats): its mass is on thousands of keys.
    Diffuse,
    /// The segments of its topic (8 nats).
    Clustered,
    /// The same, but half of a segment's keys are the opposite of the others: their mean tells nothing.
    Cancelling,
    /// Every second row: four adjacent keys (14 nats) anywhere before it.
    Phrase,
    /// Every second row: one key (14 nats) anywhere before it.
    Needle,
    /// The first key (12 nats), whose value is nearly nothing, then everything.
    Sink,
    /// What is near: 12 nats at its own position, half of it 300 positions before.
    Local,
    /// What is 1,500 positions before (18 nats).
    Slash,
    /// Sink (8), near (6), topic (6) and, every fourth row, a needle (12).
    Mixed,
}

impl Kind {
    pub(super) const ALL: [Self; 9] = [
        Self::Diffuse,
        Self::Clustered,
        Self::Cancelling,
        Self::Phrase,
        Self::Needle,
        Self::Sink,
        Self::Local,
        Self::Slash,
        Self::Mixed,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Diffuse => "diffuse",
            Self::Clustered => "clustered",
            Self::Cancelling => "cancelling",
            Self::Phrase => "phrase",
            Self::Needle => "needle",
            Self::Sink => "sink",
            Self::Local => "local",
            Self::Slash => "slash",
            Self::Mixed => "mixed",
        }
    }

    fn recipe(self) -> Recipe {
        let none = Recipe::default();
        match self {
            Self::Diffuse => Recipe { topic: 2.0, ..none },
            Self::Clustered => Recipe { topic: 8.0, ..none },
            Self::Cancelling => Recipe { topic: 8.0, cancelling: true, ..none },
            Self::Phrase => Recipe { needle: 14.0, every: 2, keys: 4, ..none },
            Self::Needle => Recipe { needle: 14.0, every: 2, keys: 1, ..none },
            Self::Sink => Recipe { sink: 12.0, ..none },
            Self::Local => Recipe { near: 12.0, ..none },
            Self::Slash => Recipe { near: 18.0, behind: 1500.0, quickest: 0, ..none },
            Self::Mixed => {
                Recipe { sink: 8.0, near: 6.0, topic: 6.0, needle: 12.0, every: 4, keys: 1, ..none }
            }
        }
    }
}

/// Logits that a kind adds, in nats.
#[derive(Debug, Clone, Copy)]
struct Recipe {
    topic: f32,
    cancelling: bool,
    sink: f32,
    /// At the position that is looked at, falling with the distance from it.
    near: f32,
    /// How far behind that position is.
    behind: f32,
    /// First of the turning pairs that take part: pair `i` turns once in `32 × 4^i` positions.
    quickest: usize,
    needle: f32,
    /// One row in so many looks for a needle.
    every: usize,
    /// Adjacent keys of a needle.
    keys: usize,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            topic: 0.0,
            cancelling: false,
            sink: 0.0,
            near: 0.0,
            behind: 0.0,
            quickest: 2,
            needle: 0.0,
            every: 1,
            keys: 1,
        }
    }
}

/// All kinds at `tokens` positions (rounded down to whole blocks), with query tiles at these positions.
pub(super) fn layers(tokens: usize, first_positions: &[u64]) -> Result<Vec<Layer>> {
    Kind::ALL.into_iter().map(|kind| layer(kind, tokens / BLOCK * BLOCK, first_positions)).collect()
}

fn layer(kind: Kind, tokens: usize, first_positions: &[u64]) -> Result<Layer> {
    let recipe = kind.recipe();
    let mut heads: Vec<Head> =
        (0..HEADS.kv_heads as u64).map(|head| Head::new(kind, recipe, head, tokens)).collect();
    let rows = longshore_attention::QUERY_TILE;
    // Queries first: needles are put where they look.
    let mut tiles = Vec::with_capacity(first_positions.len());
    for &first_position in first_positions {
        let mut data = Vec::with_capacity(rows * HEADS.query_heads() * DIM);
        for row in 0..rows {
            for head in &mut heads {
                head.queries(first_position as usize, row, &mut data);
            }
        }
        tiles.push(QueryTile { first_position, data });
    }
    let shape =
        TileShape { block_tokens: BLOCK, kv_heads: HEADS.kv_heads, head_dim: DIM, dtype: KvDtype::F32 };
    let mut stored = Vec::with_capacity(tokens / BLOCK);
    for block in 0..tokens / BLOCK {
        let mut tile = Tile::zeroed(shape);
        let row = |of: fn(&Head) -> &[f32]| -> Vec<f32> {
            let positions = block * BLOCK..(block + 1) * BLOCK;
            positions
                .flat_map(|at| heads.iter().flat_map(move |head| &of(head)[at * DIM..][..DIM]))
                .copied()
                .collect()
        };
        tile.write(0, &row(|head| &head.keys), &row(|head| &head.values))?;
        stored.push(tile);
    }
    let scale = 1.0 / (DIM as f32).sqrt();
    Layer::new(kind.name().to_owned(), (HEADS, scale), Tiles { shape, tiles: stored }, tokens, tiles)
}

/// Keys and values of one KV head.
struct Head {
    recipe: Recipe,
    random: Random,
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Of each position.
    topics: Vec<usize>,
    /// Unit vectors.
    directions: Vec<Vec<f32>>,
    sink: Vec<f32>,
}

impl Head {
    fn new(kind: Kind, recipe: Recipe, number: u64, tokens: usize) -> Self {
        let mut random = Random::of("planted", &[kind as u64, number, tokens as u64]);
        let topics = topics(tokens, &mut random);
        let directions: Vec<Vec<f32>> = (0..TOPICS).map(|_| unit(&mut random)).collect();
        let sink = unit(&mut random);
        let mut keys: Vec<f32> = (0..tokens * DIM).map(|_| random.normal()).collect();
        let means: Vec<f32> = (0..TOPICS * DIM).map(|_| random.normal()).collect();
        let mut values: Vec<f32> = (0..tokens * DIM).map(|_| random.normal()).collect();
        for (at, &topic) in topics.iter().enumerate() {
            let sign = if recipe.cancelling && random.below(2) == 0 { -1.0 } else { 1.0 };
            let key = &mut keys[at * DIM..][..DIM];
            add(key, &directions[topic], sign * strength(recipe.topic));
            turn(key, at as f32, recipe);
            add(&mut values[at * DIM..][..DIM], &means[topic * DIM..][..DIM], 1.0);
        }
        if recipe.sink > 0.0 {
            add(&mut keys[..DIM], &sink, strength(recipe.sink));
            values[..DIM].iter_mut().for_each(|v| *v *= 0.02);
        }
        Self { recipe, random, keys, values, topics, directions, sink }
    }

    /// Appends the queries of the group's heads in a row of the tile at `first`; puts the needle that they look for.
    fn queries(&mut self, first: usize, row: usize, data: &mut Vec<f32>) {
        let (recipe, at) = (self.recipe, first + row);
        let needle =
            (recipe.needle > 0.0 && row.is_multiple_of(recipe.every)).then(|| self.put_needle(first));
        for _ in 0..HEADS.group {
            let mut query: Vec<f32> = (0..DIM).map(|_| self.random.normal()).collect();
            // A tile looks for one topic: that of its first row.
            add(&mut query, &self.directions[self.topics[first]], strength(recipe.topic));
            turn(&mut query, at as f32 - recipe.behind, recipe);
            add(&mut query, &self.sink, strength(recipe.sink));
            if let Some(needle) = &needle {
                add(&mut query, needle, strength(recipe.needle));
            }
            data.extend_from_slice(&query);
        }
    }

    /// Makes some adjacent keys before `end` what a row looks for; what that is.
    fn put_needle(&mut self, end: usize) -> Vec<f32> {
        let needle = unit(&mut self.random);
        let place = self.random.below(end - self.recipe.keys);
        for at in place..place + self.recipe.keys {
            add(&mut self.keys[at * DIM..][..DIM], &needle, strength(self.recipe.needle));
        }
        needle
    }
}

/// Runs of 64 to 512 positions with one topic each.
fn topics(tokens: usize, random: &mut Random) -> Vec<usize> {
    let mut topics = Vec::with_capacity(tokens);
    while topics.len() < tokens {
        let (topic, run) = (random.below(TOPICS), 64 + random.below(449));
        topics.extend(std::iter::repeat_n(topic, run.min(tokens - topics.len())));
    }
    topics
}

/// Length of the part of a query and of a key along one direction that adds a logit of `nats`.
fn strength(nats: f32) -> f32 {
    (nats * (DIM as f32).sqrt()).sqrt()
}

fn add(to: &mut [f32], direction: &[f32], length: f32) {
    to.iter_mut().zip(direction).for_each(|(to, x)| *to += length * x);
}

/// Adds what tells the position: in each turning pair that takes part a vector of one length, turned.
fn turn(to: &mut [f32], position: f32, recipe: Recipe) {
    let pairs = (DIM - TURNING) / 2;
    let length = strength(recipe.near / (pairs - recipe.quickest) as f32);
    for pair in recipe.quickest..pairs {
        let turns = position / (32.0 * 4f32.powi(pair as i32));
        let (sin, cos) = (turns.fract() * std::f32::consts::TAU).sin_cos();
        to[TURNING + 2 * pair] += length * cos;
        to[TURNING + 2 * pair + 1] += length * sin;
    }
}

/// A random direction among the elements that do not turn.
fn unit(random: &mut Random) -> Vec<f32> {
    let mut unit: Vec<f32> = (0..DIM).map(|i| if i < TURNING { random.normal() } else { 0.0 }).collect();
    let norm = unit.iter().map(|x| x * x).sum::<f32>().sqrt();
    unit.iter_mut().for_each(|x| *x /= norm);
    unit
}

#[cfg(test)]
mod tests {
    use longshore_attention::CpuExecutor;

    use super::*;

    /// Shares of a tile's mass by block before it, of one KV head.
    fn masses(kind: Kind) -> Vec<f64> {
        let layer = layer(kind, 8192, &[8128]).unwrap();
        let truth = layer.truth(&CpuExecutor::serial(), &layer.tiles[0]).unwrap();
        let rows = (longshore_attention::QUERY_TILE * HEADS.group) as f64;
        truth.masses[0].iter().map(|mass| mass / rows).collect()
    }

    fn heaviest(masses: &[f64], count: usize) -> f64 {
        let mut sorted = masses.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted[..count].iter().sum()
    }

    #[test]
    fn heavy_blocks_are_where_they_were_put() {
        let blocks = 8128 / BLOCK;
        let diffuse = masses(Kind::Diffuse);
        assert!(heaviest(&diffuse, blocks / 5) < 0.6, "{}", heaviest(&diffuse, blocks / 5));
        assert!(heaviest(&masses(Kind::Clustered), blocks / 5) > 0.9);
        assert!(masses(Kind::Sink)[0] > 0.5);
        // The tile's own blocks are not counted.
        assert!(masses(Kind::Local)[blocks - 5..].iter().sum::<f64>() > 0.25);
        let behind = (8128 - 1500) / BLOCK;
        assert!(masses(Kind::Slash)[behind - 2..=behind + 2].iter().sum::<f64>() > 0.4);
        // Half of the rows have a needle each: no few blocks have all of them.
        assert!(heaviest(&masses(Kind::Needle), 17) > 0.4 && heaviest(&masses(Kind::Needle), 4) < 0.3);
    }

    #[test]
    fn planted_heads_do_not_change() {
        let [a, b] = [0, 1].map(|_| layer(Kind::Mixed, 2048, &[1024, 1504]).unwrap());
        assert!(a.tiles == b.tiles && a.tiles.len() == 2);
        let c = layer(Kind::Local, 2048, &[1024, 1504]).unwrap();
        assert!(a.tiles != c.tiles);
    }
}
