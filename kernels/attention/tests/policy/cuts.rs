//! Lists depend on positions: not on chunks, threads or instruction sets.

use longshore_attention::{
    BudgetLevel, Column, CpuExecutor, ExactBlock, HeadBudgets, HeadPattern, HeadPlan, PagedKv, PolicyReads,
    PrefillPolicy, SparseWork, Tile, TileShape, Tiles, Visit,
};
use longshore_compute::{ComputePool, InstructionSet, PoolOptions};

use crate::case::{Case, Shape, generator, policy};

/// Policies of every kind, that visit some blocks and not others.
pub(crate) fn policies() -> Vec<PrefillPolicy> {
    let mixed = [
        HeadPattern::VerticalSlash { vertical: 40, slash: 120 },
        HeadPattern::BlockSparse { top: 5 },
        HeadPattern::Streaming { sink: 20, recent: 70 },
        HeadPattern::BlockSparse { top: 3 },
        HeadPattern::VerticalSlash { vertical: 30, slash: 100 },
        HeadPattern::Streaming { sink: 1, recent: 1 },
    ];
    let plan = HeadPlan::new(vec![mixed.to_vec(); 6]).unwrap();
    let heads = ["scorer=antidiagonal,selector=mass,gamma=0.6", "scorer=pooled,alpha=0.2"];
    let level = BudgetLevel {
        name: "mixed".to_owned(),
        note: String::new(),
        blocks: "local=2".to_owned(),
        heads: vec![heads.map(str::to_owned).to_vec(); 6],
    };
    let budgets = HeadPlan::from(HeadBudgets::new("test", vec![level], 6, 2).unwrap());
    let guards = "dense_layers=0,min_positions=100";
    let by_plan = |plan: &HeadPlan| PrefillPolicy::parse(&format!("heads:{guards}"), Some(plan)).unwrap();
    let mut policies = vec![by_plan(&plan), by_plan(&budgets)];
    let texts = [
        "blocks:alpha=0.3,",
        "blocks:scorer=row-normalised,selector=mass,gamma=0.5,",
        "blocks:scorer=second-order,selector=mass,gamma=0.5,peak=0.3,",
        "blocks:scorer=pooled-query,selector=top-k,k=4,",
        "blocks:scorer=antidiagonal,stride=8,selector=mass,gamma=0.6,",
        "streaming:sink=20,recent=100,",
        "minference:vertical=35,slash=150,",
        "flexprefill:gamma=0.6,tau=0.2,budget=40,",
    ];
    policies.extend(texts.map(|text| policy(&format!("{text}{guards}"))));
    policies
}

/// A list with its columns.
fn resolved(work: &SparseWork, kv_head: usize, tile: usize) -> Vec<(Visit, Vec<Column>)> {
    let with = |visit: &Visit| match *visit {
        Visit::Columns { first, count } => {
            let columns = work.columns()[first as usize..][..count as usize].to_vec();
            (Visit::Columns { first: 0, count }, columns)
        }
        other => (other, Vec::new()),
    };
    work.list(kv_head, tile).iter().map(with).collect()
}

/// What a chunk up to `end` has of the tiles.
fn grown(case: &Case, end: usize) -> Case {
    let full = end / case.shape.block;
    let (mut kv, mut summaries, mut spreads) =
        (case.kv.clone(), case.summaries.clone(), case.spreads.clone());
    kv.tiles.truncate(end.div_ceil(case.shape.block));
    summaries.tiles.truncate(full.div_ceil(case.shape.stripe));
    spreads.tiles.truncate(full.div_ceil(case.shape.stripe));
    Case { kv, summaries, spreads, ..case.clone() }
}

