//! Lists whose visits the device made and counted: the host knows only how many each may have.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::plan::{self, Item, List};
use super::{Params, PrefillAttention, PrefillCall, invalid};
use crate::select::visit_kernels;
use crate::{Device, Error, KeyVisit, Launch, Span};

const THREADS: usize = 128;

/// Visits that [`crate::VisitBuilder`] made: those of list `kv_head * tiles + tile`.
#[derive(Debug, Clone, Copy)]
pub struct CountedLists<'a> {
    /// [`KeyVisit`]s of up to [`PrefillAttention::visit_keys`] keys, of all lists.
    pub visits: Span<'a>,
    /// u64 `[lists + 1]`: where each list begins.
    pub offsets: Span<'a>,
    /// Query tiles, ascending.
    pub tiles: &'a [CountedTile],
    /// Rows (positions) of a tile that [`PrefillAttention::visit_keys`] was asked for.
    pub tile_rows: usize,
    /// Pages, and pages of means, that visits may name.
    pub pages: usize,
    /// See `pages`.
    pub mean_pages: usize,
}

/// A query tile of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CountedTile {
    /// First row (position).
    pub first_row: usize,
    /// Rows.
    pub rows: usize,
    /// Visits of each of its lists, at most.
    pub most_visits: usize,
}

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct PlaceParams {
    offsets: u64,
    items: u64,
    count: u32,
    unused: u32,
}

/// Queues the launch that puts visits into items of [`plan::counted`].
pub(super) fn place(
    device: &Arc<dyn Device>,
    items: Span<'_>,
    count: usize,
    offsets: Span<'_>,
) -> Result<(), Error> {
    let [.., kernel] = visit_kernels();
    let params = PlaceParams {
        offsets: offsets.for_kernel("offsets", &[1], size_of::<u64>())?,
        items: items.for_kernel("items", &[count], size_of::<Item>())?,
        count: count as u32,
        unused: 0,
    };
    device.launch(&Launch::new(&kernel, [count.div_ceil(THREADS) as u32, 1, 1], THREADS as u32, &params))
}

impl PrefillAttention {
    /// Keys that a visit of lists of up to `tile_rows` rows (positions) may have.
    pub fn visit_keys(&self, tile_rows: usize) -> Result<usize, Error> {
        Ok(self.choice(tile_rows * self.heads.group)?.keys)
    }

    /// Queues the attention of the rows of `lists`, and of no others: these are of another call, or keep what the output has. Nobody waits
    /// for the number of visits: lists are cut by the most that they may have.
    pub fn counted(&self, call: &PrefillCall<'_>, lists: &CountedLists<'_>) -> Result<(), Error> {
        self.check(call)?;
        let (kv_heads, group) = (self.heads.kv_heads, self.heads.group as u32);
        self.check_counted(call, lists)?;
        let choice = self.choice(lists.tile_rows * self.heads.group)?;
        let list = |kv_head: usize, (number, tile): (usize, &CountedTile)| List {
            kv_head: kv_head as u32,
            first_row: tile.first_row as u32 * group,
            rows: tile.rows as u32 * group,
            first_visit: (kv_head * lists.tiles.len() + number) as u64,
            visits: u32::try_from(tile.most_visits).unwrap_or(u32::MAX),
        };
        let of_head = |kv_head| lists.tiles.iter().enumerate().map(move |tile| list(kv_head, tile));
        let all: Vec<List> = (0..kv_heads).flat_map(of_head).collect();
        let plan = plan::counted(&all, choice.rows() as u32, self.part_visits(&choice, &all));
        let visits = lists.visits.for_kernel("visits", &[1], size_of::<KeyVisit>())?;
        let params = Params { visits, ..self.params(call)? };
        self.queue(call, &choice, &plan, params, Some(lists.offsets))
    }

    fn check_counted(&self, call: &PrefillCall<'_>, lists: &CountedLists<'_>) -> Result<(), Error> {
        let beyond = |tile: &&CountedTile| {
            tile.rows > lists.tile_rows || tile.first_row.saturating_add(tile.rows) > call.rows
        };
        if let Some(tile) = lists.tiles.iter().find(beyond) {
            let problem = format!("have {tile:?} of {} rows, at most {}", call.rows, lists.tile_rows);
            return Err(invalid("tiles", problem));
        }
        lists.offsets.for_kernel(
            "offsets",
            &[self.heads.kv_heads * lists.tiles.len() + 1],
            size_of::<u64>(),
        )?;
        call.pages.for_kernel("pages", &[lists.pages], size_of::<u64>())?;
        match call.means {
            None if lists.mean_pages > 0 => Err(invalid("means", "are visited, there are none".to_owned())),
            None => Ok(()),
            Some(means) => means.pages.for_kernel("means", &[lists.mean_pages], size_of::<u64>()).map(|_| ()),
        }
    }
}
