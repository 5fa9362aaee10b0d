//! Keys and values that become pages where they are: the bytes of the CPU's tiles, and attention before these tiles are written.

use std::sync::Arc;

use longshore_attention::{
    AttendItem, CpuExecutor, Executor, HeadShape, KvDtype, PlanInput, PrefillPolicy, Promise, Queries,
    Summaries, Tile, TileShape, WorkList, attend_by_lists,
};
use longshore_model::{
    Activations, KeptAppend, KeptAttention as _, KeptMeans, KeptPart, KeptVisits, Promised,
};

use super::Case;
use super::executor::{Plan, Sequence, refused};
use super::material::{Pages, Random, differing, pages_of, random_tiles, relative};
use crate::{AppendCall, Buffer, CudaExecutor, Device, Error, KeptRows, PageShape, RowAppender};

/// Token of the first page that the first row becomes, and how many rows there are: they end in the middle of a page.
const OFFSET: usize = 9;
const ROWS: usize = 30;

/// What rounding finds hard. NaN stays NaN, but not bit for bit.
fn hard(random: &mut Random, width: usize) -> Vec<f32> {
    let mut rows = random.numbers(ROWS * width, 3.0);
    for (row, x) in [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, 1e-42, 65_519.0, 65_520.0, 3.39e38, 2.98e-8]
        .into_iter()
        .enumerate()
    {
        rows[row * width..][..width / 2].fill(x);
    }
    rows
}

/// Bytes of pages, filled with rows, that are not those of the tiles with the same rows; unwritten tokens are zeros.
pub(super) fn rows_to_pages(device: &Arc<dyn Device>, shape: TileShape) -> Result<f64, Error> {
    let (mut random, width) = (Random(31), shape.kv_heads * shape.head_dim);
    let blocks = (OFFSET + ROWS).div_ceil(shape.block_tokens);
    let mut tiles: Vec<Tile> = (0..blocks).map(|_| Tile::zeroed(shape)).collect();
    let earlier = random.numbers(OFFSET * width, 1.0);
    tiles[0].write(0, &earlier, &earlier).map_err(refused)?;
    let mut bodies = pages_of(&tiles);
    // Nothing is known of new pages.
    bodies[1..].iter_mut().for_each(|body| body.fill(0xff));
    let pages = Pages::new(device, &bodies)?;
    let (keys, values) = (hard(&mut random, width), hard(&mut random, width));
    for (token, (k, v)) in (OFFSET..).zip(keys.chunks_exact(width).zip(values.chunks_exact(width))) {
        tiles[token / shape.block_tokens].write(token % shape.block_tokens, k, v).map_err(refused)?;
    }
    let places: Vec<u64> = (OFFSET as u64..(blocks * shape.block_tokens) as u64).collect();
    let (k, v) = (Buffer::from_slice(device, &keys)?, Buffer::from_slice(device, &values)?);
    RowAppender::new(device, PageShape::of(shape)?)?.launch(&AppendCall {
        keys: k.whole(),
        values: v.whole(),
        rows: ROWS,
        pages: pages.table.whole(),
        places: Buffer::from_slice(device, &places)?.whole(),
        blanks: places.len() - ROWS,
    })?;
    Ok(differing(&pages.bodies()?.concat(), &pages_of(&tiles).concat()))
}

/// A sequence without its last rows, and these.
struct Appended {
    sequence: Sequence,
    keys: Vec<f32>,
    values: Vec<f32>,
    promised: Vec<Promise>,
}

impl Appended {
    fn new(plan: &Plan) -> Self {
        let mut random = Random(plan.seed);
        let mut sequence = plan.sequence(&mut random, plan.prefix);
        let (shape, first, offset) = (plan.shape(), plan.prefix / plan.tokens, plan.prefix % plan.tokens);
        let width = shape.kv_heads * shape.head_dim;
        let began = &random_tiles(&mut random, shape, 1, 1.0)[0];
        for tile in &mut sequence.tiles.tiles[first..] {
            *tile = Tile::zeroed(shape);
        }
        for token in 0..offset {
            let (k, v) = began.read(token).expect("a token of the tile");
            sequence.tiles.tiles[first].write(token, &k, &v).expect("a token of the tile");
        }
        let [keys, values] = [(); 2].map(|()| random.numbers(plan.rows * width, 1.0));
        let promised = sequence.tiles.tiles[first..].iter().map(|_| Tile::promise()).collect();
        Self { sequence, keys, values, promised }
    }

