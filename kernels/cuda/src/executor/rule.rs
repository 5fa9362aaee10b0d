//! Attention by a rule that chooses blocks, all of it on the device: energies, bits, visits and attention follow each other in the queue,
//! and nothing of the lists comes to the host.

mod cut;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use longshore_attention::{
    Error as AttentionError, Partials, PlanInput, PrefillPolicy, QUERY_TILE, RuleCall,
};
use longshore_model::Promised;

use super::fallback::{RuleCallOf, Shortage};
use super::pages::{TilePages, contents_of};
use super::plan::{always, guards, selector, words_from};
use super::wave::{Wave, record_shape};
use super::{CudaExecutor, MEAN_EIGHTHS, SCORE_EIGHTHS, eighths, failed, list_element};
use crate::{
    BlockScorer, BlockSelector, Buffer, CountedLists, Error, KeyVisit, MeanPages, PageElement, Pinned,
    PrefillAttention, PrefillCall, ScoreCall, SelectCall, SelectGuards, Selector, Span, VisitBuilder,
    VisitCall,
};
use cut::{Cut, Run};

/// Of the blocks of a prefix that does not stay, one of so many may be missing.
const MISSING_SHARE: usize = 4;
/// Layers that are told apart, at most.
const LAYERS_MAX: usize = 4096;

/// Layers that were asked for: as many prefixes want pages at once.
#[derive(Debug, Default)]
pub(super) struct Layers(Mutex<HashSet<usize>>);

impl Layers {
    /// How many there are, with this one.
    fn count(&self, layer: usize) -> usize {
        // Layers are added whole.
        let mut layers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if layers.len() < LAYERS_MAX {
            layers.insert(layer);
        }
        layers.len()
    }
}

/// Rows of a call on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowsAt<'a> {
    /// f32 `[rows][query_heads][head_dim]`.
    pub(super) queries: Span<'a>,
    /// Records, or, divided, as the queries.
    pub(super) output: Span<'a>,
    /// Whether the output is attention.
    pub(super) divide: bool,
}

impl CudaExecutor {
    /// `None`: lists of the host are for it. The policy is no rule that the kernels know, there is little to choose, or the device has no
    /// page for each block of the prefix.
    pub(super) fn attend_by_rule(
        &self,
        policy: &PrefillPolicy,
        input: &PlanInput<'_>,
    ) -> Result<Option<Partials>, AttentionError> {
        let of = (input, input.queries.rows(), Promised::default());
        self.with_call(policy, of, |call| {
            let wave = Wave::new(&self.device, &[record_shape(&input.queries)])?;
            let queries = Buffer::from_slice(&self.device, input.queries.data)?;
            let at = RowsAt { queries: queries.whole(), output: wave.results()?[0], divide: false };
            Ok(if call.queue(at)? { wave.read()?.pop() } else { None })
        })
    }

    /// The same of so many rows that are on the device, as is what comes out; false: nothing was queued that counts.
    pub(super) fn queue_by_rule(
        &self,
        policy: &PrefillPolicy,
        of: (&PlanInput<'_>, usize, Promised<'_>),
        at: RowsAt<'_>,
    ) -> Result<bool, AttentionError> {
        let queued = self.with_call(policy, of, |call| Ok(call.queue(at)?.then_some(())))?.is_some();
        if !queued {
            self.fallbacks.remember(RuleCallOf::of(of.0, of.1, of.2.tiles));
        }
        Ok(queued)
    }

