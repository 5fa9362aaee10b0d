//! The remote half of one layer's attention: one query per shard and tenant, and what its answer must look like.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use longshore_fabric::{Code, PendingAttend, StripePartial};
use longshore_proto::types::{AttendItem, AttendQuery, Dtype, Identity, Tensor};

use super::{LayerAttention, Part, StripePartials};
use crate::{Error, ShardLink, ShardLinks, sequence::View};

/// A query for the sequences of one tenant on one shard.
pub(super) struct Group {
    links: Arc<ShardLinks>,
    shard: usize,
    identity: Identity,
    /// Parts as indices into the wave, each with an index into the views of its sequence.
    parts: Vec<(usize, usize)>,
}

impl Group {
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
        let queries: Vec<Tensor> = wave.iter().map(|part| self.query_tensor(part, q)).collect();
        let mut groups = self.groups(wave);
        // Shards of this process compute while they are asked; the others shall compute meanwhile.
        groups.sort_by_key(|group| group.link().attend.is_here());
        groups.into_iter().map(|group| self.ask(wave, &queries, group)).collect()
    }

    fn groups(&self, wave: &[Part]) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for (index, part) in wave.iter().enumerate() {
            let sequence = &self.batch[part.input].sequence;
            if self.failed[part.input].is_some() {
                continue;
            }
            for (at, view) in sequence.views().iter().enumerate() {
                let same = |group: &&mut Group| {
                    group.shard == view.shard
                        && Arc::ptr_eq(&group.links, sequence.links())
                        && group.identity == *sequence.identity()
                };
                match groups.iter_mut().find(same) {
                    Some(group) => group.parts.push((index, at)),
                    None => groups.push(Group {
                        links: Arc::clone(sequence.links()),
                        shard: view.shard,
                        identity: *sequence.identity(),
                        parts: vec![(index, at)],
                    }),
                }
            }
        }
        groups
    }

    fn view(&self, wave: &[Part], (part, view): (usize, usize)) -> &View {
        &self.batch[wave[part].input].sequence.views()[view]
    }

    fn query_tensor(&self, part: &Part, q: &[f32]) -> Tensor {
        let heads = self.engine.backend().config().heads;
        let data = self.queries(part, q).data;
        let shape =
            [part.rows.len(), heads.query_heads(), heads.head_dim].map(|extent| extent as u64).to_vec();
        Tensor { dtype: Dtype::F32, shape, data: little_endian(data) }
    }

    fn ask(&self, wave: &[Part], queries: &[Tensor], group: Group) -> Asked {
        let items = group.parts.iter().map(|&(index, view)| AttendItem {
            view_id: self.view(wave, (index, view)).id,
            first_position: wave[index].first_position,
            queries: queries[index].clone(),
            scale: self.engine.backend().config().attention_scale(),
            sparse: None,
        });
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
            if group.parts.len() == 1 || error.kind() == Code::Unavailable {
                self.fail(wave, &group, &error);
                continue;
            }
            let queries: Vec<Tensor> = wave.iter().map(|part| self.query_tensor(part, q)).collect();
            for &part in &group.parts {
                let alone = Group { links: Arc::clone(&group.links), parts: vec![part], ..group };
                let Asked { group: alone, since, pending } = self.ask(wave, &queries, alone);
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
        let answer = self.answer(wave, group, since, pending);
        link.note(&answer);
        let answer = answer?;
        let views = group.parts.iter().enumerate();
        let expected = views.flat_map(|(item, &part)| {
            self.view(wave, part).parts.iter().map(move |part| (item as u32, part.stripe, part.used))
        });
        let named = expected.clone().map(|(item, stripe, _)| (item, stripe));
        if !answer.iter().map(|partial| (partial.item, partial.stripe)).eq(named) {
            let problem = "partials of other stripes than those of the view".to_owned();
            return Err(Error::Mismatch { shard: link.id.clone(), problem });
        }
        for (partial, (item, stripe, used)) in answer.into_iter().zip(expected) {
            if used {
                partials[group.parts[item as usize].0].push((stripe, partial.partial));
            }
        }
        Ok(())
    }

    fn answer(
        &self,
        wave: &[Part],
        group: &Group,
        since: Instant,
        pending: Result<PendingAttend, longshore_fabric::Error>,
    ) -> Result<Vec<StripePartial>, Error> {
        let link = group.link();
        let of_shard = |source| Error::of_shard(self.ctx, &link.id, source);
        let pending = pending.map_err(of_shard)?;
        if pending.is_ready() {
            return pending.wait_blocking().map_err(of_shard);
        }
        let rows = group.parts.iter().map(|&(part, _)| wave[part].rows.len()).sum();
        let waited = self.engine.while_waiting(|| match self.late_after(group, rows, since) {
            None => Ok(pending.wait_blocking()),
            Some(patience) => pending.wait_blocking_for(patience).or_else(|late| {
                if group.links.second_asks.take() { Err(()) } else { Ok(late.wait_blocking()) }
            }),
        });
        let Ok(answer) = waited else {
            let waited_ms = since.elapsed().as_millis() as u64;
            return Err(Error::Late { shard: link.id.clone(), waited_ms });
        };
        if answer.is_ok() {
            link.health.took(rows, since.elapsed());
        }
        answer.map_err(of_shard)
    }

    /// How much longer to wait before another copy is asked; `None` where there is none or too little is known.
    fn late_after(&self, group: &Group, rows: usize, since: Instant) -> Option<Duration> {
        if self.patient || group.links.rule().copies() == 1 {
            return None;
        }
        Some(group.link().health.late_after(rows)?.saturating_sub(since.elapsed()))
    }

    fn fail(&mut self, wave: &[Part], group: &Group, error: &Error) {
        for &(part, _) in &group.parts {
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

/// Elements as they travel.
pub(super) fn little_endian(data: &[f32]) -> Bytes {
    if cfg!(target_endian = "little") {
        return Bytes::copy_from_slice(bytemuck::cast_slice(data));
    }
    data.iter().flat_map(|element| element.to_le_bytes()).collect()
}
