//! Refuses attention calls that cannot be run, before anything is computed.

use super::AttendItem;
use crate::{Error, ExactBlock, Queries, SummaryKey, TileShape, WorkList};

/// Checks every index, length and shape of an item.
pub(super) fn check(item: &AttendItem<'_>) -> Result<(), Error> {
    let tile = item.kv.shape();
    tile.validate()?;
    check_queries(&item.queries, &tile)?;
    check_tiles(item, &tile)?;
    check_summaries(&item.work.summaries, &tile)?;
    check_initial(item)
}

fn check_queries(queries: &Queries<'_>, tile: &TileShape) -> Result<(), Error> {
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

fn check_tiles(item: &AttendItem<'_>, shape: &TileShape) -> Result<(), Error> {
    let WorkList { exact, columns, column_bias, .. } = item.work;
    for &ExactBlock { tile, first_position, len } in exact {
        check_tile(item, shape, "exact", tile)?;
        if len == 0 || len as usize > shape.block_tokens {
            return invalid(
                "exact",
                format!("visits {len} keys of a tile, must be from 1 to {}", shape.block_tokens),
            );
        }
        if first_position.checked_add(u64::from(len)).is_none() {
            return invalid("exact", format!("starts at position {first_position}, too large"));
        }
    }
    for column in columns {
        check_tile(item, shape, "columns", column.tile)?;
        if column.offset as usize >= shape.block_tokens {
            let problem = format!("visits key {} of a tile, there are {}", column.offset, shape.block_tokens);
            return invalid("columns", problem);
        }
    }
    if !column_bias.is_empty() && column_bias.len() != columns.len() {
        let problem = format!("has {} elements, there are {} columns", column_bias.len(), columns.len());
        return invalid("column_bias", problem);
    }
    match column_bias.iter().find(|bias| !bias.is_finite()) {
        Some(bias) => invalid("column_bias", format!("is {bias} for some column, must be finite")),
        None => Ok(()),
    }
}

fn check_tile(item: &AttendItem<'_>, shape: &TileShape, field: &'static str, tile: u32) -> Result<(), Error> {
    let tiles = item.kv.len();
    if tile as usize >= tiles {
        return invalid(field, format!("visits tile {tile}, there are {tiles}"));
    }
    let found = item.kv.tile(tile as usize).shape();
    if found != *shape {
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

fn check_initial(item: &AttendItem<'_>) -> Result<(), Error> {
    let Some(initial) = item.initial else { return Ok(()) };
    let shape = item.queries.shape;
    let wanted = (item.queries.rows(), shape.query_heads(), shape.head_dim);
    if initial.shape() != wanted {
        let found = initial.shape();
        let problem = format!("has shape {found:?}, must be {wanted:?} (rows, query heads, head size)");
        return invalid("initial", problem);
    }
    Ok(())
}

fn invalid(field: &'static str, problem: String) -> Result<(), Error> {
    Err(Error::Invalid { field, problem })
}
