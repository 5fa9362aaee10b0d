//! The executor of the device against that of the CPU: tiles of the host, cached pages, lists of real policies.

use std::sync::Arc;

use longshore_attention::{
    AttendItem, CpuExecutor, ExactBlock, Executor, HeadShape, KvDtype, PagedKv, Partials, PlanInput,
    PrefillPolicy, Queries, SparseItem, SparseWork, Summaries, SummaryKey, Tile, TileShape, Tiles, Visit,
    WorkList, attend_by_lists,
};
use longshore_model::{Activations, KeptAttention as _, KeptPart, KeptVisits, Promised};

use super::Case;
use super::material::{Random, random_tiles, relative, rounded};
use crate::{CudaExecutor, Device, Error, KeptRows, PageElement};

/// Blocks of a stripe.
const STRIPE: u32 = 4;

/// A sequence and rows that ask for it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) dtype: KvDtype,
    pub(super) heads: HeadShape,
    pub(super) tokens: usize,
    /// Keys before the first row.
    pub(super) prefix: usize,
    pub(super) rows: usize,
    /// Pages that the device may keep.
    pub(super) pages: usize,
}

pub(super) struct Sequence {
    heads: HeadShape,
    prefix: usize,
    pub(super) tiles: Tiles,
    summaries: Summaries,
    pub(super) queries: Vec<f32>,
    earlier: Partials,
}

/// Shows one KV head of tiles, as shards do that send single heads.
struct OneHead<'a>(&'a dyn PagedKv, usize);

impl PagedKv for OneHead<'_> {
    fn shape(&self) -> TileShape {
        TileShape { kv_heads: 1, ..self.0.shape() }
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn tile(&self, index: usize) -> &Tile {
        self.0.tile(index)
    }

    fn only_head(&self) -> Option<usize> {
        Some(self.1)
    }
}

impl Plan {
    pub(super) fn shape(&self) -> TileShape {
        let HeadShape { kv_heads, head_dim, .. } = self.heads;
        TileShape { block_tokens: self.tokens, kv_heads, head_dim, dtype: self.dtype }
    }

    pub(super) fn sequence(&self, random: &mut Random, prefix: usize) -> Sequence {
        let keys = prefix + self.rows;
        let tiles = random_tiles(random, self.shape(), keys.div_ceil(self.tokens), 1.0);
        let mut summaries = Summaries::new(self.shape(), STRIPE, 0).expect("a shape of ours");
        for (block, tile) in tiles.iter().take(keys / self.tokens).enumerate() {
            summaries.push(block as u64, tile).expect("block after block");
        }
        let heads = self.heads.query_heads();
        let mut queries = random.numbers(self.rows * heads * self.heads.head_dim, 3.0);
        rounded(PageElement::from(self.dtype), &mut queries);
        let mut records = Vec::new();
        for _ in 0..self.rows * heads {
            records.extend([random.number(), 2.0]);
            records.extend(random.numbers(self.heads.head_dim, 1.0));
        }
        let earlier = Partials::from_interleaved(self.rows, heads, self.heads.head_dim, &records);
        let (tiles, earlier) = (Tiles { shape: self.shape(), tiles }, earlier.expect("records of ours"));
        Sequence { heads: self.heads, prefix, tiles, summaries, queries, earlier }
    }

    pub(super) fn executor(&self, device: &Arc<dyn Device>) -> CudaExecutor {
        // Pages of f16 or f32, whatever the tiles have, and room for the odd bytes.
        let page = 4 * self.tokens * 2 * self.heads.kv_heads * self.heads.head_dim + 4096;
        CudaExecutor::new(Arc::clone(device), CpuExecutor::serial(), 2 * self.pages * page)
    }

    /// What is right for the type; f16 queries are those that the CPU has.
    pub(super) fn limit(&self) -> f64 {
        match self.dtype {
            KvDtype::F32 => 1e-5,
            KvDtype::F16 => 2e-3,
            KvDtype::Bf16 | KvDtype::Int8 => 8e-3,
        }
    }
}

