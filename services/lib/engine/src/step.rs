//! One step: new rows of several sequences through all layers.

mod behind;

use std::{sync::Arc, time::Duration};

use longshore_attention::{Executor, KvDtype, LAYOUT_CPU_PANELS, PlanInput, SparseWork, TileShape};
use longshore_blocks::Geometry;
use longshore_compute::ComputePool;
use longshore_fabric::CallContext;
use longshore_model::{Activations, Backend, KeptAttention, KeptQkv, Kind, RowLogits, WantedRow};
use longshore_proto::types::{Dtype, WireTileShape};

use crate::{
    Error, Sequence,
    attend::{AttendTimes, LayerTurn, Part, RemoteVisits},
    error::check,
};

pub(crate) use behind::Behind;
use behind::LAYERS_BEHIND;

/// Settings of the walk.
#[derive(Debug, Clone, Copy)]
pub struct EngineOptions {
    /// Element type of K and V in tiles.
    pub kv_dtype: KvDtype,
    /// Bytes of partials that one wave of attention may hold; rows beyond it wait for the next wave.
    pub wave_bytes: usize,
    /// How long a shard may take for one attention query.
    pub attend_timeout: Duration,
    /// How long a shard that is asked for blocks, summaries, a view or attention may send nothing before another one that has the same
    /// blocks is asked; less where the caller has little time. Where there is no other it is waited for.
    pub patience: Duration,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            kv_dtype: KvDtype::F32,
            wave_bytes: 64 << 20,
            attend_timeout: Duration::from_secs(60),
            patience: Duration::from_secs(10),
        }
    }
}

/// Rows up to which a step is short enough to keep the compute pool from its first layer to its last.
const HOLD_ROWS: usize = 16;

/// A model, an executor, and the shapes of what they exchange.
#[derive(Debug)]
pub struct Engine {
    backend: Arc<dyn Backend>,
    executor: Arc<dyn Executor>,
    /// On the device of the backend.
    pub(crate) kept: Option<Arc<dyn KeptAttention>>,
    pub(crate) pool: Arc<ComputePool>,
    geometry: Geometry,
    tile_shape: TileShape,
    options: EngineOptions,
}

/// Which logits a step returns for a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// None.
    None,
    /// Those of the last new row.
    Last,
    /// So many of the likeliest tokens of the last new row, where the backend chooses them; else as [`Self::Last`].
    Candidates(usize),
    /// Those of all new rows.
    All,
}

/// New rows of one sequence.
#[derive(Debug)]
pub struct StepInput<'a> {
    /// The sequence; its blocks take the rows' keys and values.
    pub sequence: &'a mut Sequence,
    /// Tokens of the new rows, at least one.
    pub tokens: &'a [u32],
    /// Logits wanted.
    pub logits: Logits,
}

impl StepInput<'_> {
    /// Rows whose logits are wanted: the last ones.
    fn wanted_rows(&self) -> usize {
        match self.logits {
            Logits::None => 0,
            Logits::Last | Logits::Candidates(_) => 1,
            Logits::All => self.tokens.len(),
        }
    }

    /// How many candidates of each are enough; `None`: all logits are wanted.
    fn candidates(&self) -> Option<usize> {
        match self.logits {
            Logits::Candidates(count) => Some(count),
            Logits::None | Logits::Last | Logits::All => None,
        }
    }
}

/// What became of one sequence: the logits that were wanted (f32 `[vocabulary]`, or `[rows, vocabulary]`, or the likeliest of them where
/// candidates are enough), or why it cannot go on.
pub type StepOutput = Result<Option<RowLogits>, Error>;

