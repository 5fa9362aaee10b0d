//! Prefill policies: which blocks of its prefix a query tile visits. They own no memory and no threads.
//!
//! A policy is a scorer × selector with guards and mean correction ([`blocks`]), for all heads or each its own, or a plan of
//! heads ([`heads`]). What a tile
//! visits follows from its own queries, its position and the blocks before it: never from the chunk, the batch, the length
//! of the prompt, the number of threads or the instruction set (each sum has one order, see [`scores`]).

mod antidiagonal;
mod blocks;
mod chooser;
mod digest;
mod flex;
mod grid;
mod head_plan;
mod heads;
mod keys;
mod levels;
mod list;
mod log2;
mod pack;
mod plan;
mod scores;
mod select;
mod spec;
mod streaming;
mod vertical_slash;

use std::sync::Arc;

use crate::{CpuExecutor, Error, PagedKv, Queries, SparseWork};

use head_plan::Level;

pub use chooser::{BlockChoice, BlockChooser, BlockSelection, RuleCall};
pub use head_plan::{BudgetLevel, GatesCut, HeadBudgets, HeadPattern, HeadPlan};
pub use streaming::Streaming;

/// Mean cosine of a block's keys with their mean, of (block of the sequence, KV head).
pub type Cosines<'a> = &'a (dyn Fn(u64, usize) -> f32 + Sync);

/// What a plan is made from.
#[derive(Clone, Copy)]
pub struct PlanInput<'a> {
    /// Rotated query rows of one sequence.
    pub queries: Queries<'a>,
    /// Layer, from 0.
    pub layer: usize,
    /// Tiles of the sequence in this layer; tile `i` is block `first_block + i`. Those of the rows are written. The scorers
    /// `pooled`, `row-normalised` and `pooled-query` and the heads `streaming` and `block_sparse` read only its shape and
    /// length.
    pub kv: &'a dyn PagedKv,
    /// Block of tile 0. Above 0, the earlier blocks are somebody else's: rows that are exact and streaming heads leave them
    /// out; whatever compares blocks is refused, for it would decide otherwise than with all of them.
    pub first_block: u64,
    /// Means of full blocks; tile `s` is stripe `first_block / stripe_blocks + s`, f32, of `max(stripe_blocks, 16)` keys.
    pub summaries: &'a dyn PagedKv,
    /// Blocks of a stripe.
    pub stripe_blocks: u32,
    /// Rows from this position on are exact.
    pub dense_from: u64,
    /// Spreads of the keys about their means, in the places of `summaries`, for the scorer `second-order`, which is refused
    /// without.
    pub spreads: Option<&'a dyn PagedKv>,
    /// For the guard `escape`, which is refused without.
    pub cosines: Option<Cosines<'a>>,
}

impl std::fmt::Debug for PlanInput<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PlanInput")
            .field("layer", &self.layer)
            .field("first_position", &self.queries.first_position)
            .field("rows", &self.queries.data.len())
            .field("tiles", &self.kv.len())
            .field("dense_from", &self.dense_from)
            .finish_non_exhaustive()
    }
}

/// What a policy reads of the blocks before a tile, apart from the blocks that it visits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PolicyReads {
    /// All keys: whoever plans has all blocks.
    pub all_keys: bool,
    /// Mean keys.
    pub means: bool,
    /// Mean values, which stand for blocks that are not visited.
    pub values: bool,
    /// Spreads of the keys.
    pub spreads: bool,
    /// Mean cosines of the keys.
    pub cosines: bool,
}

impl PolicyReads {
    /// What two policies read together.
    fn and(self, other: Self) -> Self {
        Self {
            all_keys: self.all_keys | other.all_keys,
            means: self.means | other.means,
            values: self.values | other.values,
            spreads: self.spreads | other.spreads,
            cosines: self.cosines | other.cosines,
        }
    }
}

/// How a prompt is attended to. Equal policies have equal fingerprints, and the other way round.
#[derive(Debug, Clone, PartialEq)]
pub struct PrefillPolicy {
    method: Method,
    guards: Guards,
}

#[derive(Debug, Clone, PartialEq)]
enum Method {
    Exact,
    /// Every head alike.
    Blocks(Blocks),
    /// Every KV head by its own rule, or dense.
    Budgets(Arc<Level>),
    Heads(Heads),
    /// Every query head query-aware or vertical-slash, span by span.
    Flex(Flex),
}