#[test]
fn chunks_change_nothing() {
    let shape = Shape { tokens: 1536, ..Shape::default() };
    for (seed, block) in [(0, 16), (1, 64), (2, 128)] {
        let case = Shape { block, ..shape }.case(&mut generator(seed));
        let exact = case.plan(&policy("exact"));
        for policy in policies() {
            let whole = case.plan(&policy);
            // In larger blocks the diagonals touch everything.
            for kv_head in 0..if block == 16 { 2 } else { 0 } {
                assert_ne!(whole.list(kv_head, 40), exact.list(kv_head, 40), "{policy} leaves something out");
            }
            for chunk in [64, 128, 512].into_iter().filter(|chunk| chunk % policy.chunk_multiple() == 0) {
                for first in (0..1536).step_by(chunk) {
                    let case = grown(&case, first + chunk);
                    let part =
                        policy.plan(&CpuExecutor::serial(), &case.input(first, first + chunk)).unwrap();
                    for tile in 0..part.tiles() {
                        for kv_head in 0..2 {
                            assert_eq!(
                                resolved(&part, kv_head, tile),
                                resolved(&whole, kv_head, first / 32 + tile),
                                "{policy}, chunk {chunk}, tile {tile} from {first} on"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// Rows of tiles and spans that are cut are exact, and all others as before.
#[test]
fn crooked_cuts_are_more_exact() {
    let case = Shape { tokens: 1536, ..Shape::default() }.case(&mut generator(7));
    let exact = case.plan(&policy("exact"));
    for policy in policies() {
        let whole = case.plan(&policy);
        let slashes = policy.chunk_multiple() == 512;
        let (first, end) = (500, 1100);
        let work = policy.plan(&CpuExecutor::serial(), &case.input(first, end)).unwrap();
        assert_eq!((work.tiles(), work.rows(0), work.rows(19)), (20, 0..12, 588..600));
        for tile in 1..19 {
            let number = first / 32 + tile;
            let finished = !slashes || (16..32).contains(&number);
            let wanted = if finished { &whole } else { &exact };
            // KV head 0 has a vertical-slash head wherever there are any.
            assert_eq!(resolved(&work, 0, tile), resolved(wanted, 0, number), "{policy}, tile {number}");
        }
        for (tile, last) in [(0, 511), (19, 1099)] {
            let blocks = work.list(0, tile).iter().filter(|visit| matches!(visit, Visit::Block(_))).count();
            assert_eq!(blocks, last / 16 + 1, "{policy}");
        }
    }
}

#[test]
fn threads_and_instruction_sets_change_nothing() {
    let two = ComputePool::new(&PoolOptions { threads: 2, pin: Vec::new() }).unwrap();
    for seed in 0..3 {
        let mut rng = generator(seed);
        let shape = Shape { tokens: 1100, ..Shape::default() };
        let dtype = longshore_attention::KvDtype::ALL[seed as usize];
        let case = Shape { dtype, block: 32, ..shape }.case(&mut rng);
        for policy in policies() {
            let wanted = case.plan(&policy);
            for &set in &InstructionSet::available() {
                let executor = CpuExecutor::new(two.clone()).with_instruction_set(set);
                let found = policy.plan(&executor, &case.input(0, 1100)).unwrap();
                assert_eq!(found, wanted, "{policy} with {set}");
            }
        }
    }
}

/// Where the first blocks are somebody else's, exact rows and streaming heads visit the same of what is there.
#[test]
fn a_call_may_begin_at_a_later_block() {
    let case = Shape::default().case(&mut generator(8));
    let first_block = 20_u32;
    let kv = Tiles { tiles: case.kv.tiles[first_block as usize..].to_vec(), ..case.kv.clone() };
    let mut input = case.input(640, 700);
    (input.kv, input.first_block) = (&kv, u64::from(first_block));
    for policy in [policy("exact"), policy("streaming:sink=40,recent=200,min_positions=0")] {
        let whole = policy.plan(&CpuExecutor::serial(), &case.input(640, 700)).unwrap();
        let part = policy.plan(&CpuExecutor::serial(), &input).unwrap();
        for tile in 0..2 {
            let blocks = |work: &SparseWork| -> Vec<ExactBlock> {
                let block = |visit: &Visit| match visit {
                    Visit::Block(block) => Some(*block),
                    _ => None,
                };
                work.list(0, tile).iter().filter_map(block).collect()
            };
            let wanted = blocks(&whole).into_iter().filter(|block| block.tile >= first_block);
            let wanted = wanted.map(|block| ExactBlock { tile: block.tile - first_block, ..block });
            assert_eq!(blocks(&part), wanted.collect::<Vec<_>>());
        }
    }
}

/// Tiles that are somewhere else.
struct Elsewhere(TileShape, usize);

impl PagedKv for Elsewhere {
    fn shape(&self) -> TileShape {
        self.0
    }
    fn len(&self) -> usize {
        self.1
    }
    fn tile(&self, index: usize) -> &Tile {
        panic!("tile {index} was read");
    }
}

/// Whoever has what a policy says that it reads can choose among blocks that are somewhere else.
#[test]
fn policies_read_no_more_than_they_say() {
    let case = Shape::default().case(&mut generator(9));
    let kv = Elsewhere(case.kv.shape, case.kv.tiles.len());
    let nothing = Tiles { tiles: Vec::new(), ..case.summaries };
    let cosines = |block: u64, kv_head: usize| ((block * 7 + kv_head as u64) % 10) as f32 / 10.0;
    let mut read = Vec::new();
    let mut texts: Vec<PrefillPolicy> = policies();
    let more = [
        "escape=0.5",
        "correction=off",
        "scorer=antidiagonal,correction=off",
        "scorer=second-order,escape=0.1",
    ];
    texts.extend(more.map(|text| policy(&format!("blocks:{text},dense_layers=0,min_positions=0"))));
    for policy in texts {
        let mut input = case.input(320, 700);
        input.cosines = Some(&cosines);
        let wanted = policy.plan(&CpuExecutor::serial(), &input).unwrap();
        let reads = policy.reads();
        if !reads.all_keys {
            input.kv = &kv;
        }
        if !reads.means {
            input.summaries = &nothing;
        }
        if !reads.spreads {
            input.spreads = None;
        }
        if !reads.cosines {
            input.cosines = None;
        }
        assert_eq!(policy.plan(&CpuExecutor::serial(), &input).unwrap(), wanted, "{policy}");
        let means = wanted.kv_heads() > 0
            && (0..wanted.tiles())
                .any(|tile| wanted.list(0, tile).iter().any(|visit| matches!(visit, Visit::Means { .. })));
        assert!(reads.values || !means, "{policy} folds means of values");
        read.push(reads);
    }
    assert!(
        read.iter().any(|reads| reads.all_keys) && read.iter().any(|reads| !reads.all_keys && reads.means)
    );
    assert!(read.iter().any(|reads| reads.spreads) && read.iter().any(|reads| reads.cosines));
    assert_eq!(policy("exact").reads(), PolicyReads::default());
    assert_eq!(policy("streaming").reads(), PolicyReads::default());
    let balanced = PolicyReads { means: true, values: true, ..PolicyReads::default() };
    assert_eq!(policy("balanced").reads(), balanced);
}