/// Watches a step, so that tiles can leave while later layers compute.
pub trait StepObserver {
    /// The tiles of `layer` are written: those of [`Sequence::filling`] are final. Layers come in order, each once; where a device computes, the
    /// next one may have been attended to by then. An error ends the step.
    fn layer_done(&mut self, layer: usize, batch: &[StepInput<'_>]) -> Result<(), Error>;

    /// Attention of `layer` is done and took so long.
    fn attended(&mut self, _layer: usize, _times: &AttendTimes) {}

    /// Shards visited blocks for one sequence in one layer, by a policy that is not exact.
    fn visited_remotely(&mut self, _visits: &RemoteVisits) {}

    /// Whether it looks at [`Self::probe`]; where it does not, lists may stay on a device, and time to make them counts as attention.
    fn probes(&self) -> bool {
        false
    }

    /// Attention of one sequence in one layer was computed by a policy that is not exact.
    fn probe(&mut self, _probe: &AttentionProbe<'_>) {}

    /// The hidden state after the last layer, before the final norm, of the rows whose logits are wanted, in the order of the
    /// batch.
    fn finished(&mut self, _hidden: &Activations) -> Result<(), Error> {
        Ok(())
    }
}

/// What a sparse policy made of one sequence in one layer, and the result.
#[derive(Debug, Clone, Copy)]
pub struct AttentionProbe<'a> {
    /// Layer, from 0.
    pub layer: usize,
    /// What the lists were made from.
    pub plan: PlanInput<'a>,
    /// The lists.
    pub work: &'a SparseWork,
    /// f32 `[rows, query_heads * head_dim]`.
    pub output: &'a [f32],
    /// Time to make the lists.
    pub plan_time: Duration,
    /// Time to run them.
    pub attend_time: Duration,
}

/// Watches nothing.
impl StepObserver for () {
    fn layer_done(&mut self, _layer: usize, _batch: &[StepInput<'_>]) -> Result<(), Error> {
        Ok(())
    }
}

/// Shape of the tiles of a model with so many layers, as it travels.
pub fn wire_tile_shape(shape: TileShape, layers: usize) -> WireTileShape {
    WireTileShape {
        block_tokens: shape.block_tokens as u32,
        kv_heads: shape.kv_heads as u32,
        head_dim: shape.head_dim as u32,
        dtype: match shape.dtype {
            KvDtype::F32 => Dtype::F32,
            KvDtype::F16 => Dtype::F16,
            KvDtype::Bf16 => Dtype::Bf16,
            KvDtype::Int8 => Dtype::Int8,
        },
        layout: LAYOUT_CPU_PANELS,
        layers: layers as u32,
    }
}

impl Engine {
    /// An engine for blocks of `geometry` that writes tiles on `pool`; fails when the model's heads make no valid tile.
    pub fn new(
        backend: Arc<dyn Backend>,
        executor: Arc<dyn Executor>,
        pool: Arc<ComputePool>,
        geometry: Geometry,
        options: EngineOptions,
    ) -> Result<Self, Error> {
        let heads = backend.config().heads;
        let tile_shape = TileShape {
            block_tokens: geometry.block_tokens() as usize,
            kv_heads: heads.kv_heads,
            head_dim: heads.head_dim,
            dtype: options.kv_dtype,
        };
        tile_shape.validate()?;
        Ok(Self { backend, executor, kept: None, pool, geometry, tile_shape, options })
    }

    /// The same with an executor on the device of the backend, which takes rows where they are: where all that they visit is here, and nobody
    /// looks at lists.
    #[must_use]
    pub fn with_kept(self, kept: Arc<dyn KeptAttention>) -> Self {
        Self { kept: Some(kept), ..self }
    }

    /// The model.
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Runs the local part of attention.
    pub fn executor(&self) -> &Arc<dyn Executor> {
        &self.executor
    }

    /// Binds the calling engine thread to a core, where the compute pool's settings ask for that.
    pub fn pin_caller(&self) {
        if let Err(error) = self.pool.pin_caller() {
            tracing::warn!(%error, "an engine thread is not bound to its core");
        }
    }

    /// Runs `wait` without the turn on the compute pool that a step may hold.
    pub(crate) fn while_waiting<R>(&self, wait: impl FnOnce() -> R) -> R {
        self.pool.while_waiting(wait)
    }

    /// Block and stripe sizes.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Shape of every tile.
    pub fn tile_shape(&self) -> TileShape {
        self.tile_shape
    }

    /// Settings.
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// Shape of every tile as it travels.
    pub fn wire_tile_shape(&self) -> WireTileShape {
        wire_tile_shape(self.tile_shape, self.backend.config().layers)
    }

    /// Computes the new rows of all sequences, on the calling thread and the compute pool; blocks, so never on a reactor
    /// thread. A sequence whose shards fail gets its own error and the others go on; the whole step fails when `ctx`
    /// stops it (looked at between layers), when an input can never work, or when the observer says so. After a failed
    /// step its sequences can only be closed.
    pub fn step(
        &self,
        ctx: &CallContext,
        batch: &mut [StepInput<'_>],
        observer: &mut dyn StepObserver,
    ) -> Result<Vec<StepOutput>, Error> {
        let rows = Rows::begin(self, batch)?;
        // A decode step keeps its turn: beside a prefill it would else wait for one of its regions in each of its own.
        let short = rows.wanted.len() == batch.len() && rows.tokens.len() <= HOLD_ROWS;
        let _turn = short.then(|| self.pool.hold());
        let mut failed: Vec<Option<Error>> = batch.iter().map(|_| None).collect();
        let config = self.backend.config();
        let mut x = self.backend.embed(&rows.tokens)?;
        let mut behind = Behind::new(&rows.first);
        for layer in 0..config.layers {
            check(ctx)?;
            let KeptQkv { mut q, k, v } = self.project((layer, &x), &rows, batch, &mut behind, observer)?;
            self.begin_keys(layer, batch, (k, v), &mut behind)?;
            let mut parts = rows.parts(batch);
            if layer + 1 == config.layers {
                // Nobody reads what the last layer makes of rows without logits.
                if rows.wanted.is_empty() {
                    break;
                }
                (x, q, parts) = rows.only_wanted(batch, x, q)?;
            }
            let turn = LayerTurn { ctx, layer, failed: &mut failed, behind: &mut behind };
            let output = self.attend_layer(turn, batch, (&q, parts), observer)?;
            if failed.iter().all(Option::is_some) {
                return Ok(failed.into_iter().flatten().map(Err).collect());
            }
            x = self.backend.finish_kept(layer, x, &output)?;
            self.settle(&mut behind, LAYERS_BEHIND, batch, observer)?;
        }
        self.settle(&mut behind, 0, batch, observer)?;
        let logits = match rows.wanted.is_empty() {
            true => Vec::new(),
            false => {
                observer.finished(&x)?;
                self.backend.candidates(&x, &wanted_rows(batch))?
            }
        };
        Ok(finish(batch, failed, logits))
    }

    /// Queries, keys and values of a layer. Where the device has no room for them, keys and values of layers that are behind make some: these
    /// are settled, and it is tried once more.
    fn project(
        &self,
        (layer, x): (usize, &Activations),
        rows: &Rows,
        batch: &mut [StepInput<'_>],
        behind: &mut Behind<'_>,
        observer: &mut dyn StepObserver,
    ) -> Result<KeptQkv, Error> {
        match self.backend.qkv_kept(layer, x, &rows.positions) {
            Err(error) if error.kind() == Kind::Exhausted && !behind.is_empty() => {
                self.settle(behind, 0, batch, observer)?;
                Ok(self.backend.qkv_kept(layer, x, &rows.positions)?)
            }
            outcome => Ok(outcome?),
        }
    }
}

/// The rows of all sequences, one after the other.
struct Rows {
    tokens: Vec<u32>,
    positions: Vec<u64>,
    /// Row of each sequence's first token.
    first: Vec<usize>,
    /// Rows whose logits are wanted.
    wanted: Vec<usize>,
}

impl Rows {
    fn begin(engine: &Engine, batch: &mut [StepInput<'_>]) -> Result<Self, Error> {
        let vocabulary = engine.backend.config().vocabulary;
        let mut rows =
            Self { tokens: Vec::new(), positions: Vec::new(), first: Vec::new(), wanted: Vec::new() };
        for input in batch.iter() {
            if input.tokens.is_empty() {
                return Err(Error::Invalid { field: "tokens", problem: "are empty".to_owned() });
            }
            if let Some(id) = input.tokens.iter().find(|&&id| id as usize >= vocabulary) {
                let problem = format!("contain `{id}`, the vocabulary ends before {vocabulary}");
                return Err(Error::Invalid { field: "tokens", problem });
            }
        }
        for input in batch.iter_mut() {
            let position = input.sequence.position();
            rows.first.push(rows.tokens.len());
            rows.tokens.extend_from_slice(input.tokens);
            rows.positions.extend(position..position + input.tokens.len() as u64);
            let end = rows.tokens.len();
            rows.wanted.extend(end - input.wanted_rows()..end);
        }
        for input in batch.iter_mut() {
            input.sequence.begin(input.tokens)?;
        }
        Ok(rows)
    }

    /// All rows, by sequence.
    fn parts(&self, batch: &[StepInput<'_>]) -> Vec<Part> {
        let sequences = batch.iter().zip(&self.first).enumerate();
        let part = |(input, (step, &first)): (usize, (&StepInput<'_>, &usize))| Part {
            input,
            first_position: step.sequence.position(),
            rows: first..first + step.tokens.len(),
        };
        sequences.map(part).collect()
    }

    /// The rows whose logits are wanted: of the residual stream, of the queries, and by sequence.
    fn only_wanted(
        &self,
        batch: &[StepInput<'_>],
        x: Activations,
        q: Activations,
    ) -> Result<(Activations, Activations, Vec<Part>), Error> {
        let mut parts = Vec::new();
        let mut first = 0;
        for (input, step) in batch.iter().enumerate().filter(|(_, step)| step.logits != Logits::None) {
            let rows = step.wanted_rows();
            let end = step.sequence.position() + step.tokens.len() as u64;
            parts.push(Part { input, first_position: end - rows as u64, rows: first..first + rows });
            first += rows;
        }
        if self.wanted.len() == self.tokens.len() {
            return Ok((x, q, parts));
        }
        Ok((x.select(&self.wanted)?, q.select(&self.wanted)?, parts))
    }
}

/// The rows that are left after the last layer: all of them are wanted.
fn wanted_rows(batch: &[StepInput<'_>]) -> Vec<WantedRow> {
    let of = |input: &StepInput<'_>| std::iter::repeat_n(input.candidates(), input.wanted_rows());
    let rows = batch.iter().flat_map(of).enumerate();
    rows.map(|(row, candidates)| WantedRow { row, candidates }).collect()
}

/// Hands each sequence its own of the wanted rows, and ends its step.
fn finish(
    batch: &mut [StepInput<'_>],
    failed: Vec<Option<Error>>,
    logits: Vec<RowLogits>,
) -> Vec<StepOutput> {
    let mut rows = logits.into_iter();
    let outcome = |(input, failure): (&mut StepInput<'_>, Option<Error>)| {
        let own = rows.by_ref().take(input.wanted_rows());
        let own = match input.logits {
            Logits::None => None,
            Logits::Last | Logits::Candidates(_) => own.last(),
            Logits::All => Some(RowLogits::All(own.flat_map(RowLogits::into_all).collect())),
        };
        match failure {
            Some(error) => Err(error),
            None => {
                input.sequence.commit();
                Ok(own)
            }
        }
    };
    batch.iter_mut().zip(failed).map(outcome).collect()
}
