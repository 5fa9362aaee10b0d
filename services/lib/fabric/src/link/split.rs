//! Queries into messages of bounded size. Rows are independent, so that where a query is cut changes no bit of its answer. The
//! rows of a sparse item keep its list.

use longshore_proto::types::{AttendItem, AttendQuery, Tensor};

use super::answer::Expected;

/// Query rows of one message, bytes.
pub(super) const PIECE_BYTES: usize = 1 << 20;
/// The smallest stripe that any deployment has, in positions: one block of 16.
const STRIPE_POSITIONS_MIN: u64 = 16;

/// One message of a query.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) query: AttendQuery,
    /// What each of its items is of the whole query.
    pub(super) spans: Vec<Span>,
    /// More partials than this cannot be an answer.
    pub(super) partials_max: usize,
}

/// Consecutive rows of one item of the whole query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) item: usize,
    pub(super) first_row: usize,
    pub(super) rows: usize,
}

/// Cuts `query` into pieces of at most [`PIECE_BYTES`], or one row where rows are larger than that.
pub(super) fn split(query: AttendQuery, expected: &Expected) -> Vec<Piece> {
    let mut cutter = Cutter {
        empty: AttendQuery { items: Vec::new(), ..query },
        pieces: Vec::new(),
        items: Vec::new(),
        spans: Vec::new(),
        bytes: 0,
    };
    for (index, item) in query.items.into_iter().enumerate() {
        cutter.cut(index, item, expected);
    }
    cutter.flush();
    cutter.pieces
}

struct Cutter {
    empty: AttendQuery,
    pieces: Vec<Piece>,
    items: Vec<AttendItem>,
    spans: Vec<Span>,
    bytes: usize,
}

impl Cutter {
    fn cut(&mut self, index: usize, item: AttendItem, expected: &Expected) {
        let (rows, row_bytes) = (expected.rows(index), expected.row_bytes(index));
        let mut first_row = 0;
        while first_row < rows {
            let room = PIECE_BYTES.saturating_sub(self.bytes) / row_bytes;
            if room == 0 && !self.items.is_empty() {
                self.flush();
                continue;
            }
            let taken = room.max(1).min(rows - first_row);
            self.spans.push(Span { item: index, first_row, rows: taken });
            self.items.push(rows_of(&item, first_row, taken, row_bytes));
            self.bytes += taken * row_bytes + list_bytes(&item);
            first_row += taken;
        }
    }

    fn flush(&mut self) {
        if self.items.is_empty() {
            return;
        }
        let items = std::mem::take(&mut self.items);
        let partials_max = items.iter().map(partials_max).fold(0, usize::saturating_add);
        let query = AttendQuery { items, ..self.empty.clone() };
        self.pieces.push(Piece { query, spans: std::mem::take(&mut self.spans), partials_max });
        self.bytes = 0;
    }
}

fn rows_of(item: &AttendItem, first_row: usize, rows: usize, row_bytes: usize) -> AttendItem {
    let mut shape = item.queries.shape.clone();
    shape[0] = rows as u64;
    let data = item.queries.data.slice(first_row * row_bytes..(first_row + rows) * row_bytes);
    AttendItem {
        view_id: item.view_id,
        first_position: item.first_position + first_row as u64,
        queries: Tensor { dtype: item.queries.dtype, shape, data },
        scale: item.scale,
        sparse: item.sparse.clone(),
    }
}

/// About how many bytes the list of a sparse item travels as.
fn list_bytes(item: &AttendItem) -> usize {
    const RUN_BYTES: usize = 4;
    item.sparse.as_ref().map_or(0, |visits| visits.runs.len() * RUN_BYTES)
}

/// Stripes that the keys of an item can lie in: none lies beyond its last row.
fn partials_max(item: &AttendItem) -> usize {
    let positions = item.first_position.saturating_add(item.queries.shape[0]);
    usize::try_from(positions / STRIPE_POSITIONS_MIN).unwrap_or(usize::MAX).saturating_add(1)
}