    fn with_call<R>(
        &self,
        policy: &PrefillPolicy,
        (input, rows, promised): (&PlanInput<'_>, usize, Promised<'_>),
        run: impl Fn(&Call<'_>) -> Result<Option<R>, Error>,
    ) -> Result<Option<R>, AttentionError> {
        if input.kv.only_head().is_some() || input.summaries.only_head().is_some() {
            return Ok(None);
        }
        let done = policy.with_rule(&self.cpu, (input, rows), |rule| {
            let lists = input.queries.shape.kv_heads * rule.choice.tiles;
            // Where there is nothing to choose nothing is scored.
            if lists * rule.choice.blocks < self.choices_min.max(1) {
                return Ok(None);
            }
            let attended = match self.rule_parts((input, promised), rule) {
                Ok(Some(parts)) => {
                    let skip_below = policy.skip_below();
                    let call =
                        Call { executor: self, input, promised, rule, parts: &parts, rows, skip_below };
                    self.with_room(|| run(&call))
                }
                // No kernel for these heads or tiles: lists of the host may have one, or say what is wrong.
                Ok(None) | Err(Error::Invalid { .. }) => return Ok(None),
                Err(error) => Err(error),
            };
            let short = match &attended {
                Ok(done) => done.is_none(),
                Err(error) => Shortage::of(error).is_some(),
            };
            if short {
                // Lists need less, or are the CPU's.
                self.fallbacks.note_lists();
                return Ok(None);
            }
            attended.map_err(failed)
        })?;
        done.unwrap_or(Ok(None))
    }

    /// Refuses a prefix of so many blocks where there is no page for each of them, and where most of them are not on the device and would not
    /// stay until the next chunk: with more layers than there is room for, what is not used for longest makes way, which is what is wanted
    /// next, and every layer would bring its whole prefix each time. Lists bring no more than is visited.
    fn check_room(
        &self,
        pages: &TilePages,
        blocks: usize,
        (input, promised): (&PlanInput<'_>, Promised<'_>),
    ) -> Result<(), Error> {
        pages.check_room(blocks)?;
        let all = blocks.saturating_mul(self.layers.count(input.layer));
        if all <= pages.limit() {
            return Ok(());
        }
        let missing = pages.missing(&contents_of(input.kv, blocks, blocks, promised.tiles));
        if missing * MISSING_SHARE <= blocks {
            return Ok(());
        }
        let problem = format!(
            "{missing} of {blocks} blocks have none, those of all layers take {all}, there is room for {}",
            pages.limit()
        );
        Err(Error::OutOfPages { problem })
    }

    /// What a call takes of the device; `None`: visits cannot name its keys, or its tiles differ.
    fn rule_parts(
        &self,
        (input, promised): (&PlanInput<'_>, Promised<'_>),
        rule: &RuleCall<'_>,
    ) -> Result<Option<RuleParts>, Error> {
        let (tile, heads) = (input.kv.shape(), input.queries.shape);
        let (element, means) = (list_element(tile), input.summaries.shape());
        let scorer = BlockScorer::new(&self.device, heads, PageElement::F32)?;
        let pages = self.pages(tile, element, eighths(tile, element))?;
        let scores = self.pages(means, PageElement::F32, SCORE_EIGHTHS)?;
        let means = match rule.correction {
            true => Some(self.pages(means, element, MEAN_EIGHTHS)?),
            false => None,
        };
        let attention = self.prefill(&pages.shape(), heads.group)?;
        let keys = attention.visit_keys(QUERY_TILE)?;
        let Some(cut) = Cut::new(rule, input, keys) else { return Ok(None) };
        self.check_room(&pages, cut.blocks, (input, promised))?;
        scores.check_room(cut.stripes)?;
        means.as_deref().map_or(Ok(()), |means| means.check_room(cut.stripes))?;
        Ok(Some(RuleParts { scorer, attention, pages, scores, means, cut }))
    }
}

/// A call, with what a device has for it.
struct Call<'a> {
    executor: &'a CudaExecutor,
    input: &'a PlanInput<'a>,
    promised: Promised<'a>,
    rule: &'a RuleCall<'a>,
    parts: &'a RuleParts,
    rows: usize,
    skip_below: Option<f32>,
}

