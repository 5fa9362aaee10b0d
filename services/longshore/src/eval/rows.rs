//! Single rows of attention: all that they could visit, the share of it that a list reached, how far an output is off.

use std::ops::Range;

use longshore_attention::{ExactBlock, Partials, WorkList};

/// Every key before `end`; tile `i` is block `i`.
pub(super) fn everything(end: u64, block_tokens: u64) -> WorkList {
    let block = |tile: u64| {
        let first_position = tile * block_tokens;
        let len = (end - first_position).min(block_tokens) as u32;
        ExactBlock { tile: tile as u32, first_position, len }
    };
    WorkList { exact: (0..end.div_ceil(block_tokens)).map(block).collect(), ..WorkList::default() }
}

/// Share of the whole softmax of a row that a part of its keys has, in one query head.
pub(super) fn share(part: &Partials, whole: &Partials, row: usize, head: usize) -> f64 {
    let ((m, l, _), (whole_m, whole_l, _)) = (part.row(row, head), whole.row(row, head));
    if l == 0.0 || whole_l == 0.0 {
        return 0.0;
    }
    f64::from(m - whole_m).exp2() * f64::from(l) / f64::from(whole_l)
}

/// |output − exact| / |exact| of a row over the heads of a group; `output` is the row, of all heads.
pub(super) fn relative_distance(output: &[f32], exact: &Partials, row: usize, group: Range<usize>) -> f64 {
    let (mut distance, mut norm) = (0.0, 0.0);
    for head in group {
        let (_, l, o) = exact.row(row, head);
        for (found, o) in output[head * o.len()..].iter().zip(o) {
            let right = f64::from(*o) / f64::from(l);
            distance += (f64::from(*found) - right).powi(2);
            norm += right.powi(2);
        }
    }
    if norm == 0.0 { distance.sqrt() } else { (distance / norm).sqrt() }
}
