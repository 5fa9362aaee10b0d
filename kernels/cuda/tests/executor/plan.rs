//! Plans whose blocks the device chooses, against the CPU's.

use std::sync::Arc;

use longshore_attention::{
    BlockChoice, BlockChooser as _, BlockSelection, CpuExecutor, Executor as _, HeadShape, KvDtype,
    PlanInput, PrefillPolicy, Queries, Summaries, Tile, TileShape, Tiles,
};
use longshore_cuda::{CudaExecutor, Device};
use rand::{RngExt as _, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::counted::Watched;

pub(crate) const HEADS: HeadShape = HeadShape { kv_heads: 2, group: 3, head_dim: 64 };
const TOKENS: usize = 16;
const STRIPE: u32 = 24;

/// Keys lean one way block by block, so that some blocks matter more.
pub(crate) struct Prompt {
    first_position: usize,
    rows: Vec<f32>,
    tiles: Tiles,
    summaries: Summaries,
}

impl Prompt {
    fn new(first_position: usize, rows: usize, equal: bool) -> Self {
        let shape = TileShape {
            block_tokens: TOKENS,
            kv_heads: HEADS.kv_heads,
            head_dim: HEADS.head_dim,
            dtype: KvDtype::F32,
        };
        Self::of(shape, first_position, rows, equal)
    }

    /// `equal`: all keys are the same, and so are all energies.
    pub(crate) fn of(shape: TileShape, first_position: usize, rows: usize, equal: bool) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(71);
        let width = HEADS.kv_heads * HEADS.head_dim;
        let blocks = (first_position + rows).div_ceil(shape.block_tokens);
        let mut numbers = |count: usize, most: f32| -> Vec<f32> {
            (0..count).map(|_| random.random_range(-most..most)).collect()
        };
        let same = numbers(width, 1.0);
        let mut tiles = Vec::new();
        for _ in 0..blocks {
            let (lean, mut tile) = (numbers(width, 1.5), Tile::zeroed(shape));
            for token in 0..shape.block_tokens {
                let key: Vec<f32> = numbers(width, 0.5).iter().zip(&lean).map(|(x, lean)| x + lean).collect();
                let key = if equal { &same } else { &key };
                tile.write(token, key, key).unwrap();
            }
            tiles.push(tile);
        }
        let mut summaries = Summaries::new(shape, STRIPE, 0).unwrap();
        for (block, tile) in tiles.iter().take((first_position + rows) / shape.block_tokens).enumerate() {
            summaries.push(block as u64, tile).unwrap();
        }
        let rows = numbers(rows * HEADS.query_heads() * HEADS.head_dim, 2.0);
        Self { first_position, rows, tiles: Tiles { shape, tiles }, summaries }
    }

    /// The same with other rows.
    pub(crate) fn with_rows(self, rows: Vec<f32>) -> Self {
        Self { rows, ..self }
    }

    pub(crate) fn tiles(&self) -> &Tiles {
        &self.tiles
    }

    /// Calls `take` with what a plan of all rows is made from.
    pub(crate) fn with_input<R>(&self, take: impl FnOnce(&PlanInput<'_>) -> R) -> R {
        let (spreads, cosines) = (self.summaries.spreads(), |block, head| self.summaries.cosine(block, head));
        take(&PlanInput {
            queries: Queries {
                shape: HEADS,
                first_position: self.first_position as u64,
                scale: 0.125,
                data: &self.rows,
            },
            layer: 5,
            kv: &self.tiles,
            first_block: 0,
            summaries: &self.summaries,
            stripe_blocks: STRIPE,
            dense_from: (self.first_position + self.rows.len() / HEADS.query_heads() / HEADS.head_dim) as u64,
            spreads: Some(&spreads),
            cosines: Some(&cosines),
        })
    }

    /// Plans on the CPU and by an executor of a device; the launches of the latter.
    fn compare(&self, policy: &str) -> usize {
        let policy = PrefillPolicy::parse(policy, None).unwrap();
        self.with_input(|input| compare(&policy, input))
    }
}

fn compare(policy: &PrefillPolicy, input: &PlanInput<'_>) -> usize {
    let watched = Watched::with_room(usize::MAX);
    let device: Arc<dyn Device> = watched.clone();
    let executor = CudaExecutor::new(device, CpuExecutor::serial(), 1 << 20).with_choices_min(0);
    let wanted = CpuExecutor::serial().plan(policy, input).unwrap();
    assert!(executor.plan(policy, input).unwrap() == wanted, "{policy}");
    let counts = watched.counted();
    assert_eq!(counts.waits(), usize::from(counts.launches > 0), "{policy}: {counts:?}");
    // The means stay: a second plan brings none.
    assert!(executor.plan(policy, input).unwrap() == wanted, "{policy}");
    let again = watched.counted() - counts;
    assert_eq!((again.launches, again.uploads_apart), (counts.launches.saturating_sub(1), 0), "{policy}");
    // What is small is planned on the CPU, and so is what the device has no room for.
    let before = watched.counted();
    let small = CudaExecutor::new(watched.clone(), CpuExecutor::serial(), 1 << 20);
    assert!(small.plan(policy, input).unwrap() == wanted);
    assert_eq!(watched.counted(), before);
    let full = CudaExecutor::new(Watched::with_room(1 << 16), CpuExecutor::serial(), 1 << 20);
    assert!(full.with_choices_min(0).plan(policy, input).unwrap() == wanted);
    counts.launches
}

fn blocks(rule: &str) -> String {
    format!("blocks:{rule},dense_layers=0,min_positions=0,last_tiles=0")
}

#[test]
fn lists_are_those_of_the_cpu() {
    // Rows that begin and end within a tile: those are exact.
    let prompt = Prompt::new(40 * TOKENS + 7, 200, false);
    for rule in [
        "scorer=pooled,selector=alpha,alpha=0.1,correction=off",
        "scorer=pooled,selector=mass,gamma=0.8,correction=on",
        "scorer=row-normalised,selector=mass,gamma=0.9,peak=0.25",
        "scorer=row-normalised,selector=top-k,k=9,escape=0.7",
        "scorer=row-normalised,selector=top-k,k=9,max_blocks=3",
        "scorer=row-normalised,selector=alpha,alpha=0.3,sink=0,local=0",
        "scorer=row-normalised,selector=alpha,alpha=0.1,max_blocks=3",
        "scorer=pooled,selector=mass,gamma=0.9,max_blocks=3",
        "scorer=row-normalised,selector=mass,gamma=1,max_blocks=5,peak=0.25",
    ] {
        assert_eq!(prompt.compare(&blocks(rule)), 3, "{rule}: means, energies, and what is kept of them");
    }
    // A whole policy, as it is and bounded so that the bound matters.
    for policy in ["balanced:min_positions=0", "balanced:min_positions=0,last_tiles=1,max_blocks=6"] {
        assert_eq!(prompt.compare(policy), 3, "{policy}");
    }
}

#[test]
fn of_equal_blocks_the_same_are_kept() {
    let prompt = Prompt::new(40 * TOKENS, 96, true);
    for rule in [
        "scorer=pooled,selector=top-k,k=7,sink=1,local=1",
        "scorer=row-normalised,selector=mass,gamma=0.31,sink=1,local=1",
        "scorer=pooled,selector=alpha,alpha=1",
        "scorer=pooled,selector=alpha,alpha=1,max_blocks=4,sink=1,local=1",
        "scorer=row-normalised,selector=mass,gamma=0.9,max_blocks=11,sink=1,local=1",
    ] {
        assert_eq!(prompt.compare(&blocks(rule)), 3, "{rule}");
    }
}

#[test]
fn rules_that_the_device_does_not_know_are_the_cpus() {
    let prompt = Prompt::new(20 * TOKENS, 64, false);
    for policy in [
        blocks("scorer=second-order,selector=mass,gamma=0.9"),
        blocks("scorer=antidiagonal,stride=8,selector=mass,gamma=0.9"),
        blocks("scorer=pooled-query,selector=mass,gamma=0.9"),
        "minference:vertical=35,slash=60,dense_layers=0,min_positions=0".to_owned(),
        "exact".to_owned(),
    ] {
        assert_eq!(prompt.compare(&policy), 0, "{policy}");
    }
    // Nothing lies before the first rows.
    assert_eq!(Prompt::new(0, 16, false).compare(&blocks("scorer=pooled,selector=top-k,k=3")), 0);
}

#[test]
fn heads_without_a_kernel_are_the_cpus_and_faults_are_told() {
    let prompt = Prompt::new(20 * TOKENS, 64, false);
    let device = Watched::with_room(usize::MAX);
    let executor = CudaExecutor::new(device.clone(), CpuExecutor::serial(), 1 << 20).with_choices_min(0);
    let choose = |shape: HeadShape, scale: f32| {
        let first_position = prompt.first_position as u64;
        executor.choose(&BlockChoice {
            queries: Queries { shape, first_position, scale, data: &prompt.rows },
            first_row: 0,
            tiles: 1,
            block_tokens: TOKENS,
            blocks: 20,
            summaries: &prompt.summaries,
            stripe_blocks: STRIPE as usize,
            normalise: false,
            selection: BlockSelection::TopK(3),
            most: 20,
            sink: 1,
            local: 1,
            peak: None,
            always: &[],
        })
    };
    // Their queries have no room in shared memory.
    assert!(choose(HeadShape { group: 1 << 16, ..HEADS }, 0.125).unwrap().is_none());
    assert_eq!(device.counted().launches, 0);
    assert!(choose(HEADS, 0.125).unwrap().is_some());
    let told = choose(HEADS, f32::NAN).unwrap_err().to_string();
    assert!(told.contains("`scale`"), "{told}");
}