    /// Writes the rows to their tiles, which get the promised versions.
    fn write(&mut self, plan: &Plan) {
        let width = plan.heads.kv_heads * plan.heads.head_dim;
        let mut done = 0;
        for (block, promise) in (plan.prefix / plan.tokens..).zip(self.promised.drain(..)) {
            let offset = (plan.prefix + done) % plan.tokens;
            let count = (plan.tokens - offset).min(plan.rows - done);
            let rows = done * width..(done + count) * width;
            let (keys, values) = (&self.keys[rows.clone()], &self.values[rows]);
            let tile = &mut self.sequence.tiles.tiles[block];
            tile.write_promised(promise, offset, keys, values).expect("tokens of the tile");
            done += count;
        }
    }
}

/// Rows on the device.
struct Kept {
    q: Activations,
    k: Activations,
    v: Activations,
}

impl Kept {
    fn new(device: &Arc<dyn Device>, plan: &Plan, appended: &Appended) -> Result<Self, Error> {
        let rows = |width, data: &[f32]| KeptRows::on(device, width, data).map(KeptRows::activations);
        let (heads, dim) = (plan.heads, plan.heads.head_dim);
        Ok(Self {
            q: rows(heads.query_heads() * dim, &appended.sequence.queries)?,
            k: rows(heads.kv_heads * dim, &appended.keys)?,
            v: rows(heads.kv_heads * dim, &appended.values)?,
        })
    }

    /// Whether pages were made of keys and values.
    fn append(&self, executor: &CudaExecutor, plan: &Plan, appended: &Appended) -> Result<bool, Error> {
        let tiles = appended.sequence.tiles.tiles[plan.prefix / plan.tokens..].iter().collect();
        let offset = plan.prefix % plan.tokens;
        let part = KeptAppend { rows: 0..plan.rows, offset, tiles, promised: &appended.promised };
        executor.append_kept(&self.k, &self.v, &[part]).map_err(refused)
    }

    /// Attention of all rows, read; `None` where the host is asked.
    fn attend(
        &self,
        executor: &CudaExecutor,
        plan: &Plan,
        visits: KeptVisits<'_>,
    ) -> Result<Option<Vec<f32>>, Error> {
        let part = KeptPart { rows: 0..plan.rows, first_position: plan.prefix as u64, visits };
        let scale = 1.0 / (plan.heads.head_dim as f32).sqrt();
        let found = executor.attend_kept((plan.heads, scale), &self.q, &[part]).map_err(refused)?;
        let read = |found: Activations| KeptRows::of(&found).expect("rows of this device").buffer().to_vec();
        found.map(read).transpose()
    }
}

/// Attention of rows whose keys are in pages only, and then of the same rows by way of the host, over the same pages; infinite where a tile goes
/// up that need not.
fn appended(plan: Plan, warm: bool, device: &Arc<dyn Device>) -> Result<f64, Error> {
    let (executor, mut appended) = (plan.executor(device), Appended::new(&plan));
    let kept = Kept::new(device, &plan, &appended)?;
    let attend = |executor: &dyn Executor, sequence: &Sequence, work: &WorkList| {
        let item = AttendItem { queries: sequence.queries(), kv: &sequence.tiles, work, initial: None };
        Ok::<_, Error>(executor.attend(&[item]).map_err(refused)?.remove(0).finish())
    };
    if warm {
        // Pages of what there is: that of the last block is taken over.
        attend(&executor, &appended.sequence, &before(&plan))?;
    }
    if !kept.append(&executor, &plan, &appended)? {
        return Ok(f64::INFINITY);
    }
    let (tiles, promised) = (&appended.sequence.tiles, &appended.promised[..]);
    let visits = KeptVisits::All { kv: tiles, first_key: 0, promised };
    let Some(found) = kept.attend(&executor, &plan, visits)? else { return Ok(f64::INFINITY) };
    let brought = executor.stats().pages.misses;
    appended.write(&plan);
    let sequence = &appended.sequence;
    let work = WorkList { exact: sequence.blocks(), ..WorkList::default() };
    let wanted = attend(&CpuExecutor::serial(), sequence, &work)?;
    let by_host = attend(&executor, sequence, &work)?;
    match executor.stats().pages.misses == brought {
        true => Ok(relative(&found, &wanted).max(relative(&by_host, &wanted))),
        false => Ok(f64::INFINITY),
    }
}

/// Blocks of a stripe.
const STRIPE: u32 = 4;

