//! The list of a sparse item, held against the view.

use std::ops::Range;

use longshore_attention::TileShape;
use longshore_proto::types::{RUNS_MAX, SparseVisits};

use super::Blocks;
use crate::Error;

/// What a sparse item visits.
pub(super) struct Visits {
    pub(super) kv_head: usize,
    pub(super) skip_below: Option<f32>,
    /// Runs of blocks of the view, ascending, none empty.
    pub(super) runs: Vec<Range<usize>>,
}

impl Visits {
    /// Checks everything: a caller in this process sends no message that would have been checked. Looks at the ends of runs only,
    /// however long they say they are.
    pub(super) fn new(tile: &TileShape, visits: &SparseVisits, blocks: &Blocks) -> Result<Self, Error> {
        let invalid = |field: &str, problem: String| Err(Error::invalid(format!("sparse.{field}"), problem));
        if visits.kv_head as usize >= tile.kv_heads {
            return invalid("kv_head", format!("is {}, tiles have {}", visits.kv_head, tile.kv_heads));
        }
        if let Some(margin) = visits.skip_below.filter(|margin| !(margin.is_finite() && *margin > 0.0)) {
            return invalid("skip_below", format!("is {margin}, must be finite and positive"));
        }
        if visits.runs.is_empty() || visits.runs.len() > RUNS_MAX {
            return invalid("runs", format!("are {}, must be from 1 to {RUNS_MAX}", visits.runs.len()));
        }
        let mut runs = Vec::with_capacity(visits.runs.len());
        let mut end = 0;
        for (index, run) in visits.runs.iter().enumerate() {
            if run.is_empty() || run.start < end || (run.start == end && index > 0) {
                return invalid("runs", format!("do not ascend at run {index}"));
            }
            end = run.end;
            match positions(blocks, run) {
                Some(positions) => runs.push(positions),
                None => {
                    let (first, last) = (run.start, run.end - 1);
                    return invalid(
                        "runs",
                        format!("visit blocks {first} to {last}, not all of which the view has"),
                    );
                }
            }
        }
        Ok(Self { kv_head: visits.kv_head as usize, skip_below: visits.skip_below, runs })
    }
}

/// Where the view, whose blocks ascend, has every block of a run.
fn positions(blocks: &Blocks, run: &Range<u64>) -> Option<Range<usize>> {
    let start = blocks.partition_point(|entry| entry.index < run.start);
    let end = start.checked_add(usize::try_from(run.end - run.start).ok()?)?;
    let has = |position: usize, index: u64| blocks.get(position).is_some_and(|entry| entry.index == index);
    (has(start, run.start) && has(end - 1, run.end - 1)).then_some(start..end)
}
