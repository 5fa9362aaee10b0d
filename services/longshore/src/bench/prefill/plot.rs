//! A log-log plot as SVG: seconds against prompt length, one line per policy.

use std::fmt::Write as _;

/// One line of the plot.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) name: String,
    /// (tokens, seconds), all above 0.
    pub(super) points: Vec<(f64, f64)>,
    /// Drawn dashed.
    pub(super) dashed: bool,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 460.0;
const MARGIN: f64 = 64.0;
const COLOURS: [&str; 6] = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf"];

/// Powers of `base` that enclose all values.
fn range(values: impl Iterator<Item = f64>, base: f64) -> Option<(i32, i32)> {
    let logs: Vec<f64> = values.filter(|value| *value > 0.0).map(|value| value.log(base)).collect();
    let low = logs.iter().copied().reduce(f64::min)?.floor() as i32;
    let high = logs.iter().copied().reduce(f64::max)?.ceil() as i32;
    Some((low, high.max(low + 1)))
}

/// The picture; `None` when there is nothing to draw.
pub(super) fn svg(title: &str, lines: &[Line]) -> Option<String> {
    let all = || lines.iter().flat_map(|line| line.points.iter().copied());
    let (left, right) = range(all().map(|point| point.0), 2.0)?;
    let (bottom, top) = range(all().map(|point| point.1), 10.0)?;
    let x = |log: f64| MARGIN + (log - f64::from(left)) / f64::from(right - left) * (WIDTH - 2.0 * MARGIN);
    let y = |log: f64| {
        HEIGHT - MARGIN - (log - f64::from(bottom)) / f64::from(top - bottom) * (HEIGHT - 2.0 * MARGIN)
    };
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\"><rect width=\"100%\" height=\"100%\" fill=\"white\"/><text x=\"{MARGIN}\" y=\"28\" \
         font-size=\"15\">{}</text>",
        escape(title)
    );
    for power in left..=right {
        let (at, tokens) = (x(f64::from(power)), 2f64.powi(power));
        let _ = write!(
            out,
            "<line x1=\"{at:.1}\" y1=\"{MARGIN}\" x2=\"{at:.1}\" y2=\"{:.1}\" stroke=\"#ddd\"/><text x=\"{at:.1}\" \
             y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            HEIGHT - MARGIN,
            HEIGHT - MARGIN + 18.0,
            if tokens >= 1024.0 { format!("{}K", tokens / 1024.0) } else { format!("{tokens}") }
        );
    }
    for power in bottom..=top {
        let at = y(f64::from(power));
        let _ = write!(
            out,
            "<line x1=\"{MARGIN}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/><text x=\"{:.1}\" \
             y=\"{:.1}\" text-anchor=\"end\">{} s</text>",
            WIDTH - MARGIN,
            MARGIN - 6.0,
            at + 4.0,
            10f64.powi(power)
        );
    }
    for (index, line) in lines.iter().enumerate() {
        draw(&mut out, line, index, x, y);
    }
    out.push_str("</svg>\n");
    Some(out)
}

fn draw(out: &mut String, line: &Line, index: usize, x: impl Fn(f64) -> f64, y: impl Fn(f64) -> f64) {
    let colour = COLOURS[index % COLOURS.len()];
    let points = line.points.iter().filter(|(tokens, seconds)| *tokens > 0.0 && *seconds > 0.0);
    let places: Vec<(f64, f64)> =
        points.map(|(tokens, seconds)| (x(tokens.log2()), y(seconds.log10()))).collect();
    let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let dash = if line.dashed { " stroke-dasharray=\"6 4\"" } else { "" };
    let _ = write!(
        out,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>",
        path.join(" ")
    );
    for (x, y) in places {
        let _ = write!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"/>");
    }
    let at = MARGIN + 16.0 * (index as f64 + 1.0);
    let _ = write!(
        out,
        "<text x=\"{:.1}\" y=\"{at:.1}\" fill=\"{colour}\">{}</text>",
        MARGIN + 12.0,
        escape(&line.name)
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_lie_where_their_values_are() {
        let line =
            Line { name: "a<b".to_owned(), points: vec![(1024.0, 1.0), (4096.0, 100.0)], dashed: false };
        let picture = svg("time & length", &[line]).expect("two points are enough");
        // 1,024 tokens at the left edge, 1 s at the bottom; 4,096 tokens at the right, 100 s at the top.
        assert!(picture.contains("points=\"64.0,396.0 696.0,64.0\""), "{picture}");
        assert!(picture.contains("time &amp; length") && picture.contains("a&lt;b"));
    }

    #[test]
    fn nothing_makes_no_picture() {
        assert!(svg("empty", &[]).is_none());
        let zero = Line { name: "zero".to_owned(), points: vec![(0.0, 0.0)], dashed: true };
        assert!(svg("zero", &[zero]).is_none());
    }
}
