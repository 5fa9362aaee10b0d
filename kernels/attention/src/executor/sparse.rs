//! Runs the lists of sparse attention.

mod check;
mod fold;
mod schedule;

use crate::simd::dispatch;
use crate::{Error, Partials, SparseItem};

use super::output::Output;
use super::row_tile::with_scratch;
use super::{CpuExecutor, start};
pub(super) use check::check;
use fold::FoldList;
use schedule::Region;

/// One partial per item.
pub(super) fn attend(executor: &CpuExecutor, items: &[SparseItem<'_>]) -> Result<Vec<Partials>, Error> {
    items.iter().try_for_each(check)?;
    let mut partials: Vec<Partials> = items.iter().map(|item| start(&item.queries, item.earlier)).collect();
    let outputs: Vec<Output<'_>> = items
        .iter()
        .zip(&mut partials)
        .map(|(item, partials)| Output::new(item.queries.shape, partials))
        .collect();
    for region in schedule::regions(items, executor.pool().threads()) {
        run(executor, items, &outputs, &region);
    }
    drop(outputs);
    Ok(partials)
}

fn run(executor: &CpuExecutor, items: &[SparseItem<'_>], outputs: &[Output<'_>], region: &Region<'_>) {
    let run = |index: usize| {
        let task = &region.tasks[index];
        let (item, output) = (&items[task.item], &outputs[task.item]);
        with_scratch(|scratch| {
            let (rows, visits, begins) = (task.rows, task.visits, task.begins);
            dispatch(executor.instruction_set(), FoldList { item, rows, visits, begins, output, scratch });
        });
    };
    if region.is_small() {
        (0..region.tasks.len()).for_each(run);
    } else {
        executor.pool().run(region.tasks.len(), run);
    }
}
