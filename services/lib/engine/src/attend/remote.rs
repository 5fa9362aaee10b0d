//! The remote half of one layer's attention: one query per shard and tenant, and what its answer must look like.

use std::sync::Arc;

use bytes::Bytes;
use longshore_fabric::{Code, PendingAttend};
use longshore_proto::types::{AttendItem, AttendQuery, Dtype, Identity, Tensor};

use super::{LayerAttention, Part, StripePartials};
use crate::{Error, ShardLink, ShardLinks};

/// A query for the sequences of one tenant on one shard.
pub(super) struct Group {
    links: Arc<ShardLinks>,
    shard: usize,
    identity: Identity,
    /// Indices into the wave.
    parts: Vec<usize>,
}

impl Group {
    fn link(&self) -> &ShardLink {
        &self.links.links()[self.shard]
    }
}

/// A query under way, or why it could not be sent.
pub(super) type Asked = (Group, Result<PendingAttend, longshore_fabric::Error>);

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
            for shard in 0..sequence.links().links().len() {
                if sequence.view(shard).is_none() {
                    continue;
                }
                let same = |group: &&mut Group| {
                    group.shard == shard
                        && Arc::ptr_eq(&group.links, sequence.links())
                        && group.identity == *sequence.identity()
                };
                match groups.iter_mut().find(same) {
                    Some(group) => group.parts.push(index),
                    None => groups.push(Group {
                        links: Arc::clone(sequence.links()),
                        shard,
                        identity: *sequence.identity(),
                        parts: vec![index],
                    }),
                }
            }
        }
        groups
    }

    fn query_tensor(&self, part: &Part, q: &[f32]) -> Tensor {
        let heads = self.engine.backend().config().heads;
        let data = self.queries(part, q).data;
        let shape =
            [part.rows.len(), heads.query_heads(), heads.head_dim].map(|extent| extent as u64).to_vec();
        Tensor { dtype: Dtype::F32, shape, data: little_endian(data) }
    }

    fn ask(&self, wave: &[Part], queries: &[Tensor], group: Group) -> Asked {
        let items = group.parts.iter().map(|&index| {
            let part = &wave[index];
            let (view_id, _) =
                self.batch[part.input].sequence.view(group.shard).expect("groups hold parts with views");
            AttendItem {
                view_id,
                first_position: part.first_position,
                queries: queries[index].clone(),
                scale: self.engine.backend().config().attention_scale(),
                sparse: None,
            }
        });
        let query = AttendQuery {
            query_id: 0,
            identity: group.identity,
            layer: self.layer as u32,
            items: items.collect(),
        };
        let ctx = self.ctx.child().with_timeout(self.engine.options().attend_timeout);
        let link = &group.link().attend;
        let ask = || link.query_blocking(&ctx, query);
        let pending = if link.is_here() { ask() } else { self.engine.while_waiting(ask) };
        (group, pending)
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
        for (group, pending) in asked {
            let Err(error) = self.receive(wave, &group, pending, partials) else { continue };
            crate::error::check(self.ctx)?;
            if group.parts.len() == 1 || error.kind() == Code::Unavailable {
                self.fail(wave, &group, &error);
                continue;
            }
            let queries: Vec<Tensor> = wave.iter().map(|part| self.query_tensor(part, q)).collect();
            for &part in &group.parts {
                let alone = Group { links: Arc::clone(&group.links), parts: vec![part], ..group };
                let (alone, pending) = self.ask(wave, &queries, alone);
                if let Err(error) = self.receive(wave, &alone, pending, partials) {
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
        pending: Result<PendingAttend, longshore_fabric::Error>,
        partials: &mut [StripePartials],
    ) -> Result<(), Error> {
        let link = group.link();
        let answer = pending.and_then(|pending| match pending.is_ready() {
            true => pending.wait_blocking(),
            false => self.engine.while_waiting(|| pending.wait_blocking()),
        });
        let answer = answer.map_err(|source| Error::of_shard(self.ctx, &link.id, source))?;
        let expected = group.parts.iter().enumerate().flat_map(|(item, &part)| {
            let (_, stripes) = self.batch[wave[part].input]
                .sequence
                .view(group.shard)
                .expect("groups hold parts with views");
            stripes.iter().map(move |&stripe| (item as u32, stripe))
        });
        if !answer.iter().map(|partial| (partial.item, partial.stripe)).eq(expected) {
            let problem = "partials of other stripes than those of the view".to_owned();
            return Err(Error::Mismatch { shard: link.id.clone(), problem });
        }
        for partial in answer {
            partials[group.parts[partial.item as usize]].push((partial.stripe, partial.partial));
        }
        Ok(())
    }

    fn fail(&mut self, wave: &[Part], group: &Group, error: &Error) {
        for &part in &group.parts {
            let failure = &mut self.failed[wave[part].input];
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
