//! What policies visit of a prompt, and attention over these lists.

use std::sync::Arc;

use longshore_attention::{
    CpuExecutor, Executor, HeadShape, KvDtype, Partials, PlanInput, PrefillPolicy, QUERY_TILE, Queries,
    SparseItem, SparseWork, Summaries, Tile, TileShape, Tiles, Visit,
};

use super::Twin;
use super::file::Arrays;
use crate::selftest::executor::{distance, refused};
use crate::selftest::material::{Random, random_tiles, rounded};
use crate::selftest::plan::lean;
use crate::{CudaExecutor, Device, Error, PageElement};

const HEADS: HeadShape = HeadShape { kv_heads: 1, group: 2, head_dim: 64 };
const SHAPE: TileShape =
    TileShape { block_tokens: 16, kv_heads: HEADS.kv_heads, head_dim: HEADS.head_dim, dtype: KvDtype::F16 };
const STRIPE: u32 = 8;
/// Positions before the first row, and rows.
const BEFORE: usize = 256;
const ROWS: usize = 2 * QUERY_TILE;
const PAGE_BYTES: usize = 1 << 22;

/// By policy, the name of its lists.
const POLICIES: [(&str, &str); 4] = [
    (
        "pooled_alpha",
        "blocks:scorer=pooled,selector=alpha,alpha=0.5,dense_layers=0,min_positions=0,last_tiles=0",
    ),
    (
        "normalised_mass",
        "blocks:scorer=row-normalised,selector=mass,gamma=0.5,dense_layers=0,min_positions=0,last_tiles=0",
    ),
    (
        "pooled_top_k",
        "blocks:scorer=pooled,selector=top-k,k=4,correction=off,dense_layers=0,min_positions=0,last_tiles=0",
    ),
    ("vertical_slash", "minference:vertical=20,slash=40,dense_layers=0,min_positions=0"),
];

/// Those whose lists are attended to: blocks with means of the others, and blocks with columns.
const ATTENDED: [&str; 2] = ["normalised_mass", "vertical_slash"];

pub(super) struct Selection;

/// A prompt.
struct Prompt {
    queries: Vec<f32>,
    tiles: Tiles,
    summaries: Summaries,
}

impl Prompt {
    fn new(inputs: &Arrays) -> Result<Self, Error> {
        let bodies = inputs.get::<u8>("tiles")?;
        let tile = |body| Tile::from_bytes(SHAPE, body).map_err(refused);
        let tiles = bodies.chunks(SHAPE.bytes()).map(tile).collect::<Result<Vec<_>, _>>()?;
        let mut summaries = Summaries::new(SHAPE, STRIPE, 0).map_err(refused)?;
        for (block, tile) in tiles.iter().enumerate() {
            summaries.push(block as u64, tile).map_err(refused)?;
        }
        Ok(Self { queries: inputs.get("queries")?, tiles: Tiles { shape: SHAPE, tiles }, summaries })
    }

    fn queries(&self) -> Queries<'_> {
        Queries { shape: HEADS, first_position: BEFORE as u64, scale: 0.125, data: &self.queries }
    }

    fn plan(&self, executor: &dyn Executor, policy: &str) -> Result<SparseWork, Error> {
        let policy = PrefillPolicy::parse(policy, None).map_err(refused)?;
        let (spreads, cosines) = (self.summaries.spreads(), |block, head| self.summaries.cosine(block, head));
        let input = PlanInput {
            queries: self.queries(),
            layer: 5,
            kv: &self.tiles,
            first_block: 0,
            summaries: &self.summaries,
            stripe_blocks: STRIPE,
            dense_from: u64::MAX,
            spreads: Some(&spreads),
            cosines: Some(&cosines),
        };
        executor.plan(&policy, &input).map_err(refused)
    }

    fn attend(&self, executor: &dyn Executor, work: &SparseWork) -> Result<Partials, Error> {
        let item = SparseItem {
            queries: self.queries(),
            kv: &self.tiles,
            summaries: &self.summaries,
            work,
            earlier: None,
            stripe: None,
            skip_below: None,
        };
        let mut partials = executor.attend_sparse(&[item]).map_err(refused)?;
        Ok(partials.pop().expect("one partial for one item"))
    }
}

