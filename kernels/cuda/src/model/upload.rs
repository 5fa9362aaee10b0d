//! Packs weights and brings them to the device, through a bounded buffer of the host.

use std::sync::{Mutex, PoisonError};

use longshore_compute::ComputePool;
use longshore_model::StoredMatrix;

use super::compute::Compute;
use super::linear::Linear;
use super::pack::{Problem, pack_row};
use super::programs::Form;
use crate::{Buffer, Error};

/// Bytes of packed weights in host memory at a time (more where one row has more).
const STAGING_BYTES: usize = 16 << 20;
/// Rows of a task.
const TASK_ROWS: usize = 16;

/// Which row of which matrix an output is; `None` is a row of zeros.
pub(super) type RowOf<'a> = dyn Fn(usize) -> Option<(usize, usize)> + Sync + 'a;

/// Why weights did not get to the device.
#[derive(Debug)]
pub(super) enum Fault {
    Device(Error),
    /// Weights of one of the matrices.
    Weights {
        matrix: usize,
        problem: Problem,
    },
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Device(error)
    }
}

/// Packs `outputs` rows of some matrices with the same inputs, some at a time.
pub(super) fn upload(
    compute: &Compute,
    pool: &ComputePool,
    form: Form,
    matrices: &[&StoredMatrix<'_>],
    outputs: usize,
    row_of: &RowOf<'_>,
) -> Result<Linear, Fault> {
    let (device, inputs) = (&compute.device, matrices[0].cols);
    let row_bytes = form.row_bytes(inputs);
    let weights = Buffer::new(device, row_bytes[0] * outputs)?;
    let constants = match row_bytes[1] {
        0 => None,
        bytes => Some(Buffer::new(device, bytes * outputs)?),
    };
    let piece = (STAGING_BYTES / (row_bytes[0] + row_bytes[1])).clamp(1, outputs);
    for first in (0..outputs).step_by(piece) {
        let rows = piece.min(outputs - first);
        let mut staged = row_bytes.map(|bytes| vec![0u32; rows * bytes / 4]);
        let row_of = |row: usize| row_of(first + row);
        pack_rows(compute, pool, form, matrices, &mut staged, &row_of)?;
        let send =
            |to: &Buffer, bytes: usize, data: &[u32]| to.span(first * bytes, size_of_val(data))?.write(data);
        send(&weights, row_bytes[0], &staged[0])?;
        if let Some(constants) = &constants {
            send(constants, row_bytes[1], &staged[1])?;
        }
    }
    Ok(Linear { form, outputs, inputs, weights, constants })
}

/// Packs rows into zeroed memory, in parallel.
fn pack_rows(
    compute: &Compute,
    pool: &ComputePool,
    form: Form,
    matrices: &[&StoredMatrix<'_>],
    [weights, constants]: &mut [Vec<u32>; 2],
    row_of: &RowOf<'_>,
) -> Result<(), Fault> {
    let [weight_bytes, constant_bytes] = form.row_bytes(matrices[0].cols);
    let mut constants = constants.chunks_exact_mut((constant_bytes / 4).max(1));
    let rows = weights.chunks_exact_mut(weight_bytes / 4);
    let mut rows: Vec<(&mut [u32], &mut [u32])> =
        rows.map(|weights| (weights, constants.next().unwrap_or_default())).collect();
    let wrong = Mutex::new(None);
    pool.run_chunks(&mut rows, TASK_ROWS, |task, rows| {
        for (i, (weights, constants)) in rows.iter_mut().enumerate() {
            let Some((matrix, row)) = row_of(task * TASK_ROWS + i) else { continue };
            let (weights, constants) =
                (bytemuck::cast_slice_mut(weights), bytemuck::cast_slice_mut(constants));
            let packed = pack_row((form, compute.precision), matrices[matrix], row, weights, constants);
            if let Err(problem) = packed {
                *wrong.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some(Fault::Weights { matrix, problem });
            }
        }
    });
    wrong.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}
