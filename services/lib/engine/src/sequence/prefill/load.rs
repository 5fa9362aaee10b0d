//! Summaries of blocks that lie on shards, brought here before a step plans over them.

use std::{collections::BTreeMap, time::Duration};

use futures::{FutureExt, StreamExt, TryStreamExt, future::try_join_all, stream};
use longshore_attention::{Mean, PolicyReads};
use longshore_fabric::{BoxStream, CallContext};
use longshore_proto::types::{Dtype, GetSummaries, SummariesMessage, Tensor};

use crate::{
    Error, Sequence, ShardLink,
    patience::{answer, within_time},
    sequence::{View, ViewPart},
};

/// How often the stripes of a sequence may move to other copies while their summaries come.
const MOVES_MAX: usize = 4;
/// Views whose summaries of one layer are taken at a time.
const SOURCES_MAX: usize = 16;

impl Sequence {
    /// Brings what the policy reads of the blocks on shards, all layers, all shards at once; returns how many bytes came. Does
    /// nothing when the policy reads no summaries or they are here: those of blocks that were computed here stay when the blocks go.
    /// When a shard fails, lies or sends nothing for long, its stripes move to other copies, and layers that are not complete come
    /// from there.
    pub async fn load_summaries(&mut self, ctx: &CallContext) -> Result<u64, Error> {
        let mut bytes = 0;
        let mut moves_left = if self.links.rule().copies() > 1 { MOVES_MAX } else { 0 };
        loop {
            let patience = (moves_left > 0).then(|| within_time(ctx, self.patience));
            let Err(error) = self.load_once(ctx, patience, &mut bytes).await else { return Ok(bytes) };
            let failed = |link: &ShardLink| Some(&link.id) == error.failed_shard();
            let shard = self.links.links().iter().position(failed);
            let Some(shard) = shard.filter(|_| moves_left > 0) else { return Err(error) };
            moves_left -= 1;
            self.note(shard, &Err::<(), Error>(error.clone()));
            tracing::warn!(%error, "summaries are read from other copies");
            // One of the other copies may be late as well.
            let moved = tokio::time::timeout(self.patience * 2, self.leave(ctx, &[shard])).await;
            match moved.unwrap_or(Err(Error::Broken("its copies did not open in time"))) {
                Ok(()) => {}
                // Nobody said that it cannot answer: it is asked again, and waited for.
                Err(_) if matches!(error, Error::Late { .. }) => moves_left = 0,
                // What is missing on the last copy is computed again; that says more than why the first one failed.
                Err(missing @ Error::Missing { .. }) => return Err(missing),
                Err(_) => return Err(error),
            }
        }
    }

    /// Brings the layers that are not complete, in order, each from all views at once; what came of them before a failure stays.
    async fn load_once(
        &mut self,
        ctx: &CallContext,
        patience: Option<Duration>,
        bytes: &mut u64,
    ) -> Result<(), Error> {
        let Some(prefill) = self.prefill.as_ref().filter(|prefill| prefill.reads.means) else {
            return Ok(());
        };
        let incomplete = |layer: &usize| prefill.summaries[*layer].blocks().end < self.remote_blocks;
        let Some(first) = (0..self.layers).find(incomplete) else { return Ok(()) };
        let mut sources = self.summary_sources(ctx, (prefill.reads, patience), first).await?;
        for layer in first..self.layers {
            // By block: views hold stripes in any order, summaries are taken in order.
            let mut means = BTreeMap::new();
            let takes: Vec<_> = sources.iter_mut().map(|source| source.layer(ctx, layer).boxed()).collect();
            let came: Vec<u64> = stream::iter(takes).buffered(SOURCES_MAX).try_collect().await?;
            *bytes += came.iter().sum::<u64>();
            for source in &mut sources {
                means.extend(source.held.iter().zip(source.means.drain(..)).filter_map(|(held, mean)| {
                    let &(block, used) = held;
                    used.then_some((block, mean))
                }));
            }
            let summaries = &mut self.prefill.as_mut().expect("it was there above").summaries[layer];
            for (block, mean) in means {
                if block >= summaries.blocks().end {
                    summaries.insert(block, &mean)?;
                }
            }
        }
        Ok(())
    }

    /// Blocks of a view, ascending, each with whether this view answers for it.
    fn held_by(&self, view: &View) -> Vec<(u64, bool)> {
        let stripe_blocks = u64::from(self.geometry.stripe_blocks());
        let blocks = |part: &ViewPart| {
            let used = part.used;
            let first = part.stripe * stripe_blocks;
            (first..(first + stripe_blocks).min(self.remote_blocks)).map(move |block| (block, used))
        };
        view.parts.iter().flat_map(blocks).collect()
    }

