//! Attention between parts of a prompt, and an outline of what a policy visited.

use std::fmt::Write;

use super::{Anchor, Canvas, Scale};

/// One head; rows and columns are cells of `cell_tokens` positions.
#[derive(Debug)]
pub(in crate::eval) struct AttentionMap<'a> {
    pub(in crate::eval) title: &'a str,
    /// Share of the softmax of the cell's last row, `[query cells][key cells up to it]`.
    pub(in crate::eval) mass: &'a [Vec<f64>],
    pub(in crate::eval) visited: &'a [Vec<bool>],
    pub(in crate::eval) cell_tokens: usize,
}

const LEFT: usize = 84;
const TOP: usize = 74;
/// Shades that can be told apart; neighbours of one shade are drawn together.
const SHADES: f64 = 24.0;
const VISITED: &str = "#e8590c";

impl AttentionMap<'_> {
    /// The picture: the darker the heavier, over three orders of magnitude.
    pub(in crate::eval) fn svg(&self) -> String {
        let count = self.mass.len().max(1);
        let side = (672 / count).clamp(4, 24);
        let end = count * side;
        let wide = (LEFT + end + 30).max(self.title.chars().count() * 9 + 30).max(560);
        let mut canvas = Canvas::new(wide, TOP + end + 84, self.title);
        canvas.text(12, 46, Anchor::Start, &self.subtitle());
        canvas.put(format_args!(
            "<path d=\"{}\" fill=\"{}\"/>",
            staircase(count, side),
            Scale::Share.colour(0.0)
        ));
        for (row, mass) in self.mass.iter().enumerate() {
            self.row(&mut canvas, row, mass, side);
        }
        canvas.put(format_args!(
            "<path d=\"{}\" fill=\"none\" stroke=\"{VISITED}\" stroke-width=\"1.2\"/>",
            self.outline(side)
        ));
        self.axes(&mut canvas, count, side);
        canvas.finish()
    }

    fn subtitle(&self) -> String {
        let cells = || self.visited.iter().enumerate().flat_map(|(row, cells)| cells.iter().take(row + 1));
        let (visited, all) = (cells().filter(|visited| **visited).count(), cells().count());
        let pairs = self.mass.iter().zip(self.visited).flat_map(|(mass, visited)| mass.iter().zip(visited));
        let seen: f64 = pairs.filter(|(_, visited)| **visited).map(|(mass, _)| mass).sum();
        format!(
            "{:.0} % of the cells have visited keys; they hold {:.1} % of the mass",
            100.0 * visited as f64 / all.max(1) as f64,
            100.0 * seen / self.mass.len().max(1) as f64
        )
    }

    /// Cells of one shade next to each other as one rectangle; the lightest are the ground.
    fn row(&self, canvas: &mut Canvas, row: usize, mass: &[f64], side: usize) {
        let shade = |mass: &f64| ((1.0 + mass.max(1e-9).log10() / 3.0).max(0.0) * SHADES).round() as usize;
        let shades: Vec<usize> = mass.iter().take(row + 1).map(shade).collect();
        let mut column = 0;
        for run in shades.chunk_by(|a, b| a == b) {
            if run[0] > 0 {
                let place = [LEFT + column * side, TOP + row * side, run.len() * side, side];
                canvas.rect(place, &Scale::Share.colour(run[0] as f64 / SHADES));
            }
            column += run.len();
        }
    }

    /// Edges between visited cells and others.
    fn outline(&self, side: usize) -> String {
        let visited = |row: Option<usize>, column: Option<usize>| {
            let (Some(row), Some(column)) = (row, column) else { return false };
            column <= row
                && self.visited.get(row).and_then(|cells| cells.get(column)).copied().unwrap_or(false)
        };
        let mut path = String::new();
        for row in 0..self.visited.len() {
            for column in 0..=row {
                if !visited(Some(row), Some(column)) {
                    continue;
                }
                let (x, y) = (LEFT + column * side, TOP + row * side);
                let mut edge = |open: bool, [x, y]: [usize; 2], way: char| {
                    if open {
                        let _ = write!(path, "M{x} {y}{way}{side}");
                    }
                };
                edge(!visited(row.checked_sub(1), Some(column)), [x, y], 'h');
                edge(!visited(Some(row + 1), Some(column)), [x, y + side], 'h');
                edge(!visited(Some(row), column.checked_sub(1)), [x, y], 'v');
                edge(!visited(Some(row), Some(column + 1)), [x + side, y], 'v');
            }
        }
        path
    }

    fn axes(&self, canvas: &mut Canvas, count: usize, side: usize) {
        let end = count * side;
        let ticks = 4.min(count);
        for tick in 0..=ticks {
            let at = count * tick / ticks;
            let label = crate::console::grouped((at * self.cell_tokens) as u64);
            canvas.text(LEFT + at * side, TOP + end + 16, Anchor::Middle, &label);
            canvas.text(LEFT - 6, TOP + at * side + 4, Anchor::End, &label);
        }
        canvas.text(LEFT + end / 2, TOP + end + 34, Anchor::Middle, "key position");
        canvas.upright(16, TOP + end / 2, "query position");
        let y = TOP + end + 52;
        canvas.legend([LEFT + 20, y], Scale::Share, "0.1 %", "100 % of a row's mass");
        let x = LEFT + 330;
        canvas.put(format_args!(
            "<rect x=\"{x}\" y=\"{y}\" width=\"13\" height=\"13\" fill=\"none\" stroke=\"{VISITED}\" stroke-width=\"1.2\"/>"
        ));
        canvas.text(x + 20, y + 11, Anchor::Start, "visited");
    }
}

/// The half below the diagonal, cells of the diagonal included.
fn staircase(count: usize, side: usize) -> String {
    let mut path = format!("M{LEFT} {TOP}");
    for _ in 0..count {
        let _ = write!(path, "h{side}v{side}");
    }
    let _ = write!(path, "H{LEFT}z");
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_outlines_what_was_visited_below_the_diagonal() {
        let mass = vec![vec![1.0], vec![0.0, 1.0], vec![0.5, 0.0, 0.5]];
        let visited = vec![vec![true], vec![false, true], vec![true, false, true]];
        let map = AttentionMap { title: "map", mass: &mass, visited: &visited, cell_tokens: 64 };
        // Four cells of four edges, none of which touches another.
        assert_eq!(map.outline(10).matches('M').count(), 16);
        let svg = map.svg();
        assert!(svg.contains("67 % of the cells") && svg.contains("100.0 % of the mass"), "{svg}");
        assert!(svg.contains(">192<"), "positions of the last tick");
    }

    #[test]
    fn neighbours_share_no_edge() {
        let visited = vec![vec![true], vec![true, true]];
        let mass = vec![vec![1.0], vec![0.5, 0.5]];
        let map = AttentionMap { title: "map", mass: &mass, visited: &visited, cell_tokens: 64 };
        assert_eq!(map.outline(10).matches('M').count(), 8);
    }
}
