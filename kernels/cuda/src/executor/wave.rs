//! What a call brings back: the partials of many items lie side by side on the device and come to the host together.

use std::sync::Arc;

use longshore_attention::{Partials, Queries};

use crate::{Buffer, Device, Error, Span};

/// Bytes of results after which a call reads them back and goes on with the next wave.
pub(super) const WAVE_BYTES: usize = 256 << 20;
/// Results begin at multiples of this.
const ALIGNMENT: usize = 256;

/// Rows, query heads and head size of a result.
pub(super) type RecordShape = (usize, usize, usize);

/// Shape of the result of some queries.
pub(super) fn record_shape(queries: &Queries<'_>) -> RecordShape {
    (queries.rows(), queries.shape.query_heads(), queries.shape.head_dim)
}

/// Bytes of a result.
pub(super) fn record_bytes((rows, heads, head_dim): RecordShape) -> usize {
    rows * heads * (2 + head_dim) * size_of::<f32>()
}

fn padded(shape: RecordShape) -> usize {
    record_bytes(shape).next_multiple_of(ALIGNMENT)
}

/// Room for the results of some items.
#[derive(Debug)]
pub(super) struct Wave {
    buffer: Buffer,
    places: Vec<(usize, RecordShape)>,
}

impl Wave {
    pub(super) fn new(device: &Arc<dyn Device>, shapes: &[RecordShape]) -> Result<Self, Error> {
        let mut bytes = 0;
        let place = |&shape: &RecordShape| {
            let at = bytes;
            bytes += padded(shape);
            (at, shape)
        };
        let places = shapes.iter().map(place).collect();
        Ok(Self { buffer: Buffer::new(device, bytes)?, places })
    }

    /// Where each result is to be written, as records (m, l, o…).
    pub(super) fn results(&self) -> Result<Vec<Span<'_>>, Error> {
        self.places.iter().map(|&(at, shape)| self.buffer.span(at, record_bytes(shape))).collect()
    }

    /// Waits for what was queued, and reads all results by one copy.
    pub(super) fn read(&self) -> Result<Vec<Partials>, Error> {
        let data: Vec<f32> = self.buffer.to_vec()?;
        let result = |&(at, shape): &(usize, RecordShape)| {
            let (rows, heads, head_dim) = shape;
            let own = &data[at / size_of::<f32>()..][..record_bytes(shape) / size_of::<f32>()];
            Partials::from_executor(rows, heads, head_dim, own).map_err(super::refused)
        };
        self.places.iter().map(result).collect()
    }
}

/// The first of `jobs` whose results, each given by the shapes of a job, fit a wave of `limit` bytes; at least one.
pub(super) fn first_wave(jobs: impl Iterator<Item = Vec<RecordShape>>, limit: usize) -> usize {
    let (mut bytes, mut count) = (0, 0);
    for shapes in jobs {
        bytes += shapes.into_iter().map(padded).sum::<usize>();
        if count > 0 && bytes > limit {
            break;
        }
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waves_are_bounded_and_never_empty() {
        let rows = |rows: usize| vec![(rows, 32, 126)];
        // 16 KiB a row.
        let wave = |jobs: &[usize]| first_wave(jobs.iter().map(|&count| rows(count)), WAVE_BYTES);
        assert_eq!(wave(&[2048; 3]), 3);
        assert_eq!(wave(&[2048; 20]), 8, "32 MiB each");
        assert_eq!(wave(&[1 << 20, 1]), 1, "larger than a wave");
        assert_eq!(wave(&[1, 1 << 20]), 1);
        assert_eq!(wave(&[]), 0);
    }
}