impl Sequence {
    pub(super) fn queries(&self) -> Queries<'_> {
        Queries {
            shape: self.heads,
            first_position: self.prefix as u64,
            scale: 1.0 / (self.heads.head_dim as f32).sqrt(),
            data: &self.queries,
        }
    }

    fn rows(&self) -> usize {
        self.queries().rows()
    }

    pub(super) fn blocks(&self) -> Vec<ExactBlock> {
        let (keys, tokens) = (self.prefix + self.rows(), self.tiles.shape.block_tokens);
        let block = |tile: usize| ExactBlock {
            tile: tile as u32,
            first_position: (tile * tokens) as u64,
            len: tokens.min(keys - tile * tokens) as u32,
        };
        (0..self.tiles.tiles.len()).map(block).collect()
    }

    fn planned(&self, policy: &str) -> SparseWork {
        let plan = |input: &PlanInput<'_>| CpuExecutor::serial().plan(&parsed(policy), input);
        self.with_input(plan).expect("all that a policy reads is there")
    }

    /// Calls `take` with what a policy reads.
    fn with_input<R>(&self, take: impl FnOnce(&PlanInput<'_>) -> R) -> R {
        let (spreads, cosines) = (self.summaries.spreads(), |block, head| self.summaries.cosine(block, head));
        take(&PlanInput {
            queries: self.queries(),
            layer: 5,
            kv: &self.tiles,
            first_block: 0,
            summaries: &self.summaries,
            stripe_blocks: STRIPE,
            dense_from: u64::MAX,
            spreads: Some(&spreads),
            cosines: Some(&cosines),
        })
    }

    fn sparse<'a>(&'a self, work: &'a SparseWork) -> SparseItem<'a> {
        SparseItem {
            queries: self.queries(),
            kv: &self.tiles,
            summaries: &self.summaries,
            work,
            earlier: Some(&self.earlier),
            stripe: Some(&self.earlier),
            skip_below: None,
        }
    }
}

/// Largest distance of outputs and of maxima with their sums.
pub(super) fn distance(found: &[Partials], wanted: &[Partials]) -> f64 {
    let distances = found.iter().zip(wanted).map(|(found, wanted)| {
        let (rows, heads, _) = wanted.shape();
        let sums = |partials: &Partials| -> Vec<f32> {
            let pairs = (0..rows).flat_map(|row| (0..heads).map(move |head| (row, head)));
            let sum = |(row, head)| {
                let (m, l, _) = partials.row(row, head);
                m + l.log2()
            };
            pairs.map(sum).collect()
        };
        let output = relative(&found.clone().finish(), &wanted.clone().finish());
        output.max(relative(&sums(found), &sums(wanted)))
    });
    distances.fold(0.0, f64::max)
}

pub(super) fn refused(error: longshore_attention::Error) -> Error {
    Error::Device { call: "the executor", problem: error.to_string() }
}

fn parsed(policy: &str) -> PrefillPolicy {
    PrefillPolicy::parse(policy, None).expect("a policy of ours")
}

/// Some sequences of different lengths, each with few rows; asked twice, so that pages are found again.
fn decode(plan: Plan, device: &Arc<dyn Device>) -> Result<f64, Error> {
    let mut random = Random(plan.seed);
    let lengths = [plan.prefix, 0, plan.prefix / 3];
    let sequences: Vec<Sequence> = lengths.iter().map(|&prefix| plan.sequence(&mut random, prefix)).collect();
    let works: Vec<WorkList> = sequences
        .iter()
        .map(|sequence| WorkList { exact: sequence.blocks(), ..WorkList::default() })
        .collect();
    let items: Vec<AttendItem<'_>> = sequences
        .iter()
        .zip(&works)
        .enumerate()
        .map(|(index, (sequence, work))| AttendItem {
            queries: sequence.queries(),
            kv: &sequence.tiles,
            work,
            initial: (index > 0).then_some(&sequence.earlier),
        })
        .collect();
    let executor = plan.executor(device);
    let wanted = CpuExecutor::serial().attend(&items).map_err(refused)?;
    let first = executor.attend(&items).map_err(refused)?;
    let again = executor.attend(&items).map_err(refused)?;
    let tiles: usize = sequences.iter().map(|sequence| sequence.tiles.tiles.len()).sum();
    let stats = executor.stats();
    let found_again = plan.pages < tiles || stats.pages.misses == tiles as u64;
    if first != again || !found_again {
        return Ok(f64::INFINITY);
    }
    Ok(distance(&first, &wanted))
}

/// Blocks with gaps, columns with bias and pseudo-tokens.
fn work_list(plan: Plan, device: &Arc<dyn Device>) -> Result<f64, Error> {
    let mut random = Random(plan.seed);
    let sequence = plan.sequence(&mut random, plan.prefix);
    let mut work = WorkList::default();
    for block in sequence.blocks() {
        match random.below(3) {
            0 => {}
            1 => work.exact.push(block),
            _ => {
                let columns = (0..block.len).step_by(3).map(|offset| longshore_attention::Column {
                    tile: block.tile,
                    offset,
                    position: block.first_position + u64::from(offset),
                });
                work.columns.extend(columns);
            }
        }
    }
    work.column_bias = work.columns.iter().map(|_| random.number()).collect();
    let dim = plan.heads.head_dim;
    work.summaries.extend((0..plan.heads.kv_heads as u32).map(|kv_head| SummaryKey {
        kv_head,
        key: random.numbers(dim, 1.0),
        value: random.numbers(dim, 1.0),
        weight: 64.0,
        bias: 0.0,
    }));
    let items = [AttendItem {
        queries: sequence.queries(),
        kv: &sequence.tiles,
        work: &work,
        initial: Some(&sequence.earlier),
    }];
    let wanted = CpuExecutor::serial().attend(&items).map_err(refused)?;
    Ok(distance(&plan.executor(device).attend(&items).map_err(refused)?, &wanted))
}

