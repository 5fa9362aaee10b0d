//! The remote half of one layer's attention: one query per shard and tenant, and what its answer must look like.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use longshore_attention::{HeadShape, Queries};
use longshore_fabric::{Code, PendingAttend, StripePartial};
use longshore_proto::types::{AttendItem, AttendQuery, Dtype, Identity, SparseVisits, Tensor};
use tokio::time::Instant;

use super::{LayerAttention, Part, StripePartials, answer::HeadVisits};
use crate::{Error, ShardLink, ShardLinks, health::Question, sequence::View};

/// A query for the sequences of one tenant on one shard.
pub(super) struct Group {
    links: Arc<ShardLinks>,
    shard: usize,
    identity: Identity,
    /// By part, ascending.
    items: Vec<Item>,
}

/// One item of a query.
#[derive(Debug, Clone)]
struct Item {
    /// Index of the part in the wave.
    part: usize,
    /// Index of the view among those of its sequence.
    view: usize,
    /// What of the view is visited by which head; `None`: everything by all.
    visits: Option<HeadVisits>,
}

impl Group {
    /// Parts that it asks for, ascending.
    fn parts(&self) -> Vec<usize> {
        let mut parts: Vec<usize> = self.items.iter().map(|item| item.part).collect();
        parts.dedup();
        parts
    }

    /// What it asks for one part.
    fn alone(&self, part: usize) -> Self {
        let items = self.items.iter().filter(|item| item.part == part).cloned().collect();
        Self { links: Arc::clone(&self.links), items, ..*self }
    }

    fn link(&self) -> &ShardLink {
        &self.links.links()[self.shard]
    }
}

/// A query under way, or why it could not be sent.
pub(super) struct Asked {
    group: Group,
    since: Instant,
    pending: Result<PendingAttend, longshore_fabric::Error>,
}

/// The views of one sequence on one shard, which gave no answer or a bad one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lost {
    /// Index of the sequence in the batch.
    pub(crate) input: usize,
    /// Index of the shard.
    pub(crate) shard: usize,
    /// It may still answer.
    pub(crate) late: bool,
}

impl LayerAttention<'_, '_> {
    /// Sends one query per shard and tenant.
    pub(super) fn ask_shards(&self, wave: &[Part], q: &[f32]) -> Vec<Asked> {
        let queries = self.query_tensors(wave, q);
        let mut groups = self.groups(wave);
        // Shards of this process compute while they are asked; the others shall compute meanwhile.
        groups.sort_by_key(|group| group.link().attend.is_here());
        groups.into_iter().map(|group| self.ask(wave, (q, &queries), group)).collect()
    }

