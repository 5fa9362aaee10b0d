//! Refuses sparse calls that cannot be run, before anything is computed.

use crate::executor::check::{check_block, check_column, check_partials, check_queries, check_tile, invalid};
use crate::shape::LANES;
use crate::{Error, KvDtype, SparseItem, TileShape, Visit};

/// Checks every index, length and shape of an item.
pub(in crate::executor) fn check(item: &SparseItem<'_>) -> Result<(), Error> {
    let shape = item.kv.shape();
    shape.validate()?;
    check_queries(&item.queries, &shape)?;
    check_lists(item, &shape)?;
    check_partials("earlier", item.earlier, &item.queries)?;
    check_partials("stripe", item.stripe, &item.queries)?;
    match item.skip_below {
        Some(limit) if !(limit > 0.0 && limit.is_finite()) => {
            invalid("skip_below", format!("is {limit}, must be positive and finite"))
        }
        _ => Ok(()),
    }
}

fn check_lists(item: &SparseItem<'_>, shape: &TileShape) -> Result<(), Error> {
    let work = item.work;
    if work.kv_heads() != shape.kv_heads {
        let problem = format!("is {} in the lists, {} in the tiles", work.kv_heads(), shape.kv_heads);
        return invalid("kv_heads", problem);
    }
    let rows = item.queries.rows();
    if work.rows_end() > rows {
        return invalid("row_ends", format!("end at row {}, there are {rows}", work.rows_end()));
    }
    if work.visits().iter().any(|visit| matches!(visit, Visit::Means { .. })) {
        check_summaries(item, shape)?;
    }
    work.columns().iter().try_for_each(|column| check_column(column, item.kv))?;
    work.visits().iter().try_for_each(|visit| match visit {
        Visit::Block(block) => check_block("blocks", block, item.kv),
        Visit::Columns { count, .. } if *count == 0 || *count as usize > shape.block_tokens => {
            let problem = format!("are {count} in a visit, must be from 1 to {}", shape.block_tokens);
            invalid("columns", problem)
        }
        &Visit::Means { tile, first, keys } => check_means(item, tile, first, keys),
        Visit::Columns { .. } | Visit::EndOfStripe => Ok(()),
    })
}

fn check_summaries(item: &SparseItem<'_>, shape: &TileShape) -> Result<(), Error> {
    let means = item.summaries.shape();
    means.validate()?;
    let wanted = TileShape { block_tokens: means.block_tokens, dtype: KvDtype::F32, ..*shape };
    if means != wanted {
        return invalid("summaries", format!("have shape {means:?}, must be {wanted:?}"));
    }
    Ok(())
}

fn check_means(item: &SparseItem<'_>, tile: u32, first: u32, keys: u64) -> Result<(), Error> {
    check_tile("means", tile, item.summaries)?;
    let tokens = item.summaries.shape().block_tokens;
    if !(first as usize).is_multiple_of(LANES) || first as usize >= tokens {
        return invalid("means", format!("begin at key {first}, must be a multiple of 16 below {tokens}"));
    }
    if keys == 0 {
        return invalid("means", "name no key, must name one or more".to_owned());
    }
    let end = first as usize + (u64::BITS - keys.leading_zeros()) as usize;
    if end > tokens {
        return invalid("means", format!("end at key {end} of a tile, there are {tokens}"));
    }
    Ok(())
}