/// Scorer × selector.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Blocks {
    scorer: Scorer,
    selector: Selector,
    /// The most blocks that the selector may keep, the heaviest: what a tile costs does not grow with its prefix from there on.
    max_blocks: Option<u64>,
    /// Whether means stand for what is not visited.
    correction: bool,
    /// First blocks that are always visited.
    sink: u64,
    /// Blocks before the tile's own that are always visited.
    local: u64,
    /// Blocks of a smaller mean cosine are always visited.
    escape: Option<f32>,
    /// Blocks that take such a share of any row, as the scorer sees it, are always visited.
    peak: Option<f32>,
    /// Whether bounds of panels of blocks choose which blocks are scored.
    two_levels: bool,
}

impl Blocks {
    /// Most blocks that the selector may keep.
    fn most(&self) -> usize {
        self.max_blocks.map_or(usize::MAX, |most| most as usize)
    }

    fn is_antidiagonal(&self) -> bool {
        matches!(self.scorer, Scorer::Antidiagonal(_))
    }

    fn reads(&self) -> PolicyReads {
        PolicyReads {
            all_keys: self.is_antidiagonal(),
            means: self.correction || !self.is_antidiagonal(),
            values: self.correction,
            spreads: self.scorer == Scorer::SecondOrder,
            cosines: self.escape.is_some(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scorer {
    Pooled,
    RowNormalised,
    SecondOrder,
    PooledQuery,
    /// Keys of a cell.
    Antidiagonal(usize),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Selector {
    Alpha(f32),
    Mass(f32),
    TopK(usize),
}

/// FlexPrefill.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Flex {
    /// Share of the mass that is visited, as each kind of head estimates it.
    gamma: f32,
    /// Heads whose pooled estimate is nearer than this are query-aware.
    tau: f32,
    /// Keys that every head visits at least.
    budget: u64,
}

#[derive(Debug, Clone, PartialEq)]
enum Heads {
    /// All heads alike.
    Uniform(HeadPattern),
    Planned(Arc<HeadPlan>),
}

impl Heads {
    /// Whether any head has such a pattern.
    fn any(&self, wanted: impl Fn(&HeadPattern) -> bool) -> bool {
        match self {
            Self::Uniform(pattern) => wanted(pattern),
            Self::Planned(plan) => (0..plan.layers()).any(|layer| plan.layer(layer).iter().any(&wanted)),
        }
    }
}

/// When rows are exact whatever the method.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Guards {
    dense_layers: usize,
    min_positions: u64,
    last_tiles: u32,
    skip: Option<f32>,
}

impl PrefillPolicy {
    /// Visits everything.
    pub fn exact() -> Self {
        Self {
            method: Method::Exact,
            guards: Guards { dense_layers: 0, min_positions: 0, last_tiles: 0, skip: None },
        }
    }

    /// Reads `name` or `name:key=value,key=value`, for example `balanced`, `balanced:gamma=0.95,correction=off` or
    /// `blocks:scorer=antidiagonal,stride=16,selector=mass,gamma=0.9`. `plan` is the deployment's head plan: `heads` needs
    /// one, and `minference` without patterns gives every head MInference's default (1000, 6096). A preset whose name is a level of
    /// the plan's budgets means that level, unless `plan=off` or a key of the skeleton (`gamma`, …) is given. Refuses unknown
    /// names and keys, keys given twice and values out of range, and says what is valid.
    pub fn parse(text: &str, plan: Option<&HeadPlan>) -> Result<Self, Error> {
        spec::parse(text, plan)
    }

    /// Reads a fingerprint that another process wrote. Refuses what means something else here: with another version, or another head
    /// plan.
    pub fn from_fingerprint(text: &str, plan: Option<&HeadPlan>) -> Result<Self, Error> {
        let policy = Self::parse(text, plan)?;
        match policy.fingerprint() {
            here if here == text => Ok(policy),
            here => invalid("policy", format!("means `{here}` in this process")),
        }
    }

    /// Whether it visits everything everywhere.
    pub fn is_exact(&self) -> bool {
        self.method == Method::Exact
    }

    /// Canonical text: every value, and the digest of the head plan. [`Self::parse`] reads it back.
    pub fn fingerprint(&self) -> String {
        spec::canonical(self)
    }

    /// Query tiles at the end of a prompt that are exact.
    pub fn last_tiles(&self) -> u32 {
        self.guards.last_tiles
    }

    /// Position from which rows of a prompt of so many tokens are exact: 0 when everything is.
    pub fn dense_from(&self, prompt_tokens: u64) -> u64 {
        let tile = crate::QUERY_TILE as u64;
        let last = u64::from(self.guards.last_tiles) * tile;
        if self.is_exact() { 0 } else { prompt_tokens.saturating_sub(last) / tile * tile }
    }

    /// Positions that chunks should be whole multiples of: other cuts make more rows exact.
    pub fn chunk_multiple(&self) -> usize {
        let slashes = match &self.method {
            Method::Exact | Method::Blocks(_) | Method::Budgets(_) => false,
            Method::Flex(_) => true,
            Method::Heads(Heads::Uniform(pattern)) => pattern.is_vertical_slash(),
            Method::Heads(Heads::Planned(plan)) => plan.has_vertical_slash(),
        };
        if slashes { vertical_slash::SPAN } else { 64 }
    }

    /// Margin of skip-softmax, base 2, for [`crate::SparseItem::skip_below`].
    pub fn skip_below(&self) -> Option<f32> {
        self.guards.skip
    }

    /// What [`Self::plan`] and its lists read beyond the blocks that are visited.
    pub fn reads(&self) -> PolicyReads {
        match &self.method {
            Method::Exact => PolicyReads::default(),
            Method::Blocks(rule) => rule.reads(),
            Method::Budgets(level) => {
                let rules = (0..level.layers()).filter_map(|layer| level.layer(layer)).flatten().flatten();
                rules.map(Blocks::reads).fold(PolicyReads::default(), PolicyReads::and)
            }
            Method::Flex(_) => PolicyReads { all_keys: true, means: true, ..PolicyReads::default() },
            Method::Heads(heads) => PolicyReads {
                all_keys: heads.any(HeadPattern::is_vertical_slash),
                means: heads.any(|pattern| matches!(pattern, HeadPattern::BlockSparse { .. })),
                ..PolicyReads::default()
            },
        }
    }

    /// Whether one rule of all heads chooses blocks by their means alone in a layer: who has these on a device needs nothing of the host but where
    /// things lie ([`Self::with_rule`]).
    pub fn chooses_by_means(&self, layer: usize) -> bool {
        let Method::Blocks(rule) = &self.method else { return false };
        let by_means = matches!(rule.scorer, Scorer::Pooled | Scorer::RowNormalised);
        layer >= self.guards.dense_layers && by_means && rule.escape.is_none() && !rule.two_levels
    }

    /// Lists for all rows of `input.queries`. Rows that the policy leaves exact (of its first layers, before `min_positions`,
    /// from `dense_from` on, of tiles that are not whole, of unfinished spans of vertical-slash heads) visit everything up
    /// to themselves; with skip-softmax even they leave out blocks without weight. Tiles are planned side by side on the executor's pool.
    pub fn plan(&self, executor: &CpuExecutor, input: &PlanInput<'_>) -> Result<SparseWork, Error> {
        plan::plan(self, executor, input, None)
    }

    /// The same, blocks being chosen by `chooser` where it knows the rule and wants to.
    pub fn plan_with(
        &self,
        executor: &CpuExecutor,
        input: &PlanInput<'_>,
        chooser: &dyn BlockChooser,
    ) -> Result<SparseWork, Error> {
        plan::plan(self, executor, input, Some(chooser))
    }

    /// Has `take` do a call without lists where this policy is a rule that a [`BlockChooser`] knows and some rows are not exact; `None`: it is
    /// not, or they are. The call has so many rows, whose queries are not looked at: their data may be elsewhere. Refuses what [`Self::plan`]
    /// refuses.
    pub fn with_rule<R>(
        &self,
        executor: &CpuExecutor,
        (input, rows): (&PlanInput<'_>, usize),
        take: impl FnOnce(&RuleCall<'_>) -> R,
    ) -> Result<Option<R>, Error> {
        plan::with_rule(self, executor, (input, rows), take)
    }

    /// Names that [`Self::parse`] knows, with a line about each.
    pub fn names() -> &'static [(&'static str, &'static str)] {
        spec::NAMES
    }
}

impl std::fmt::Display for PrefillPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.fingerprint())
    }
}

fn invalid<T>(field: &'static str, problem: impl Into<String>) -> Result<T, Error> {
    Err(Error::Invalid { field, problem: problem.into() })
}

/// The beginning of what somebody wrote, for an error.
fn shown(text: &str) -> String {
    const MOST: usize = 40;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("`{}…`", text[..end].escape_debug()),
        None => format!("`{}`", text.escape_debug()),
    }
}

/// An error of a reader of JSON, which may quote all that it read.
fn shown_error(error: &str) -> String {
    const MOST: usize = 200;
    error.char_indices().nth(MOST).map_or_else(|| error.to_owned(), |(end, _)| format!("{}…", &error[..end]))
}
