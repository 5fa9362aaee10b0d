//! Pages for decode steps: scores, and the tables of those that are kept.

use std::sync::Arc;

use longshore_attention::{HeadShape, KvDtype, TileShape};

use super::material::{Pages, Random, differing, pages_of, random_tiles};
use crate::{
    BlockSelector, Buffer, Device, Error, ListBuilder, ListCall, MeanBuilder, MeanOutputs, PageElement,
    PageScoreCall, PageScoreItem, PageScorer, PageShape, SelectCall, SelectGuards, Selector,
};

/// How pages are scored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rule {
    pub(super) heads: HeadShape,
    pub(super) element: PageElement,
    /// By bounds, or by means.
    pub(super) bounds: bool,
    /// Adds the scores of a group up.
    pub(super) sum: bool,
}

const SINK: u32 = 1;
const LOCAL: u32 = 2;
const KEPT: usize = 7;

/// A sequence's pages and the summaries that the device made of them, `[kv_heads][capacity][head_dim]`.
struct Sequence {
    pages: Pages,
    first: Buffer,
    second: Buffer,
    count: usize,
}

impl Rule {
    fn sequence(&self, device: &Arc<dyn Device>, count: usize) -> Result<Sequence, Error> {
        let HeadShape { kv_heads, head_dim, .. } = self.heads;
        let shape = TileShape { block_tokens: 16, kv_heads, head_dim, dtype: KvDtype::F16 };
        let pages =
            Pages::new(device, &pages_of(&random_tiles(&mut Random(71 + count as u64), shape, count, 2.0)))?;
        let bytes = kv_heads * count * head_dim * self.element.bytes();
        let (first, second) = (Buffer::new(device, bytes)?, Buffer::new(device, bytes)?);
        let outputs = match self.bounds {
            true => MeanOutputs {
                key_least: Some(first.whole()),
                key_most: Some(second.whole()),
                ..MeanOutputs::default()
            },
            false => MeanOutputs { key_rounded: Some(first.whole()), ..MeanOutputs::default() },
        };
        let builder = MeanBuilder::new(device, PageShape::of(shape)?, self.element)?;
        builder.launch(pages.table.whole(), count, 0, count, &outputs)?;
        Ok(Sequence { pages, first, second, count })
    }

    fn widen(&self, summaries: &Buffer) -> Result<Vec<f32>, Error> {
        Ok(match self.element {
            PageElement::F32 => summaries.to_vec::<f32>()?,
            PageElement::Bf16 => summaries.to_vec::<half::bf16>()?.iter().map(|x| x.to_f32()).collect(),
            _ => summaries.to_vec::<half::f16>()?.iter().map(|x| x.to_f32()).collect(),
        })
    }

    /// Score of each page of a KV head.
    fn wanted(&self, sequence: &Sequence, queries: &[f32], kv_head: usize) -> Result<Vec<f64>, Error> {
        let HeadShape { group, head_dim, .. } = self.heads;
        let first = self.widen(&sequence.first)?;
        let second = if self.bounds { self.widen(&sequence.second)? } else { first.clone() };
        let scores = (0..sequence.count).map(|page| {
            if page < SINK as usize || page + LOCAL as usize >= sequence.count {
                return f64::INFINITY;
            }
            let at = (kv_head * sequence.count + page) * head_dim;
            let heads = (0..group).map(|head| {
                let query = &queries[(kv_head * group + head) * head_dim..][..head_dim];
                let bounds = first[at..].iter().zip(&second[at..]);
                let products = query.iter().zip(bounds);
                products
                    .map(|(&q, (&a, &b))| (f64::from(q) * f64::from(a)).max(f64::from(q) * f64::from(b)))
                    .sum::<f64>()
            });
            if self.sum { heads.sum::<f64>() } else { heads.fold(f64::NEG_INFINITY, f64::max) }
        });
        Ok(scores.collect())
    }
}