    fn groups(&self, wave: &[Part]) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for (index, part) in wave.iter().enumerate() {
            let sequence = &self.batch[part.input].sequence;
            if self.failed[part.input].is_some() {
                continue;
            }
            for (at, view) in sequence.views().iter().enumerate() {
                let items = self.part_items(index, part, at, view);
                if items.is_empty() {
                    continue;
                }
                let same = |group: &&mut Group| {
                    group.shard == view.shard
                        && Arc::ptr_eq(&group.links, sequence.links())
                        && group.identity == *sequence.identity()
                };
                match groups.iter_mut().find(same) {
                    Some(group) => group.items.extend(items),
                    None => groups.push(Group {
                        links: Arc::clone(sequence.links()),
                        shard: view.shard,
                        identity: *sequence.identity(),
                        items,
                    }),
                }
            }
        }
        groups
    }

    /// What a part asks of a view; nothing where its heads visit no block of it.
    fn part_items(&self, index: usize, part: &Part, at: usize, view: &View) -> Vec<Item> {
        let item = |visits| Item { part: index, view: at, visits };
        match self.streaming(part) {
            Some(heads) => {
                self.head_visits(part, heads, view).into_iter().map(|visits| item(Some(visits))).collect()
            }
            None => vec![item(None)],
        }
    }

    fn view(&self, wave: &[Part], item: &Item) -> &View {
        &self.batch[wave[item.part].input].sequence.views()[item.view]
    }

    /// Queries of the parts of which every head visits everything, which many views share.
    fn query_tensors(&self, wave: &[Part], q: &[f32]) -> Vec<Option<Tensor>> {
        let all = |part: &Part| self.streaming(part).is_none().then(|| self.query_tensor(part, q));
        wave.iter().map(all).collect()
    }

    fn query_tensor(&self, part: &Part, q: &[f32]) -> Tensor {
        let heads = self.engine.backend().config().heads;
        let data = self.queries(part, q).data;
        let shape =
            [part.rows.len(), heads.query_heads(), heads.head_dim].map(|extent| extent as u64).to_vec();
        Tensor { dtype: Dtype::F32, shape, data: little_endian(data) }
    }

    fn ask(&self, wave: &[Part], queries: (&[f32], &[Option<Tensor>]), group: Group) -> Asked {
        let items = group.items.iter().map(|item| self.wire_item(wave, queries, item));
        let query = AttendQuery {
            query_id: 0,
            identity: group.identity,
            layer: self.layer as u32,
            items: items.collect(),
        };
        let ctx = self.ctx.child().with_timeout(self.engine.options().attend_timeout);
        let link = &group.link().attend;
        group.links.second_asks.asked();
        let since = Instant::now();
        let ask = || link.query_blocking(&ctx, query);
        let pending = if link.is_here() { ask() } else { self.engine.while_waiting(ask) };
        Asked { group, since, pending }
    }

    fn wire_item(&self, wave: &[Part], (q, whole): (&[f32], &[Option<Tensor>]), item: &Item) -> AttendItem {
        let part = &wave[item.part];
        let (first_row, queries, sparse) = match &item.visits {
            None => (0, whole[item.part].clone().unwrap_or_else(|| self.query_tensor(part, q)), None),
            Some(HeadVisits { kv_head, rows, runs, .. }) => {
                let queries = head_queries(&self.queries(part, q), rows, *kv_head);
                let visits = SparseVisits { kv_head: *kv_head as u32, runs: runs.clone(), skip_below: None };
                (rows.start as u64, queries, Some(visits))
            }
        };
        AttendItem {
            view_id: self.view(wave, item).id,
            first_position: part.first_position + first_row,
            queries,
            scale: self.engine.backend().config().attention_scale(),
            sparse,
        }
    }

    /// Waits for all answers. A shard refuses a query as a whole, so sequences that share a refused one are asked for
    /// again one by one: a sequence that lost its view must not take the others with it.
    pub(super) fn collect(
        &mut self,
        wave: &[Part],
        q: &[f32],
        asked: Vec<Asked>,
        partials: &mut [StripePartials],
    ) -> Result<(), Error> {
        for Asked { group, since, pending } in asked {
            let Err(error) = self.receive(wave, &group, since, pending, partials) else { continue };
            crate::error::check(self.ctx)?;
            let parts = group.parts();
            if parts.len() == 1 || error.kind() == Code::Unavailable {
                self.fail(wave, &group, &error);
                continue;
            }
            let queries = self.query_tensors(wave, q);
            for part in parts {
                let Asked { group: alone, since, pending } = self.ask(wave, (q, &queries), group.alone(part));
                if let Err(error) = self.receive(wave, &alone, since, pending, partials) {
                    self.fail(wave, &alone, &error);
                }
            }
        }
        Ok(())
    }

    /// Takes one answer; on an error nothing of it was taken.
    fn receive(
        &self,
        wave: &[Part],
        group: &Group,
        since: Instant,
        pending: Result<PendingAttend, longshore_fabric::Error>,
        partials: &mut [StripePartials],
    ) -> Result<(), Error> {
        let link = group.link();
        let rows = group.parts().into_iter().map(|part| wave[part].rows.len()).sum();
        let answer = self.hear((&group.links, group.shard), (Question::Rows(rows), since), pending)?;
        let expected: Vec<(u32, u64, bool)> = self.expected(wave, group);
        let named = expected.iter().map(|&(item, stripe, _)| (item, stripe));
        let of_heads = |partial: &StripePartial| self.has_shape(&group.items[partial.item as usize], partial);
        if !answer.iter().map(|partial| (partial.item, partial.stripe)).eq(named)
            || !answer.iter().all(of_heads)
        {
            let problem = "partials of other stripes than those of the view".to_owned();
            return Err(Error::Mismatch { shard: link.id.clone(), problem });
        }
        let shape = self.engine.backend().config().heads;
        for (StripePartial { item, stripe, partial }, (_, _, used)) in answer.into_iter().zip(expected) {
            let Item { part, visits, .. } = &group.items[item as usize];
            match visits {
                Some(visits) => {
                    visits.place((wave[*part].rows.len(), shape), stripe, &partial, &mut partials[*part])?;
                }
                None if used => partials[*part].push((stripe, partial)),
                None => {}
            }
        }
        Ok(())
    }

    /// What an answer names, in order: item, stripe, and whether this shard is the one that counts.
    fn expected(&self, wave: &[Part], group: &Group) -> Vec<(u32, u64, bool)> {
        let mut expected = Vec::new();
        for (index, item) in group.items.iter().enumerate() {
            let index = index as u32;
            match &item.visits {
                Some(visits) => expected.extend(visits.stripes.iter().map(|&stripe| (index, stripe, true))),
                None => {
                    let parts = &self.view(wave, item).parts;
                    expected.extend(parts.iter().map(|part| (index, part.stripe, part.used)));
                }
            }
        }
        expected
    }

    /// Whether a partial is one of the rows of one KV head that it was asked for.
    fn has_shape(&self, item: &Item, found: &StripePartial) -> bool {
        let HeadShape { group, head_dim, .. } = self.engine.backend().config().heads;
        let fits = |visits: &HeadVisits| found.partial.shape() == (visits.rows.len(), group, head_dim);
        item.visits.as_ref().is_none_or(fits)
    }

    /// The shard that `error` names failed a sequence.
    pub(super) fn lose(&mut self, input: usize, error: &Error) {
        let Some(id) = error.failed_shard() else { return };
        let links = self.batch[input].sequence.links().links();
        let Some(shard) = links.iter().position(|link| link.id == *id) else { return };
        let lost = Lost { input, shard, late: matches!(error, Error::Late { .. }) };
        if !self.lost.contains(&lost) {
            self.lost.push(lost);
        }
    }

    fn fail(&mut self, wave: &[Part], group: &Group, error: &Error) {
        for part in group.parts() {
            let late = matches!(error, Error::Late { .. });
            let lost = Lost { input: wave[part].input, shard: group.shard, late };
            if !self.lost.contains(&lost) {
                self.lost.push(lost);
            }
            let failure = &mut self.failed[lost.input];
            failure.get_or_insert_with(|| error.clone());
        }
    }
}

/// Queries of one KV head in some rows, f32 `[rows, group, head_dim]`.
pub(super) fn head_queries(queries: &Queries<'_>, rows: &Range<usize>, kv_head: usize) -> Tensor {
    let HeadShape { group, head_dim, .. } = queries.shape;
    let (width, own) = (queries.shape.query_heads() * head_dim, group * head_dim);
    let values = rows.clone().flat_map(|row| &queries.data[row * width + kv_head * own..][..own]);
    let values: Vec<f32> = values.copied().collect();
    let shape = [rows.len(), group, head_dim].map(|extent| extent as u64).to_vec();
    Tensor { dtype: Dtype::F32, shape, data: little_endian(&values) }
}

/// Elements as they travel.
pub(super) fn little_endian(data: &[f32]) -> Bytes {
    if cfg!(target_endian = "little") {
        return Bytes::copy_from_slice(bytemuck::cast_slice(data));
    }
    data.iter().flat_map(|element| element.to_le_bytes()).collect()
}
