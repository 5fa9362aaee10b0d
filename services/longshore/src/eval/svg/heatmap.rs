//! A grid of values, each written in its cell.

use super::{Anchor, CHARACTER, Canvas, Scale};

/// Values `[rows][columns]`; `None` is left grey.
#[derive(Debug)]
pub(in crate::eval) struct Heatmap<'a> {
    pub(in crate::eval) title: &'a str,
    /// What columns and rows are.
    pub(in crate::eval) axes: (&'a str, &'a str),
    pub(in crate::eval) columns: &'a [String],
    pub(in crate::eval) rows: &'a [String],
    pub(in crate::eval) cells: &'a [Vec<Option<f64>>],
    /// From 0 to 1; what is beyond has the colour of the end.
    pub(in crate::eval) scale: Scale,
}

const HIGH: usize = 22;
const TOP: usize = 66;

impl Heatmap<'_> {
    /// The picture.
    pub(in crate::eval) fn svg(&self) -> String {
        let longest = |labels: &[String]| labels.iter().map(|label| label.chars().count()).max().unwrap_or(0);
        let left = 34 + (longest(self.rows) * CHARACTER).max(40);
        // Few columns may be wide; the widest label must fit.
        let wide = (longest(self.columns) * CHARACTER + 10).max(48);
        let (right, bottom) = (left + self.columns.len() * wide, TOP + self.rows.len() * HIGH);
        let least = (self.title.chars().count() * 9 + 30).max(left + 330);
        let mut canvas = Canvas::new((right + 24).max(least), bottom + 48, self.title);
        canvas.text(left + self.columns.len() * wide / 2, TOP - 24, Anchor::Middle, self.axes.0);
        canvas.upright(18, TOP + self.rows.len() * HIGH / 2, self.axes.1);
        for (i, label) in self.columns.iter().enumerate() {
            canvas.text(left + i * wide + wide / 2, TOP - 7, Anchor::Middle, label);
        }
        for (i, (label, cells)) in self.rows.iter().zip(self.cells).enumerate() {
            let y = TOP + i * HIGH;
            canvas.text(left - 8, y + 15, Anchor::End, label);
            for (j, cell) in cells.iter().enumerate() {
                self.cell(&mut canvas, [left + j * wide, y, wide], *cell);
            }
        }
        let (low, high) = self.ends();
        canvas.legend([left + low.chars().count() * CHARACTER, bottom + 18], self.scale, low, high);
        canvas.finish()
    }

    fn cell(&self, canvas: &mut Canvas, [x, y, wide]: [usize; 3], cell: Option<f64>) {
        let Some(value) = cell else { return canvas.rect([x, y, wide - 1, HIGH - 1], "#dddddd") };
        canvas.rect([x, y, wide - 1, HIGH - 1], &self.scale.colour(value));
        let words = match self.scale {
            Scale::Score | Scale::Share => format!("{:.0}", value * 100.0),
            Scale::Error => format!("{value:.2}"),
        };
        canvas.inked(x + wide / 2, y + 15, Anchor::Middle, self.scale.ink(value), &words);
    }

    fn ends(&self) -> (&'static str, &'static str) {
        match self.scale {
            Scale::Score => ("none right", "100 % right"),
            Scale::Share => ("0 %", "100 %"),
            Scale::Error => ("0", "1 and above"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heatmap_has_a_cell_for_each_value() {
        let rows: Vec<String> = ["a<b", "c"].map(str::to_owned).to_vec();
        let columns: Vec<String> = ["1", "2"].map(str::to_owned).to_vec();
        let cells = vec![vec![Some(0.0), None], vec![Some(1.0), Some(0.25)]];
        let (title, axes) = ("t & u", ("tokens", "depth"));
        let map = Heatmap { title, axes, columns: &columns, rows: &rows, cells: &cells, scale: Scale::Score };
        let svg = map.svg();
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        for words in ["t &amp; u", "a&lt;b", "tokens", "depth", ">25<", "#dddddd"] {
            assert!(svg.contains(words), "{words}");
        }
        // Each end of the scale: its cell and its place in the legend.
        for colour in ["#c82828", "#329650"] {
            assert_eq!(svg.matches(colour).count(), 2, "{colour}");
        }
    }
}