impl Call<'_> {
    /// Queues everything; false: others have pinned pages that it would need.
    fn queue(&self, at: RowsAt<'_>) -> Result<bool, Error> {
        // Whoever needs pages need not wait for the results: they are free as soon as all is queued.
        let Some(pinned) = self.parts.pin(self.input, self.promised)? else { return Ok(false) };
        let tables = Tables::new(self, &pinned)?;
        let room = Room::new(self)?;
        for run in &self.parts.cut.runs {
            self.select(at, (&tables, &room), run)?;
            self.make_visits((&tables, &room), run)?;
            self.attend(at, (&tables, &room), run)?;
        }
        Ok(true)
    }

    /// Queues the bits of the lists of a run.
    fn select(&self, at: RowsAt<'_>, (tables, room): (&Tables, &Room), run: &Run) -> Result<(), Error> {
        let (choice, cut, queries) = (&self.rule.choice, &self.parts.cut, &self.input.queries);
        if run.chosen {
            let first_row = self.rule.tiles[run.tiles.start].start;
            self.parts.scorer.launch(&ScoreCall {
                queries: at.queries,
                means: tables.scores.whole(),
                energies: room.energies.whole(),
                peaks: room.peaks.as_ref().map(Buffer::whole),
                first_position: queries.first_position + first_row as u64,
                first_row,
                tiles: run.tiles.len(),
                stripes: cut.stripes,
                stripe_blocks: choice.stripe_blocks,
                page_keys: self.parts.scores.shape().tokens,
                stride: choice.blocks,
                block_tokens: choice.block_tokens,
                scale: queries.scale,
                normalise: choice.normalise,
            })?;
        }
        let nothing = SelectGuards { sink: 0, local: 0, peak: None };
        BlockSelector::new(&self.executor.device).launch(&SelectCall {
            energies: room.energies.whole(),
            peaks: room.peaks.as_ref().map(Buffer::whole),
            always: tables.always.as_ref().filter(|_| run.chosen).map(Buffer::whole),
            ends: words_from(&tables.ends, 2 * run.tiles.start)?,
            bits: room.bits.whole(),
            counts: room.counts.whole(),
            kv_heads: queries.shape.kv_heads,
            tiles: run.tiles.len(),
            stride: choice.blocks,
            words: cut.words,
            // Rows that are exact score no block: theirs are all visited.
            selector: if run.chosen { selector(choice.selection) } else { Selector::TopK(0) },
            most: u32::try_from(choice.most).unwrap_or(u32::MAX),
            guards: if run.chosen { guards(choice) } else { nothing },
        })
    }

    /// Queues the visits of the lists of a run.
    fn make_visits(&self, (tables, room): (&Tables, &Room), run: &Run) -> Result<(), Error> {
        let cut = &self.parts.cut;
        let call = VisitCall {
            bits: room.bits.whole(),
            ends: words_from(&tables.ends, 2 * run.tiles.start)?,
            row_ends: words_from(&tables.row_ends, run.tiles.start)?,
            lists: self.input.queries.shape.kv_heads * run.tiles.len(),
            tiles: run.tiles.len(),
            words: cut.words,
            block_tokens: self.parts.pages.shape().tokens,
            keys: cut.keys,
            means: cut.means.filter(|_| run.chosen),
        };
        let (counts, offsets, visits) = (room.counts.whole(), room.offsets.whole(), room.visits.whole());
        VisitBuilder::new(&self.executor.device).launch(&call, counts, offsets, visits)
    }

    fn attend(&self, at: RowsAt<'_>, (tables, room): (&Tables, &Room), run: &Run) -> Result<(), Error> {
        let (parts, queries) = (self.parts, &self.input.queries);
        let means = tables.means.as_ref().zip(parts.means.as_ref()).map(|(table, pages)| MeanPages {
            pages: table.whole(),
            tokens: pages.shape().tokens,
            weight: parts.pages.shape().tokens,
        });
        let call = PrefillCall {
            queries: at.queries,
            rows: self.rows,
            first_position: queries.first_position,
            scale: queries.scale,
            pages: tables.pages.whole(),
            means,
            earlier: None,
            output: at.output,
            divide: at.divide,
            skip_below: self.skip_below,
        };
        let lists = CountedLists {
            visits: room.visits.whole(),
            offsets: room.offsets.whole(),
            tiles: &parts.cut.tiles[run.tiles.clone()],
            tile_rows: QUERY_TILE,
            pages: parts.cut.blocks,
            mean_pages: if means.is_some() { parts.cut.stripes } else { 0 },
        };
        parts.attention.counted(&call, &lists)
    }
}

