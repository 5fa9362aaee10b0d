//! Refuses attention calls that cannot be run, before anything is computed.

use super::{AttendItem, PagedKv};
use crate::{Column, Error, ExactBlock, Partials, Queries, SummaryKey, TileShape, WorkList};

/// Checks every index, length and shape of an item.
pub(super) fn check(item: &AttendItem<'_>) -> Result<(), Error> {
    let tile = item.kv.shape();
    tile.validate()?;
    if item.kv.only_head().is_some() {
        return invalid("kv", "shows one head of its tiles, which only sparse calls read".to_owned());
    }
    check_queries(&item.queries, &tile)?;
    check_work(item)?;
    check_summaries(&item.work.summaries, &tile)?;
    check_partials("initial", item.initial, &item.queries)
}

/// Checks the queries of a call on tiles of some shape.
pub(super) fn check_queries(queries: &Queries<'_>, tile: &TileShape) -> Result<(), Error> {
    let shape = queries.shape;
    if shape.kv_heads != tile.kv_heads {
        return invalid(
            "kv_heads",
            format!("is {} in the queries, {} in the tiles", shape.kv_heads, tile.kv_heads),
        );
    }
    if shape.head_dim != tile.head_dim {
        return invalid(
            "head_dim",
            format!("is {} in the queries, {} in the tiles", shape.head_dim, tile.head_dim),
        );
    }
    if !(1..=1024).contains(&shape.group) {
        return invalid("group", format!("is {}, must be from 1 to 1024", shape.group));
    }
    if !queries.scale.is_finite() {
        return invalid("scale", format!("is {}, must be finite", queries.scale));
    }
    let row = shape.query_heads() * shape.head_dim;
    if !queries.data.len().is_multiple_of(row) {
        return invalid(
            "queries",
            format!("has {} elements, must be a multiple of {row}", queries.data.len()),
        );
    }
    if queries.first_position.checked_add(queries.rows() as u64).is_none() {
        return invalid("first_position", format!("is {}, too large", queries.first_position));
    }
    Ok(())
}

fn check_work(item: &AttendItem<'_>) -> Result<(), Error> {
    let WorkList { exact, columns, column_bias, .. } = item.work;
    exact.iter().try_for_each(|block| check_block("exact", block, item.kv))?;
    columns.iter().try_for_each(|column| check_column(column, item.kv))?;
    if !column_bias.is_empty() && column_bias.len() != columns.len() {
        let problem = format!("has {} elements, there are {} columns", column_bias.len(), columns.len());
        return invalid("column_bias", problem);
    }
    match column_bias.iter().find(|bias| !bias.is_finite()) {
        Some(bias) => invalid("column_bias", format!("is {bias} for some column, must be finite")),
        None => Ok(()),
    }
}

/// Checks a block that is visited key by key.
pub(super) fn check_block(field: &'static str, block: &ExactBlock, kv: &dyn PagedKv) -> Result<(), Error> {
    let &ExactBlock { tile, first_position, len } = block;
    check_tile(field, tile, kv)?;
    let tokens = kv.shape().block_tokens;
    if len == 0 || len as usize > tokens {
        return invalid(field, format!("visits {len} keys of a tile, must be from 1 to {tokens}"));
    }
    if first_position.checked_add(u64::from(len)).is_none() {
        return invalid(field, format!("starts at position {first_position}, too large"));
    }
    Ok(())
}

/// Checks a gathered key.
pub(super) fn check_column(column: &Column, kv: &dyn PagedKv) -> Result<(), Error> {
    check_tile("columns", column.tile, kv)?;
    let tokens = kv.shape().block_tokens;
    if column.offset as usize >= tokens {
        let problem = format!("visits key {} of a tile, there are {tokens}", column.offset);
        return invalid("columns", problem);
    }
    Ok(())
}

/// Checks that there is a tile with this index, and that it has the shape of all.
pub(super) fn check_tile(field: &'static str, tile: u32, kv: &dyn PagedKv) -> Result<(), Error> {
    let (tiles, shape) = (kv.len(), kv.shape());
    if tile as usize >= tiles {
        return invalid(field, format!("visits tile {tile}, there are {tiles}"));
    }
    let found = kv.tile(tile as usize).shape();
    let shown = match kv.only_head() {
        Some(head) if head < found.kv_heads => TileShape { kv_heads: 1, ..found },
        Some(head) => {
            return invalid(field, format!("visits KV head {head} of a tile, there are {}", found.kv_heads));
        }
        None => found,
    };
    if shown != shape {
        return invalid(field, format!("visits tile {tile} of shape {found:?}, must be {shape:?}"));
    }
    Ok(())
}

fn check_summaries(summaries: &[SummaryKey], shape: &TileShape) -> Result<(), Error> {
    for (index, summary) in summaries.iter().enumerate() {
        if summary.kv_head as usize >= shape.kv_heads {
            let problem = format!("has KV head {} at {index}, there are {}", summary.kv_head, shape.kv_heads);
            return invalid("summaries", problem);
        }
        if summary.key.len() != shape.head_dim || summary.value.len() != shape.head_dim {
            let (key, value) = (summary.key.len(), summary.value.len());
            let problem =
                format!("has key of {key} and value of {value} at {index}, head size is {}", shape.head_dim);
            return invalid("summaries", problem);
        }
        if !summary.weight.is_finite() || summary.weight <= 0.0 {
            let problem = format!("has weight {} at {index}, must be positive and finite", summary.weight);
            return invalid("summaries", problem);
        }
        if !summary.bias.is_finite() {
            let problem = format!("has bias {} at {index}, must be finite", summary.bias);
            return invalid("summaries", problem);
        }
    }
    Ok(())
}

/// Checks that a partial that is continued is one of the same rows.
pub(super) fn check_partials(
    field: &'static str,
    partials: Option<&Partials>,
    queries: &Queries<'_>,
) -> Result<(), Error> {
    let Some(partials) = partials else { return Ok(()) };
    let shape = queries.shape;
    let wanted = (queries.rows(), shape.query_heads(), shape.head_dim);
    if partials.shape() != wanted {
        let found = partials.shape();
        let problem = format!("has shape {found:?}, must be {wanted:?} (rows, query heads, head size)");
        return invalid(field, problem);
    }
    Ok(())
}

pub(super) fn invalid(field: &'static str, problem: String) -> Result<(), Error> {
    Err(Error::Invalid { field, problem })
}