/// A plan as words: ends of rows; of each list its length and its visits, five words each, and columns.
fn words(work: &SparseWork) -> Vec<u32> {
    let mut words: Vec<u32> = (0..work.tiles()).map(|tile| work.rows(tile).end as u32).collect();
    for kv_head in 0..work.kv_heads() {
        for tile in 0..work.tiles() {
            let visits = work.list(kv_head, tile);
            words.push(visits.len() as u32);
            words.extend(visits.iter().flat_map(|visit| match *visit {
                Visit::Block(block) => [0, block.tile, block.first_position as u32, block.len, 0],
                Visit::Columns { first, count } => [1, first, count, 0, 0],
                Visit::Means { tile, first, keys } => [2, tile, first, keys as u32, (keys >> 32) as u32],
                Visit::EndOfStripe => [3, 0, 0, 0, 0],
            }));
        }
    }
    words.extend(
        work.columns().iter().flat_map(|column| [column.tile, column.offset, column.position as u32]),
    );
    words
}

impl Twin for Selection {
    fn inputs(&self) -> Result<Arrays, Error> {
        let mut random = Random(73);
        let shape = TileShape { dtype: KvDtype::F32, ..SHAPE };
        let mut tiles = random_tiles(&mut random, shape, (BEFORE + ROWS) / SHAPE.block_tokens, 0.5);
        let mut bodies = Vec::new();
        for tile in &mut tiles {
            lean(tile, &mut random);
            let mut narrow = Tile::zeroed(SHAPE);
            for token in 0..SHAPE.block_tokens {
                let (keys, values) = tile.read(token).map_err(refused)?;
                narrow.write(token, &keys, &values).map_err(refused)?;
            }
            bodies.extend_from_slice(narrow.as_bytes());
        }
        let mut queries = random.numbers(ROWS * HEADS.query_heads() * HEADS.head_dim, 2.0);
        rounded(PageElement::F16, &mut queries);
        Ok(Arrays::default().with("queries", &queries).with("tiles", &bodies))
    }

    fn on_cpu(&self, inputs: &Arrays) -> Result<Arrays, Error> {
        let (prompt, cpu) = (Prompt::new(inputs)?, CpuExecutor::serial());
        let mut results = Arrays::default();
        for (name, policy) in POLICIES {
            let work = prompt.plan(&cpu, policy)?;
            results = results.with(name, &words(&work));
            if ATTENDED.contains(&name) {
                let attention = prompt.attend(&cpu, &work)?.to_interleaved();
                results = results.with(&format!("{name}_attention"), &attention);
            }
        }
        Ok(results)
    }

    /// Distance of attention; infinite where a list is another.
    fn on_device(&self, device: &Arc<dyn Device>, inputs: &Arrays, results: &Arrays) -> Result<f64, Error> {
        let prompt = Prompt::new(inputs)?;
        let executor = CudaExecutor::new(Arc::clone(device), CpuExecutor::serial(), PAGE_BYTES);
        let executor = executor.with_choices_min(1);
        let mut worst = 0.0_f64;
        for (name, policy) in POLICIES {
            let work = prompt.plan(&executor, policy)?;
            if words(&work) != results.get::<u32>(name)? {
                return Ok(f64::INFINITY);
            }
            if !ATTENDED.contains(&name) {
                continue;
            }
            let wanted = results.get::<f32>(&format!("{name}_attention"))?;
            let wanted = Partials::from_interleaved(ROWS, HEADS.query_heads(), HEADS.head_dim, &wanted);
            let wanted = wanted.map_err(refused)?;
            worst = worst.max(distance(&[prompt.attend(&executor, &work)?], &[wanted]));
        }
        Ok(worst)
    }

    fn limit(&self) -> f64 {
        2e-3
    }
}
