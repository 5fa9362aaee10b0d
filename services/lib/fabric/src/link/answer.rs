//! Answers against their query: what is missing, doubled, misshapen or not finite is refused; rows are joined again.

use std::collections::{BTreeMap, btree_map::Entry};

use longshore_attention::Partials;
use longshore_proto::types::{AttendPartial, AttendQuery, Dtype, Tensor};

use super::{StripePartial, split::Span};
use crate::{Code, Error};

/// What the answer to a query must look like.
#[derive(Debug)]
pub(super) struct Expected {
    items: Vec<ItemShape>,
}

#[derive(Debug, Clone, Copy)]
struct ItemShape {
    rows: usize,
    heads: usize,
    head_dim: usize,
}

impl Expected {
    /// Checks the query's own shapes.
    pub(super) fn of(query: &AttendQuery) -> Result<Self, Error> {
        let items = query.items.iter().enumerate().map(|(index, item)| {
            let field = || format!("items[{index}].queries");
            let shape = shape_of(&item.queries).ok_or_else(|| {
                let problem =
                    format!("has shape {:?}, must be [rows, query heads, elements]", item.queries.shape);
                Error::invalid(field(), problem)
            })?;
            if item.first_position.checked_add(shape.rows as u64).is_none() {
                return Err(Error::invalid(
                    format!("items[{index}].first_position"),
                    "is too large for its rows",
                ));
            }
            Ok(shape)
        });
        Ok(Self { items: items.collect::<Result<_, _>>()? })
    }

    pub(super) fn rows(&self, item: usize) -> usize {
        self.items[item].rows
    }

    pub(super) fn row_bytes(&self, item: usize) -> usize {
        self.items[item].heads * self.items[item].head_dim * 4
    }
}

/// Extents of an f32 tensor of three axes, none empty, that fit its data.
fn shape_of(queries: &Tensor) -> Option<ItemShape> {
    let &[rows, heads, head_dim] = queries.shape.as_slice() else {
        return None;
    };
    let bytes = rows.checked_mul(heads)?.checked_mul(head_dim)?.checked_mul(4)?;
    let fits = queries.dtype == Dtype::F32 && bytes > 0 && bytes == queries.data.len() as u64;
    let extent = |extent| usize::try_from(extent).ok();
    fits.then_some(ItemShape { rows: extent(rows)?, heads: extent(heads)?, head_dim: extent(head_dim)? })
}

/// Collects the partials of a query's pieces.
#[derive(Debug)]
pub(super) struct Joiner<'a> {
    expected: &'a Expected,
    /// By item and stripe: interleaved rows, by the first of them.
    stripes: BTreeMap<(usize, u64), BTreeMap<usize, Vec<f32>>>,
}

impl<'a> Joiner<'a> {
    pub(super) fn new(expected: &'a Expected) -> Self {
        Self { expected, stripes: BTreeMap::new() }
    }

    /// Takes the answer to one piece.
    pub(super) fn add(&mut self, spans: &[Span], partials: Vec<AttendPartial>) -> Result<(), Error> {
        for partial in partials {
            let AttendPartial { item, stripe, partial } = partial;
            let Some(span) = usize::try_from(item).ok().and_then(|item| spans.get(item)) else {
                return Err(bad(format!("names item {item} of {}", spans.len())));
            };
            let shape = self.expected.items[span.item];
            let wanted = [span.rows, shape.heads, shape.head_dim + 2].map(|extent| extent as u64);
            if partial.dtype != Dtype::F32 || partial.shape != wanted {
                return Err(bad(format!(
                    "has a partial of shape {:?} where {wanted:?} was asked for",
                    partial.shape
                )));
            }
            let values =
                partial.to_f32().ok_or_else(|| bad("has a partial whose data does not fit its shape"))?;
            match self.stripes.entry((span.item, stripe)).or_default().entry(span.first_row) {
                Entry::Vacant(rows) => rows.insert(values),
                Entry::Occupied(_) => return Err(bad(format!("has stripe {stripe} of item {item} twice"))),
            };
        }
        Ok(())
    }

    /// Joins the rows of every stripe; each item needs at least one stripe, and each stripe every row.
    pub(super) fn finish(self) -> Result<Vec<StripePartial>, Error> {
        let mut joined = Vec::with_capacity(self.stripes.len());
        let mut seen = vec![false; self.expected.items.len()];
        for ((item, stripe), pieces) in self.stripes {
            let ItemShape { rows, heads, head_dim } = self.expected.items[item];
            let values = concat(pieces);
            if values.len() != rows * heads * (2 + head_dim) {
                return Err(bad(format!("lacks rows of stripe {stripe} of item {item}")));
            }
            let partial = Partials::from_interleaved(rows, heads, head_dim, &values).map_err(|fault| {
                bad(format!("has a bad partial of stripe {stripe} of item {item}: {fault}"))
            })?;
            let item_index = u32::try_from(item).map_err(|_| bad(format!("names item {item}")))?;
            joined.push(StripePartial { item: item_index, stripe, partial });
            seen[item] = true;
        }
        match seen.iter().position(|seen| !seen) {
            Some(item) => Err(bad(format!("has no partial of item {item}"))),
            None => Ok(joined),
        }
    }
}

/// Most queries are one piece, whose values need not be copied.
fn concat(mut pieces: BTreeMap<usize, Vec<f32>>) -> Vec<f32> {
    if pieces.len() == 1
        && let Some((_, values)) = pieces.pop_first()
    {
        return values;
    }
    pieces.into_values().flatten().collect()
}

fn bad(problem: impl std::fmt::Display) -> Error {
    Error::new(Code::DataLoss, format!("the answer of the shard {problem}"))
}
