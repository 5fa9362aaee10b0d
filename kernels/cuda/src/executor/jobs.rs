//! What the items of a call are queued as.

use longshore_attention::{AttendItem, ExactBlock, TileShape, WorkList};

/// Packed rows (positions × query heads of a KV head) up to which keys are split over the device instead of rows.
pub(super) const DECODE_ROWS_MAX: usize = 32;
/// Items of one launch, at most: a grid has room for as many merges.
const BATCH_ITEMS_MAX: usize = 16_384;

/// Something that is queued at once, by the numbers of its items.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Job {
    /// Few rows each: one launch.
    Decode(BatchKey, Vec<usize>),
    /// One item over lists.
    Lists([usize; 1]),
}

impl Job {
    pub(super) fn items(&self) -> &[usize] {
        match self {
            Self::Decode(_, items) => items,
            Self::Lists(item) => item,
        }
    }
}

/// The jobs of a call. Items without rows or without a key of a tile are in none: nothing is to be done on the device.
pub(super) fn of(items: &[AttendItem<'_>]) -> Vec<Job> {
    // Batches in the order in which they are met; there is nearly always one.
    let (mut batches, mut lists): (Vec<Job>, Vec<Job>) = (Vec::new(), Vec::new());
    for (index, item) in items.iter().enumerate() {
        let WorkList { exact, columns, .. } = item.work;
        if item.queries.rows() == 0 || (exact.is_empty() && columns.is_empty()) {
            continue;
        }
        let Some(key) = BatchKey::of(item) else {
            lists.push(Job::Lists([index]));
            continue;
        };
        let open = batches.iter_mut().find_map(|job| match job {
            Job::Decode(other, batch) if *other == key && batch.len() < BATCH_ITEMS_MAX => Some(batch),
            _ => None,
        });
        match open {
            Some(batch) => batch.push(index),
            None => batches.push(Job::Decode(key, vec![index])),
        }
    }
    batches.extend(lists);
    batches
}

/// Items of one launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BatchKey {
    pub(super) tile: TileShape,
    group: usize,
    scale: u32,
}

impl BatchKey {
    /// Of an item with few rows over blocks that follow each other; `None` for all others. All of int8 are such or go by lists.
    fn of(item: &AttendItem<'_>) -> Option<Self> {
        let WorkList { exact, columns, summaries, .. } = item.work;
        let (tile, group) = (item.kv.shape(), item.queries.shape.group);
        let plain = columns.is_empty() && summaries.is_empty() && !exact.is_empty();
        let few = (1..=DECODE_ROWS_MAX).contains(&(item.queries.rows() * group));
        let follows = |pair: &[ExactBlock]| {
            pair[0].len as usize == tile.block_tokens
                && pair[1].first_position == pair[0].first_position + u64::from(pair[0].len)
        };
        (plain && few && exact.windows(2).all(follows)).then_some(Self {
            tile,
            group,
            scale: item.queries.scale.to_bits(),
        })
    }
}
