//! Hit rates against capacity as SVG, one line per policy.

use std::fmt::Write as _;

/// One line of the plot.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) name: String,
    /// (tokens of capacity, rate from 0 to 1), ascending.
    pub(super) points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 460.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 48.0;
const BOTTOM: f64 = 48.0;
const COLOURS: [&str; 9] =
    ["#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f", "#e377c2"];

/// The picture; `None` when there is nothing to draw.
pub(super) fn svg(title: &str, lines: &[Line]) -> Option<String> {
    let points = || lines.iter().flat_map(|line| line.points.iter().copied());
    let low = points().map(|point| point.0).reduce(f64::min)?.max(1.0).log2();
    let high = points().map(|point| point.0).reduce(f64::max)?.max(1.0).log2().max(low + 1.0);
    let top = (points().map(|point| point.1).fold(0.0, f64::max) * 10.0).ceil().max(1.0) / 10.0;
    let x = |tokens: f64| LEFT + (tokens.max(1.0).log2() - low) / (high - low) * (WIDTH - LEFT - RIGHT);
    let y = |rate: f64| HEIGHT - BOTTOM - rate / top * (HEIGHT - TOP - BOTTOM);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\"><rect width=\"100%\" height=\"100%\" fill=\"white\"/><text x=\"{LEFT}\" y=\"24\" \
         font-size=\"15\">{}</text>",
        escape(title)
    );
    for tenth in 0..=(top * 10.0).round() as u32 {
        let rate = f64::from(tenth) / 10.0;
        let _ = write!(
            out,
            "<line x1=\"{LEFT}\" y1=\"{0:.1}\" x2=\"{1}\" y2=\"{0:.1}\" stroke=\"#ddd\"/><text x=\"{2}\" y=\"{3:.1}\" \
             text-anchor=\"end\">{4} %</text>",
            y(rate),
            WIDTH - RIGHT,
            LEFT - 6.0,
            y(rate) + 4.0,
            tenth * 10
        );
    }
    if let Some(line) = lines.first() {
        for (tokens, _) in &line.points {
            let _ = write!(
                out,
                "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{:.1}M</text>",
                x(*tokens),
                HEIGHT - BOTTOM + 18.0,
                tokens / 1e6
            );
        }
    }
    for (index, line) in lines.iter().enumerate() {
        draw(&mut out, line, index, x, y);
    }
    out.push_str("</svg>\n");
    Some(out)
}

fn draw(out: &mut String, line: &Line, index: usize, x: impl Fn(f64) -> f64, y: impl Fn(f64) -> f64) {
    let colour = COLOURS[index % COLOURS.len()];
    let path: Vec<String> =
        line.points.iter().map(|(tokens, rate)| format!("{:.1},{:.1}", x(*tokens), y(*rate))).collect();
    let _ = write!(
        out,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/><text x=\"{}\" y=\"{}\" \
         fill=\"{colour}\">{}</text>",
        path.join(" "),
        WIDTH - RIGHT + 10.0,
        TOP + 18.0 * (index as f64 + 1.0),
        escape(&line.name)
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