    /// A stream of summaries for every view, from a layer on.
    async fn summary_sources(
        &self,
        ctx: &CallContext,
        (reads, patience): (PolicyReads, Option<Duration>),
        first_layer: usize,
    ) -> Result<Vec<Source>, Error> {
        let open = self.views.iter().map(|view| {
            let link = &self.links.links()[view.shard];
            async move {
                let get = GetSummaries {
                    identity: self.identity,
                    view_id: view.id,
                    first_layer: first_layer as u32,
                    layers: None,
                    values: reads.values,
                    spreads: reads.spreads,
                    cosines: reads.cosines,
                };
                let messages = answer(ctx, link, patience, link.shard.get_summaries(ctx, get)).await?;
                let shape = (self.shape.kv_heads, self.shape.head_dim);
                let held = self.held_by(view);
                Ok(Source { link: link.clone(), patience, messages, held, shape, reads, means: Vec::new() })
            }
        });
        try_join_all(open).await
    }
}

/// Summaries of one view.
struct Source {
    link: ShardLink,
    /// How long it may send nothing.
    patience: Option<Duration>,
    messages: BoxStream<SummariesMessage>,
    /// See [`Sequence::held_by`].
    held: Vec<(u64, bool)>,
    /// KV heads and head size.
    shape: (usize, usize),
    reads: PolicyReads,
    /// Of the layer at hand, ascending.
    means: Vec<Mean>,
}

impl Source {
    /// Takes all of one layer; returns its bytes.
    async fn layer(&mut self, ctx: &CallContext, layer: usize) -> Result<u64, Error> {
        let mut bytes = 0;
        while self.means.len() < self.held.len() {
            let messages = &mut self.messages;
            let next = async move { messages.next().await.transpose() };
            let Some(message) = answer(ctx, &self.link, self.patience, next).await? else {
                return Err(self.mismatch(format!("summaries that end in layer {layer}")));
            };
            bytes += self.take(layer, &message)?;
        }
        Ok(bytes)
    }

    fn take(&mut self, layer: usize, message: &SummariesMessage) -> Result<u64, Error> {
        let (heads, dim) = self.shape;
        let (have, blocks) = (self.means.len() as u64, message.keys.shape.first().copied().unwrap_or(0));
        if message.layer as usize != layer || message.first != have {
            let (found, first) = (message.layer, message.first);
            let problem =
                format!("summaries of layer {found} from {first} on instead of layer {layer} from {have} on");
            return Err(self.mismatch(problem));
        }
        let all = self.held.len() as u64;
        if blocks == 0 || blocks > all - have {
            return Err(self.mismatch(format!("summaries of {blocks} blocks, the view has {all}")));
        }
        let whole = [blocks, heads as u64, dim as u64];
        let keys = self.values(Some(&message.keys), true, &whole)?;
        let values = self.values(message.values.as_ref(), self.reads.values, &whole)?;
        let spreads = self.values(message.spreads.as_ref(), self.reads.spreads, &whole)?;
        let cosines = self.values(message.cosines.as_ref(), self.reads.cosines, &whole[..2])?;
        let width = heads * dim;
        for block in 0..blocks as usize {
            let of = |part: &'_ Option<Vec<f32>>, width: usize| {
                part.as_ref().map(|part| part[block * width..][..width].to_vec())
            };
            let key = of(&keys, width).expect("keys always come");
            let (value, spread, cosines) = (of(&values, width), of(&spreads, width), of(&cosines, heads));
            let mean =
                Mean::from_parts(self.shape, &key, value.as_deref(), spread.as_deref(), cosines.as_deref());
            let mean =
                mean.map_err(|error| self.mismatch(format!("a summary that makes no sense: {error}")))?;
            self.means.push(mean);
        }
        let parts = [keys, values, spreads, cosines];
        Ok(parts.iter().flatten().map(|part| size_of_val(part.as_slice()) as u64).sum())
    }

    /// The elements of a part, `None` when it was not asked for.
    fn values(&self, part: Option<&Tensor>, asked: bool, shape: &[u64]) -> Result<Option<Vec<f32>>, Error> {
        match part {
            None if !asked => Ok(None),
            Some(tensor) if asked && tensor.dtype == Dtype::F32 && tensor.shape == shape => {
                let elements = shape.iter().product::<u64>();
                match tensor.to_f32().filter(|values| values.len() as u64 == elements) {
                    Some(values) => Ok(Some(values)),
                    None => Err(self.mismatch("summaries whose data do not fit their shape".to_owned())),
                }
            }
            Some(tensor) if asked => {
                let problem = format!("summaries of shape {:?} where {shape:?} was asked for", tensor.shape);
                Err(self.mismatch(problem))
            }
            _ => Err(self.mismatch("other summaries than were asked for".to_owned())),
        }
    }

    fn mismatch(&self, problem: String) -> Error {
        Error::Mismatch { shard: self.link.id.clone(), problem }
    }
}