/// Pages in the tables that should not be there or in that place, and scores that are wrong.
pub(super) fn choose(device: &Arc<dyn Device>, rule: &Rule) -> Result<f64, Error> {
    let HeadShape { kv_heads, group, head_dim } = rule.heads;
    let sequences = [rule.sequence(device, 40)?, rule.sequence(device, 5)?, rule.sequence(device, 130)?];
    let queries = Random(81).numbers(sequences.len() * kv_heads * group * head_dim, 1.0);
    let device_queries = Buffer::from_slice(device, &queries)?;
    let items: Vec<PageScoreItem> = (0..)
        .zip(&sequences)
        .map(|(query, sequence)| PageScoreItem {
            first: sequence.first.address(),
            second: if rule.bounds { sequence.second.address() } else { 0 },
            pages: sequence.count as u32,
            query,
            capacity: sequence.count as u32,
            unused: 0,
        })
        .collect();
    let (stride, words, lists) = (130, 5, kv_heads * sequences.len());
    let items = Buffer::from_slice(device, &items)?;
    let scores = Buffer::from_slice(device, &vec![f32::NAN; lists * stride])?;
    PageScorer::new(device, rule.heads, rule.element)?.launch(&PageScoreCall {
        queries: device_queries.whole(),
        items: items.whole(),
        scores: scores.whole(),
        count: sequences.len(),
        most_pages: stride,
        stride,
        sum: rule.sum,
        sink: SINK,
        local: LOCAL,
    })?;
    let found = tables(device, &sequences, &scores, (stride, words), kv_heads)?;
    let scores = scores.to_vec::<f32>()?;
    let mut wrong = 0.0;
    for list in 0..lists {
        let (kv_head, number) = (list / sequences.len(), list % sequences.len());
        let sequence = &sequences[number];
        let own = &queries[number * kv_heads * group * head_dim..];
        let wanted = rule.wanted(sequence, own, kv_head)?;
        let own = &scores[list * stride..][..sequence.count];
        let is_near = |(&found, &wanted): (&f32, &f64)| {
            f64::from(found) == wanted || (f64::from(found) - wanted).abs() <= 1e-4 * (1.0 + wanted.abs())
        };
        wrong += own.iter().zip(&wanted).filter(|&pair| !is_near(pair)).count() as f64;
        // By the device's own scores: which of two that are nearly equal is larger is for rounding to say.
        let mut order: Vec<usize> = (0..sequence.count).collect();
        order.sort_by(|&a, &b| own[b].total_cmp(&own[a]).then(b.cmp(&a)));
        order.truncate(KEPT);
        order.sort_unstable();
        let mut table: Vec<u64> = order.iter().map(|&page| sequence.pages.addresses[page]).collect();
        table.resize(KEPT, 7);
        wrong += differing(&found[list * KEPT..][..KEPT], &table);
    }
    Ok(wrong)
}

/// Addresses of the pages that are kept, `[kv_heads][sequences][KEPT]`, 7 where there are fewer.
fn tables(
    device: &Arc<dyn Device>,
    sequences: &[Sequence],
    scores: &Buffer,
    (stride, words): (usize, usize),
    kv_heads: usize,
) -> Result<Vec<u64>, Error> {
    let lists = kv_heads * sequences.len();
    let ends: Vec<u32> = sequences.iter().flat_map(|sequence| [sequence.count as u32; 2]).collect();
    let ends = Buffer::from_slice(device, &ends)?;
    let bits = Buffer::from_slice(device, &vec![u32::MAX; lists * words])?;
    let counts = Buffer::from_slice(device, &vec![0_u32; lists])?;
    BlockSelector::new(device).launch(&SelectCall {
        energies: scores.whole(),
        peaks: None,
        always: None,
        ends: ends.whole(),
        bits: bits.whole(),
        counts: counts.whole(),
        kv_heads,
        tiles: sequences.len(),
        stride,
        words,
        selector: Selector::TopK(KEPT as u32),
        most: u32::MAX,
        guards: SelectGuards { sink: 0, local: 0, peak: None },
    })?;
    let addresses: Vec<u64> =
        sequences.iter().flat_map(|sequence| sequence.pages.addresses.clone()).collect();
    let firsts: Vec<u32> = sequences
        .iter()
        .scan(0, |next, sequence| {
            let first = *next;
            *next += sequence.count as u32;
            Some(first)
        })
        .collect();
    let (addresses, firsts) = (Buffer::from_slice(device, &addresses)?, Buffer::from_slice(device, &firsts)?);
    let output = Buffer::from_slice(device, &vec![7_u64; lists * KEPT])?;
    let call = ListCall { counts: counts.whole(), bits: bits.whole(), lists, words };
    let table = (addresses.whole(), firsts.whole(), sequences.len());
    ListBuilder::new(device).pages(&call, table, output.whole(), KEPT)?;
    output.to_vec::<u64>()
}