/// The lists of a policy, for all heads, and, of those without means, for one.
fn sparse(plan: Plan, policy: &str, device: &Arc<dyn Device>) -> Result<f64, Error> {
    let mut random = Random(plan.seed);
    let sequence = plan.sequence(&mut random, plan.prefix);
    let work = sequence.planned(policy);
    let executor = plan.executor(device);
    let items = [sequence.sparse(&work)];
    let wanted = CpuExecutor::serial().attend_sparse(&items).map_err(refused)?;
    let all = distance(&executor.attend_sparse(&items).map_err(refused)?, &wanted);

    let HeadShape { kv_heads, group, head_dim } = plan.heads;
    let head = kv_heads - 1;
    let own = sequence.queries.chunks_exact(kv_heads * group * head_dim);
    let data: Vec<f32> =
        own.flat_map(|row| &row[head * group * head_dim..][..group * head_dim]).copied().collect();
    let kv = OneHead(&sequence.tiles, head);
    let lists = (0..work.tiles()).map(|tile| {
        let visits = work.list(head, tile).iter();
        (
            visits.filter(|visit| matches!(visit, Visit::Block(_) | Visit::EndOfStripe)).copied().collect(),
            vec![],
        )
    });
    let ends = (0..work.tiles()).map(|tile| work.rows(tile).end as u32).collect();
    let one = SparseWork::new(1, ends, lists.collect()).map_err(refused)?;
    let queries =
        Queries { shape: HeadShape { kv_heads: 1, ..plan.heads }, data: &data, ..sequence.queries() };
    let items =
        [SparseItem { queries, kv: &kv, work: &one, earlier: None, stripe: None, ..sequence.sparse(&work) }];
    let wanted = CpuExecutor::serial().attend_sparse(&items).map_err(refused)?;
    Ok(all.max(distance(&executor.attend_sparse(&items).map_err(refused)?, &wanted)))
}

/// Attention by a rule, all of it on the device: infinite where it went by lists of the host.
fn by_rule(plan: Plan, (rule, wgmma): (&str, bool), device: &Arc<dyn Device>) -> Result<f64, Error> {
    let (sequence, policy) = (plan.sequence(&mut Random(plan.seed), plan.prefix), parsed(rule));
    let executor = plan.executor(device).with_choices_min(0).with_wgmma(wgmma);
    let wanted = sequence.with_input(|input| attend_by_lists(&CpuExecutor::serial(), &policy, input));
    let found = sequence.with_input(|input| executor.attend_by(&policy, input)).map_err(refused)?;
    // Lists of the host would be waited for too.
    if executor.stats().waits != 1 {
        return Ok(f64::INFINITY);
    }
    Ok(distance(&[found], &[wanted.map_err(refused)?]))
}

/// The same of rows that are on the device, and all keys of the same rows; infinite where the host is asked.
fn kept(plan: Plan, (rule, wgmma): (&str, bool), device: &Arc<dyn Device>) -> Result<f64, Error> {
    let (sequence, policy) = (plan.sequence(&mut Random(plan.seed), plan.prefix), parsed(rule));
    let executor = plan.executor(device).with_choices_min(0).with_wgmma(wgmma);
    let (queries, cpu) = (sequence.queries(), CpuExecutor::serial());
    let q = KeptRows::on(device, plan.heads.query_heads() * plan.heads.head_dim, queries.data)?.activations();
    let attend = |visits: KeptVisits<'_>| -> Result<Option<Vec<f32>>, Error> {
        let part = KeptPart { rows: 0..plan.rows, first_position: queries.first_position, visits };
        let found = executor.attend_kept((plan.heads, queries.scale), &q, &[part]).map_err(refused)?;
        let read = |rows: Activations| rows.to_host().map(std::borrow::Cow::into_owned);
        let told = |error: longshore_model::Error| Error::Device {
            call: "reading rows",
            problem: error.to_string(),
        };
        found.map(read).transpose().map_err(told)
    };
    let of_rule = sequence.with_input(|input| {
        let input = PlanInput { queries: Queries { data: &[], ..queries }, ..*input };
        attend(KeptVisits::By { policy: &policy, input: &input, promised: Promised::default() })
    })?;
    let of_all = attend(KeptVisits::All { kv: &sequence.tiles, first_key: 0, promised: &[] })?;
    let (Some(of_rule), Some(of_all)) = (of_rule, of_all) else { return Ok(f64::INFINITY) };
    let by_rule = sequence.with_input(|input| attend_by_lists(&cpu, &policy, input)).map_err(refused)?;
    let work = WorkList { exact: sequence.blocks(), ..WorkList::default() };
    let item = AttendItem { queries, kv: &sequence.tiles, work: &work, initial: None };
    let all = cpu.attend(&[item]).map_err(refused)?.remove(0);
    Ok(relative(&of_rule, &by_rule.finish()).max(relative(&of_all, &all.finish())))
}

