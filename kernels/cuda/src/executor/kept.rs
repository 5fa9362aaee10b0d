//! Attention over rows that the forward pass left on the device, and whose result stays there: nothing is waited for.

use longshore_attention::{Error as AttentionError, HeadShape, PagedKv, Promise};
use longshore_model::{Activations, KeptAppend, KeptAttention, KeptMeans, KeptPart, KeptVisits};

use super::append::check_all;
use super::jobs::DECODE_ROWS_MAX;
use super::pages::contents_of;
use super::rule::RowsAt;
use super::{CudaExecutor, eighths, failed, list_element};
use crate::{Buffer, DenseKeys, Error, KeptRows, PrefillCall};

impl KeptAttention for CudaExecutor {
    /// Few rows, which the decode kernel is for, go the way of the host, and so does what has no page for every block.
    fn attend_kept(
        &self,
        (heads, scale): (HeadShape, f32),
        q: &Activations,
        parts: &[KeptPart<'_>],
    ) -> Result<Option<Activations>, AttentionError> {
        let Some(rows) = self.rows_of(q) else { return Ok(None) };
        check(heads, rows, parts)?;
        if parts.iter().any(|part| part.rows.len() * heads.group <= DECODE_ROWS_MAX) {
            return Ok(None);
        }
        let to_lists = &self.fallbacks.to_lists;
        let Some(output) = self.unless_short(to_lists, || rows.beside().map(Some))? else { return Ok(None) };
        for part in parts {
            let at = RowsAt {
                queries: rows.span(&part.rows).map_err(failed)?,
                output: output.span(&part.rows).map_err(failed)?,
                divide: true,
            };
            let queued = match part.visits {
                KeptVisits::All { kv, first_key, promised } => {
                    let all = || self.queue_all((heads, scale), part, (kv, first_key, promised), at);
                    self.unless_short(to_lists, all)?.is_some()
                }
                KeptVisits::By { policy, input, promised } => {
                    self.queue_by_rule(policy, (input, part.rows.len(), promised), at)?
                }
            };
            if !queued {
                return Ok(None);
            }
        }
        Ok(Some(output.activations()))
    }

    /// Pages of int8 are made of tiles.
    fn append_kept(
        &self,
        k: &Activations,
        v: &Activations,
        parts: &[KeptAppend<'_>],
    ) -> Result<bool, AttentionError> {
        match (self.rows_of(k), self.rows_of(v)) {
            (Some(k), Some(v)) => self.append_rows(k, v, parts),
            _ => Ok(false),
        }
    }

    fn append_means(&self, means: &KeptMeans<'_>) -> Result<bool, AttentionError> {
        self.make_means(means)
    }
}

impl CudaExecutor {
    /// Rows that are on the device.
    fn rows_of<'a>(&self, rows: &'a Activations) -> Option<&'a KeptRows> {
        KeptRows::of(rows).filter(|rows| self.tally.is_over(rows.device()))
    }

    /// Queues rows over all keys up to their own; `None`: there is no kernel for them. Refuses what has no page for each block.
    fn queue_all(
        &self,
        (heads, scale): (HeadShape, f32),
        part: &KeptPart<'_>,
        (kv, first_key, promised): (&dyn PagedKv, u64, &[Promise]),
        at: RowsAt<'_>,
    ) -> Result<Option<()>, Error> {
        let tile = kv.shape();
        let end = part.first_position + part.rows.len() as u64;
        let count = end.saturating_sub(first_key);
        let blocks = usize::try_from(count.div_ceil(tile.block_tokens as u64)).unwrap_or(usize::MAX);
        let fits = kv.only_head().is_none()
            && (tile.kv_heads, tile.head_dim) == (heads.kv_heads, heads.head_dim)
            && (promised.len()..=kv.len()).contains(&blocks)
            && count <= u64::from(u32::MAX)
            && (0..blocks).all(|block| kv.tile(block).shape() == tile);
        let element = list_element(tile);
        let pages = match self.pages(tile, element, eighths(tile, element)) {
            Ok(pages) if fits => pages,
            Ok(_) | Err(Error::Invalid { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let Ok(kernel) = self.prefill(&pages.shape(), heads.group) else {
            return Ok(None);
        };
        pages.check_room(blocks)?;
        let pinned = pages.pin_contents(&contents_of(kv, blocks, blocks, promised))?;
        check_all(&pinned, blocks)?;
        let table = Buffer::from_slice(&self.device, pinned.addresses())?;
        let call = PrefillCall {
            queries: at.queries,
            rows: part.rows.len(),
            first_position: part.first_position,
            scale,
            pages: table.whole(),
            means: None,
            earlier: None,
            output: at.output,
            divide: at.divide,
            skip_below: None,
        };
        kernel.dense(&call, DenseKeys { first_position: first_key, count })?;
        Ok(Some(()))
    }
}

/// Refuses rows of another model, and parts that do not have each row once.
fn check(heads: HeadShape, rows: &KeptRows, parts: &[KeptPart<'_>]) -> Result<(), AttentionError> {
    let invalid = |field, problem| Err(AttentionError::Invalid { field, problem });
    let width = heads.query_heads() * heads.head_dim;
    if rows.width() != width {
        return invalid("q", format!("has rows of {} elements, must have {width}", rows.width()));
    }
    let end = parts.iter().try_fold(0, |end, part| (part.rows.start == end).then_some(part.rows.end));
    if end != Some(rows.rows()) || parts.iter().any(|part| part.rows.is_empty()) {
        let problem = format!("do not follow each other from row 0 to the last of {}", rows.rows());
        return invalid("parts", problem);
    }
    Ok(())
}