/// Calls `take` with what a plan is made from.
fn with_input<R>(
    plan: &Plan,
    sequence: &Sequence,
    summaries: &Summaries,
    take: impl FnOnce(&PlanInput<'_>) -> R,
) -> R {
    take(&PlanInput {
        queries: sequence.queries(),
        layer: 0,
        kv: &sequence.tiles,
        first_block: 0,
        summaries,
        stripe_blocks: STRIPE,
        dense_from: (plan.prefix + plan.rows) as u64,
        spreads: None,
        cosines: None,
    })
}

/// Attention by a rule over rows whose keys, and the means of these, are in pages only; infinite where the host is asked.
fn by_rule(plan: Plan, rule: &str, device: &Arc<dyn Device>) -> Result<f64, Error> {
    let policy = PrefillPolicy::parse(rule, None).expect("a policy of ours");
    let (executor, mut appended) = (plan.executor(device).with_choices_min(0), Appended::new(&plan));
    let kept = Kept::new(device, &plan, &appended)?;
    let (first, full) = (plan.prefix / plan.tokens, (plan.prefix + plan.rows) / plan.tokens);
    let mut summaries = Summaries::new(plan.shape(), STRIPE, 0).map_err(refused)?;
    let push = |summaries: &mut Summaries, block: usize, sequence: &Sequence| {
        summaries.push(block as u64, &sequence.tiles.tiles[block]).map_err(refused)
    };
    (0..first).try_for_each(|block| push(&mut summaries, block, &appended.sequence))?;
    let of_means = summaries.promise(full as u64);
    let means = KeptMeans {
        tile: plan.shape(),
        blocks: &appended.promised[..full - first],
        first_block: first as u64,
        summaries: &summaries,
        visited: policy.reads().values,
        promised: of_means.tiles(),
    };
    if !kept.append(&executor, &plan, &appended)? || !executor.append_means(&means).map_err(refused)? {
        return Ok(f64::INFINITY);
    }
    let found = with_input(&plan, &appended.sequence, &summaries, |input| {
        let input = PlanInput { queries: Queries { data: &[], ..input.queries }, ..*input };
        let promised = Promised { tiles: &appended.promised, means: of_means.tiles() };
        kept.attend(&executor, &plan, KeptVisits::By { policy: &policy, input: &input, promised })
    });
    let Some(found) = found? else { return Ok(f64::INFINITY) };
    appended.write(&plan);
    (first..full).try_for_each(|block| push(&mut summaries, block, &appended.sequence))?;
    let wanted = with_input(&plan, &appended.sequence, &summaries, |input| {
        attend_by_lists(&CpuExecutor::serial(), &policy, input)
    });
    Ok(relative(&found, &wanted.map_err(refused)?.finish()))
}

/// All blocks of the prefix.
fn before(plan: &Plan) -> WorkList {
    let block = |tile: usize| longshore_attention::ExactBlock {
        tile: tile as u32,
        first_position: (tile * plan.tokens) as u64,
        len: plan.tokens.min(plan.prefix - tile * plan.tokens) as u32,
    };
    let exact = (0..plan.prefix.div_ceil(plan.tokens)).map(block).collect();
    WorkList { exact, ..WorkList::default() }
}

/// Comparisons of the executor with rows that become pages.
pub(super) fn cases() -> Vec<Case> {
    let heads = HeadShape { kv_heads: 2, group: 3, head_dim: 64 };
    let mut cases = Vec::new();
    for (dtype, tokens, seed) in [(KvDtype::F32, 16, 41), (KvDtype::F16, 64, 42), (KvDtype::Bf16, 32, 43)] {
        for (prefix, warm, what) in
            [(0, false, "nothing"), (330, false, "tiles of the host"), (330, true, "pages")]
        {
            let plan = Plan { seed, dtype, heads, tokens, prefix, rows: 70, pages: 64 };
            let name = format!(
                "executor, keys and values that stay behind {what}, {} KV (seed {seed})",
                dtype.name()
            );
            cases.push(Case::new(name, plan.limit(), move |device| appended(plan, warm, device)));
        }
        for (number, rule) in
            super::executor::RULES.into_iter().enumerate().filter(|(_, rule)| !rule.contains("escape"))
        {
            let plan = Plan { seed, dtype, heads, tokens, prefix: 330, rows: 170, pages: 64 };
            let name = format!(
                "executor, keys and values that stay, by rule {number}, {} KV (seed {seed})",
                dtype.name()
            );
            cases.push(Case::new(name, plan.limit(), move |device| by_rule(plan, rule, device)));
        }
    }
    cases
}