/// What a device has for a call.
struct RuleParts {
    scorer: BlockScorer,
    attention: PrefillAttention,
    /// Of tiles.
    pages: Arc<TilePages>,
    /// Of means by which blocks are chosen.
    scores: Arc<TilePages>,
    /// Of means that stand for blocks, where any do.
    means: Option<Arc<TilePages>>,
    cut: Cut,
}

/// Pages that stay while a call is queued.
struct AllPinned<'a> {
    tiles: Pinned<'a>,
    scores: Pinned<'a>,
    means: Option<Pinned<'a>>,
}

impl RuleParts {
    /// Pages of every block of the prefix, and of the means of all stripes; `None`: there are too few, since others have pinned some.
    fn pin(&self, input: &PlanInput<'_>, promised: Promised<'_>) -> Result<Option<AllPinned<'_>>, Error> {
        let (blocks, stripes) = (self.cut.blocks, self.cut.stripes);
        let blocks = contents_of(input.kv, blocks, blocks, promised.tiles);
        let stripes = contents_of(input.summaries, stripes, input.summaries.len(), promised.means);
        for pages in std::iter::once(&self.scores).chain(&self.means) {
            pages.check_promised(&stripes)?;
        }
        let tiles = self.pages.pin_contents(&blocks)?;
        if tiles.len() < blocks.len() {
            return Ok(None);
        }
        // Who holds some does not wait for more.
        let scores = self.scores.pin_contents_beside(&stripes)?;
        let means = self.means.as_ref().map(|means| means.pin_contents_beside(&stripes)).transpose()?;
        let all =
            scores.len() == stripes.len() && means.as_ref().is_none_or(|means| means.len() == stripes.len());
        Ok(all.then_some(AllPinned { tiles, scores, means }))
    }
}

/// What goes up for a call, beside its rows.
struct Tables {
    pages: Buffer,
    scores: Buffer,
    means: Option<Buffer>,
    ends: Buffer,
    row_ends: Buffer,
    always: Option<Buffer>,
}

impl Tables {
    fn new(call: &Call<'_>, pinned: &AllPinned<'_>) -> Result<Self, Error> {
        let (device, cut) = (&call.executor.device, &call.parts.cut);
        let means = pinned.means.as_ref().map(|means| Buffer::from_slice(device, means.addresses()));
        let always = always(&call.rule.choice, cut.words);
        Ok(Self {
            pages: Buffer::from_slice(device, pinned.tiles.addresses())?,
            scores: Buffer::from_slice(device, pinned.scores.addresses())?,
            means: means.transpose()?,
            ends: Buffer::from_slice(device, &cut.ends)?,
            row_ends: Buffer::from_slice(device, &cut.row_ends)?,
            always: (!always.is_empty()).then(|| Buffer::from_slice(device, &always)).transpose()?,
        })
    }
}

/// Memory of the device that runs use one after the other.
struct Room {
    energies: Buffer,
    peaks: Option<Buffer>,
    bits: Buffer,
    /// Of blocks, then of visits.
    counts: Buffer,
    offsets: Buffer,
    visits: Buffer,
}

impl Room {
    fn new(call: &Call<'_>) -> Result<Self, Error> {
        let (device, cut, choice) = (&call.executor.device, &call.parts.cut, &call.rule.choice);
        let lists = choice.queries.shape.kv_heads * cut.most_tiles();
        let energies = lists * choice.blocks * size_of::<f32>();
        Ok(Self {
            energies: Buffer::new(device, energies)?,
            peaks: choice.peak.map(|_| Buffer::new(device, energies)).transpose()?,
            bits: Buffer::new(device, lists * cut.words * size_of::<u32>())?,
            counts: Buffer::new(device, lists * size_of::<u32>())?,
            offsets: Buffer::new(device, (lists + 1) * size_of::<u64>())?,
            visits: Buffer::new(device, cut.most_visits() * size_of::<KeyVisit>())?,
        })
    }
}