/// Rules of which the device makes the lists: with means for what is not visited, and without; each with a guard of its own.
pub(super) const RULES: [&str; 2] = [
    "blocks:scorer=row-normalised,selector=mass,gamma=0.6,peak=0.25,dense_layers=0,min_positions=0,last_tiles=0",
    "blocks:scorer=pooled,selector=top-k,k=3,correction=off,escape=0.7,dense_layers=0,min_positions=0,last_tiles=0",
];

fn rule_cases(plan: Plan, wgmma: bool) -> Vec<Case> {
    let kernel = if wgmma { ", by wgmma" } else { "" };
    let named = |what: &str, number: usize| {
        let (kv, seed) = (plan.dtype.name(), plan.seed);
        format!("executor, {what} by rule {number}{kernel}, {kv} KV (seed {seed})")
    };
    let mut cases = Vec::new();
    for (number, rule) in RULES.into_iter().enumerate() {
        let way = (rule, wgmma);
        let run = move |device: &Arc<dyn Device>| by_rule(plan, way, device);
        cases.push(Case::new(named("blocks", number), plan.limit(), run));
        let run = move |device: &Arc<dyn Device>| kept(plan, way, device);
        cases.push(Case::new(named("rows that stay", number), plan.limit(), run));
    }
    cases
}

/// A prompt of which the device chooses blocks.
fn long(dtype: KvDtype) -> Plan {
    let heads = HeadShape { kv_heads: 2, group: 3, head_dim: 64 };
    Plan { seed: 26, dtype, heads, tokens: 16, prefix: 330, rows: 70, pages: 64 }
}

/// By warp groups, which only devices of compute capability 9.0 have.
pub(super) fn wgmma_cases() -> Vec<Case> {
    let cases = [KvDtype::F16, KvDtype::Bf16, KvDtype::Int8].map(|dtype| rule_cases(long(dtype), true));
    cases.into_iter().flatten().map(|case| case.only_on(90)).collect()
}

/// All comparisons of the executor.
pub(super) fn cases() -> Vec<Case> {
    let heads = HeadShape { kv_heads: 2, group: 3, head_dim: 64 };
    let base = Plan { seed: 21, dtype: KvDtype::F16, heads, tokens: 16, prefix: 150, rows: 1, pages: 64 };
    let mut cases = Vec::new();
    let named =
        |what: &str, plan: &Plan| format!("executor, {what}, {} KV (seed {})", plan.dtype.name(), plan.seed);
    for dtype in KvDtype::ALL {
        let plan = Plan { dtype, ..base };
        cases.push(Case::new(named("decode", &plan), plan.limit(), move |device| decode(plan, device)));
        let many = Plan { rows: 5, prefix: 700, seed: 22, ..plan };
        cases.push(Case::new(named("decode of five rows", &many), many.limit(), move |device| {
            decode(many, device)
        }));
        let lists = Plan { rows: 20, seed: 23, ..plan };
        cases.push(Case::new(named("work lists", &lists), lists.limit(), move |device| {
            work_list(lists, device)
        }));
        let long = Plan { rows: 70, prefix: 330, seed: 24, ..plan };
        for policy in [
            "blocks:scorer=row-normalised,selector=mass,gamma=0.5,dense_layers=0,min_positions=0",
            "minference:vertical=35,slash=60,dense_layers=0,min_positions=0",
        ] {
            let name = named(policy.split(':').next().expect("a name"), &long);
            cases.push(Case::new(name, long.limit(), move |device| sparse(long, policy, device)));
        }
        cases.extend(rule_cases(self::long(dtype), false));
    }
    let tight = Plan { pages: 3, rows: 2, seed: 25, ..base };
    cases.push(Case::new(named("decode with three pages", &tight), tight.limit(), move |device| {
        decode(tight, device)
    }));
    cases.push(Case::new(named("work lists with twenty pages", &tight), tight.limit(), move |device| {
        work_list(Plan { pages: 20, rows: 40, ..tight }, device)
    }));
    cases
}
