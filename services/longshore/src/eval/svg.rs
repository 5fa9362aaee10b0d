//! Pictures: heatmaps, drawn as SVG without a library.

use std::fmt::Write;

/// What the colours of a picture mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scale {
    /// From red (0) to green (1).
    Score,
    /// From white (0) to blue (1).
    Share,
}

impl Scale {
    fn colour(self, value: f64) -> String {
        let value = value.clamp(0.0, 1.0);
        let mix = |from: [f64; 3], to: [f64; 3], share: f64| {
            let part = |i: usize| (from[i] + (to[i] - from[i]) * share).round() as u8;
            format!("#{:02x}{:02x}{:02x}", part(0), part(1), part(2))
        };
        match self {
            Self::Share => mix([247.0, 251.0, 255.0], [8.0, 48.0, 107.0], value),
            Self::Score if value < 0.5 => mix([200.0, 40.0, 40.0], [250.0, 210.0, 80.0], value * 2.0),
            Self::Score => mix([250.0, 210.0, 80.0], [50.0, 150.0, 80.0], value * 2.0 - 1.0),
        }
    }
}

const FONT: &str = "font-family=\"sans-serif\" font-size=\"12\"";
const LEFT: usize = 90;
const TOP: usize = 60;

/// A grid of values from 0 to 1, `[rows][columns]`, each written in its cell; `None` is left grey.
pub(super) fn heatmap(
    title: &str,
    columns: &[String],
    rows: &[String],
    cells: &[Vec<Option<f64>>],
    scale: Scale,
) -> String {
    let (wide, high) = (64, 22);
    let mut svg = open(LEFT + columns.len() * wide + 20, TOP + rows.len() * high + 20, title);
    for (i, label) in columns.iter().enumerate() {
        text(&mut svg, LEFT + i * wide + wide / 2, TOP - 8, "middle", label);
    }
    for (i, (label, cells)) in rows.iter().zip(cells).enumerate() {
        let y = TOP + i * high;
        text(&mut svg, LEFT - 8, y + 15, "end", label);
        for (j, cell) in cells.iter().enumerate() {
            let x = LEFT + j * wide;
            let colour = cell.map_or_else(|| "#dddddd".to_owned(), |value| scale.colour(value));
            rect(&mut svg, [x, y, wide - 1, high - 1], &colour);
            if let Some(value) = cell {
                text(&mut svg, x + wide / 2, y + 15, "middle", &format!("{:.0}", value * 100.0));
            }
        }
    }
    svg + "</svg>\n"
}

/// Attention between blocks, `[query blocks][key blocks]` of one size, the darker the heavier; those `visited` get a frame.
pub(super) fn attention_map(title: &str, mass: &[Vec<f64>], visited: &[Vec<bool>]) -> String {
    let count = mass.len().max(1);
    let side = (720 / count).clamp(2, 24);
    let mut svg = open(LEFT + count * side + 20, TOP + count * side + 30, title);
    let (middle, bottom) = (LEFT + count * side / 2, TOP + count * side + 18);
    text(&mut svg, middle, bottom, "middle", "key blocks; frames: visited by the policy");
    text(&mut svg, LEFT - 8, TOP + count * side / 2, "end", "query blocks");
    for (row, (mass, visited)) in mass.iter().zip(visited).enumerate() {
        for (column, (&mass, &visited)) in mass.iter().zip(visited).enumerate().take(row + 1) {
            let (x, y) = (LEFT + column * side, TOP + row * side);
            // A logarithm shows three orders of magnitude.
            let shade = 1.0 + mass.max(1e-3).log10() / 3.0;
            rect(&mut svg, [x, y, side, side], &Scale::Share.colour(shade));
            if visited {
                let inner = side.saturating_sub(1).max(1);
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{inner}\" height=\"{inner}\" fill=\"none\" stroke=\"#e07b00\" stroke-width=\"0.7\"/>"
                );
            }
        }
    }
    svg + "</svg>\n"
}

fn open(width: usize, height: usize, title: &str) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" {FONT}>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    text(&mut svg, 10, 22, "start", title);
    svg
}

fn rect(svg: &mut String, [x, y, width, height]: [usize; 4], colour: &str) {
    // Writing to a string cannot fail.
    let _ =
        writeln!(svg, "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{colour}\"/>");
}

fn text(svg: &mut String, x: usize, y: usize, anchor: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{words}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heatmap_has_a_cell_for_each_value() {
        let rows: Vec<String> = ["a<b", "c"].map(str::to_owned).to_vec();
        let cells = vec![vec![Some(0.0), None], vec![Some(1.0), Some(0.5)]];
        let svg = heatmap("t & u", &["1".to_owned(), "2".to_owned()], &rows, &cells, Scale::Score);
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("t &amp; u") && svg.contains("a&lt;b"));
        for colour in ["#c82828", "#329650", "#fad250", "#dddddd"] {
            assert_eq!(svg.matches(colour).count(), 1, "{colour}");
        }
    }

    #[test]
    fn a_map_frames_what_was_visited_below_the_diagonal() {
        let mass = vec![vec![1.0, 0.0], vec![0.5, 0.5]];
        let svg = attention_map("map", &mass, &[vec![true, true], vec![false, true]]);
        assert_eq!(svg.matches("stroke=").count(), 2);
        assert_eq!(svg.matches("#08306b").count(), 1, "a mass of one is the darkest");
    }
}
