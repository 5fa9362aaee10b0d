//! One query: checked, cut into (item, stripe) units, run batch by batch.

mod run;
mod sparse;

use std::{ops::Range, sync::Arc};

use longshore_attention::{HeadShape, Partials, Queries, TileShape};
use longshore_blocks::pool::ViewId;
use longshore_fabric::StripePartial;
use longshore_proto::types::{AttendItem, AttendPartial, AttendQuery, Tensor};

use crate::{
    Error,
    borrowed::{Blocks, Borrowed},
    store::Store,
};
use sparse::Visits;

/// Most items of one query.
const ITEMS_MAX: usize = 4_096;
/// Most query heads per KV head; the executor's own limit.
const GROUP_MAX: usize = 1_024;

/// A checked query and how far it has come.
pub(super) struct Plan {
    layer: usize,
    items: Vec<Item>,
    units: Vec<Unit>,
    /// Units that were run.
    done: usize,
}

/// One sequence of a query.
struct Item {
    view_id: u64,
    shape: HeadShape,
    first_position: u64,
    scale: f32,
    rows: Vec<f32>,
    blocks: Blocks,
    /// What to visit instead of every block.
    visits: Option<Visits>,
}

/// One item over one stripe: what makes one partial.
struct Unit {
    item: usize,
    stripe: u64,
    /// Runs of blocks of the item's view, ascending.
    runs: Vec<Range<usize>>,
}

/// Borrows the views of a query's items and renews their leases.
pub(super) fn borrow(store: &Arc<Store>, query: &AttendQuery) -> Result<(Vec<Blocks>, Borrowed), Error> {
    check_count(query)?;
    let views = query.items.iter().map(|item| ViewId(item.view_id));
    Borrowed::of(store, query.identity.namespace, views)
}

/// The same for a caller that waits for the answer and nothing else.
pub(super) fn views(store: &Store, query: &AttendQuery) -> Result<Vec<Blocks>, Error> {
    check_count(query)?;
    let namespace = query.identity.namespace;
    let views = store.with_pool(|pool, now| {
        let views = query.items.iter().map(|item| pool.view(namespace, ViewId(item.view_id), now));
        views.collect::<Result<_, _>>()
    });
    Ok(views?)
}

fn check_count(query: &AttendQuery) -> Result<(), Error> {
    if query.items.len() > ITEMS_MAX {
        return Err(Error::invalid("items", format!("has {}, limit {ITEMS_MAX}", query.items.len())));
    }
    Ok(())
}

/// Stripes that the items of one query may visit together: 16 sequences of four million tokens with the default stripes.
const UNITS_MAX: usize = 1 << 15;

impl Plan {
    /// Checks the query; `views` has the blocks of every item.
    pub(super) fn new(store: &Store, query: &AttendQuery, views: Vec<Blocks>) -> Result<Self, Error> {
        let identity = store.identity();
        if query.layer >= identity.layers {
            let problem = format!("is {}, the model has {} layers", query.layer, identity.layers);
            return Err(Error::invalid("layer", problem));
        }
        let bytes: usize = query.items.iter().map(|item| item.queries.data.len()).sum();
        let bytes_max = store.config().attend_query_bytes_max;
        if bytes > bytes_max {
            let problem =
                format!("have {bytes} bytes of rows, limit {bytes_max}; hint: send fewer rows a query");
            return Err(Error::invalid("items", problem));
        }
        let tile = &identity.tile_shape;
        let items = query.items.iter().zip(views).enumerate();
        let items = items
            .map(|(index, (item, blocks))| {
                Item::new(tile, item, blocks).map_err(|error| within(index, error))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let stripe_of = |block: u64| identity.geometry.stripe_of(block);
        let units = items.iter().enumerate().flat_map(|(item, it)| it.units(item, stripe_of));
        // A view may hold very many stripes and be named by many items: counted before they are all kept.
        let units: Vec<_> = units.take(UNITS_MAX + 1).collect();
        if units.len() > UNITS_MAX {
            let problem = format!("visit more than {UNITS_MAX} stripes; hint: send fewer items a query");
            return Err(Error::invalid("items", problem));
        }
        Ok(Self { layer: query.layer as usize, items, units, done: 0 })
    }

    /// Whether everything was run.
    pub(super) fn is_done(&self) -> bool {
        self.done == self.units.len()
    }

    /// Runs as many units as fill a message, at least one when any is left.
    pub(super) fn run_batch(&mut self, store: &Store) -> Result<Vec<AttendPartial>, Error> {
        let batch = self.done..self.batch_end(store.config().attend_message_bytes);
        self.done = batch.end;
        let units = &self.units[batch];
        let partials = run::attend(self.layer, &self.items, units, store)?;
        units.iter().zip(&partials).map(|(unit, partial)| self.answer(unit, partial)).collect()
    }

    /// Runs everything at once, for a caller in this process.
    pub(super) fn run(&self, store: &Store) -> Result<Vec<StripePartial>, Error> {
        let partials = run::attend(self.layer, &self.items, &self.units, store)?;
        let answers = self.units.iter().zip(partials).map(|(unit, partial)| {
            let item = &self.items[unit.item];
            match has_numbers(&partial) {
                true => Ok(StripePartial { item: unit.item as u32, stripe: unit.stripe, partial }),
                false => Err(Error::NotFinite { view_id: item.view_id }),
            }
        });
        answers.collect()
    }

    fn batch_end(&self, message_bytes: usize) -> usize {
        let mut bytes = 0;
        let more = self.units[self.done..].iter().enumerate().take_while(|(position, unit)| {
            bytes += self.items[unit.item].partial_bytes();
            *position == 0 || bytes <= message_bytes
        });
        self.done + more.count()
    }

    fn answer(&self, unit: &Unit, partial: &Partials) -> Result<AttendPartial, Error> {
        let item = &self.items[unit.item];
        if !has_numbers(partial) {
            return Err(Error::NotFinite { view_id: item.view_id });
        }
        let values = partial.to_interleaved();
        let (rows, heads, head_dim) = partial.shape();
        let shape = [rows as u64, heads as u64, 2 + head_dim as u64];
        Ok(AttendPartial {
            item: unit.item as u32,
            stripe: unit.stripe,
            partial: Tensor::from_f32(&shape, &values),
        })
    }
}

impl Item {
    fn new(tile: &TileShape, item: &AttendItem, blocks: Blocks) -> Result<Self, Error> {
        let visits = item.sparse.as_ref().map(|visits| Visits::new(tile, visits, &blocks)).transpose()?;
        let kv_heads = if visits.is_some() { 1 } else { tile.kv_heads };
        let shape = head_shape(&item.queries, &TileShape { kv_heads, ..*tile })?;
        let rows = item.queries.to_f32().ok_or_else(|| Error::invalid("queries.dtype", "is not F32"))?;
        if item.first_position.checked_add(item.queries.shape[0]).is_none() {
            return Err(Error::invalid("first_position", "is too large for its rows"));
        }
        if !(item.scale.is_finite() && item.scale > 0.0) {
            return Err(Error::invalid("scale", format!("is {}, must be finite and positive", item.scale)));
        }
        if let Some(position) = rows.iter().position(|value| !value.is_finite()) {
            return Err(Error::invalid("queries", format!("is {} at element {position}", rows[position])));
        }
        let (first_position, scale) = (item.first_position, item.scale);
        Ok(Self { view_id: item.view_id, shape, first_position, scale, rows, blocks, visits })
    }

    fn queries(&self) -> Queries<'_> {
        Queries {
            shape: self.shape,
            first_position: self.first_position,
            scale: self.scale,
            data: &self.rows,
        }
    }

    /// One unit per stripe, ascending.
    #[allow(clippy::single_range_in_vec_init, reason = "one run so far")]
    fn units(&self, item: usize, stripe_of: impl Fn(u64) -> u64) -> Vec<Unit> {
        let mut units: Vec<Unit> = Vec::new();
        let all = [0..self.blocks.len()];
        let runs = self.visits.as_ref().map_or(&all[..], |visits| &visits.runs);
        for position in runs.iter().cloned().flatten() {
            let stripe = stripe_of(self.blocks[position].index);
            match units.last_mut().filter(|unit| unit.stripe == stripe) {
                Some(unit) => match unit.runs.last_mut().filter(|run| run.end == position) {
                    Some(run) => run.end += 1,
                    None => unit.runs.push(position..position + 1),
                },
                None => {
                    units.push(Unit { item, stripe, runs: vec![position..position + 1] });
                }
            }
        }
        units
    }

    /// Bytes of one partial: maximum and sum beside the output, for every row and head.
    fn partial_bytes(&self) -> usize {
        let heads = self.rows.len() / self.shape.head_dim;
        heads * (2 + self.shape.head_dim) * size_of::<f32>()
    }
}

/// Whether everything is finite but for the maximum of rows that see no key, which is −∞.
fn has_numbers(partial: &Partials) -> bool {
    let (rows, heads, _) = partial.shape();
    (0..rows).flat_map(|row| (0..heads).map(move |head| (row, head))).all(|(row, head)| {
        let (m, l, o) = partial.row(row, head);
        (m.is_finite() || m == f32::NEG_INFINITY) && l.is_finite() && o.iter().all(|o| o.is_finite())
    })
}

/// Head shape of `[rows, query_heads, head_dim]`, which must fit the tiles and its own data.
fn head_shape(queries: &Tensor, tile: &TileShape) -> Result<HeadShape, Error> {
    let refuse = |problem| Err(Error::invalid("queries.shape", problem));
    let &[rows, heads, head_dim] = queries.shape.as_slice() else {
        return refuse(format!("has {} axes, must have 3", queries.shape.len()));
    };
    let kv_heads = tile.kv_heads as u64;
    if head_dim != tile.head_dim as u64 {
        return refuse(format!("has heads of {head_dim} elements, tiles have {}", tile.head_dim));
    }
    if heads == 0 || !heads.is_multiple_of(kv_heads) || heads / kv_heads > GROUP_MAX as u64 {
        return refuse(format!(
            "has {heads} heads, must be a multiple of {kv_heads} up to {}",
            kv_heads * GROUP_MAX as u64
        ));
    }
    let bytes = rows.checked_mul(heads * head_dim * size_of::<f32>() as u64);
    if rows == 0 || bytes != Some(queries.data.len() as u64) {
        return refuse(format!("is {:?}, which does not fit {} bytes", queries.shape, queries.data.len()));
    }
    Ok(HeadShape { kv_heads: tile.kv_heads, group: (heads / kv_heads) as usize, head_dim: tile.head_dim })
}

/// Puts the item's index before the field.
fn within(index: usize, error: Error) -> Error {
    match error {
        Error::Invalid { field, problem } => Error::invalid(format!("items[{index}].{field}"), problem),
        other => other,
    }
}
