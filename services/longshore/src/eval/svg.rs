//! Pictures as SVG, drawn without a library.

mod attention;
mod heatmap;

use std::fmt::Write;

pub(super) use attention::AttentionMap;
pub(super) use heatmap::Heatmap;

/// What the colours of a picture mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scale {
    /// From red (0) to green (1).
    Score,
    /// From white (0) to blue (1).
    Share,
    /// From green (0) to red (1).
    Error,
}

type Colour = [f64; 3];

const RED: Colour = [200.0, 40.0, 40.0];
const YELLOW: Colour = [250.0, 210.0, 80.0];
const GREEN: Colour = [50.0, 150.0, 80.0];
const WHITE: Colour = [247.0, 251.0, 255.0];
const MIDDLE_BLUE: Colour = [107.0, 174.0, 214.0];
const BLUE: Colour = [8.0, 48.0, 107.0];

impl Scale {
    fn mix(self, value: f64) -> Colour {
        let value = value.clamp(0.0, 1.0);
        let ends = |low, middle, high| {
            if value < 0.5 { (low, middle, value * 2.0) } else { (middle, high, value * 2.0 - 1.0) }
        };
        let (from, to, share): (Colour, Colour, f64) = match self {
            Self::Score => ends(RED, YELLOW, GREEN),
            Self::Error => ends(GREEN, YELLOW, RED),
            Self::Share => ends(WHITE, MIDDLE_BLUE, BLUE),
        };
        [0, 1, 2].map(|i| from[i] + (to[i] - from[i]) * share)
    }

    fn colour(self, value: f64) -> String {
        let [r, g, b] = self.mix(value).map(|part| part.round() as u8);
        format!("#{r:02x}{g:02x}{b:02x}")
    }

    /// What can be read on the colour of a value.
    fn ink(self, value: f64) -> &'static str {
        let [r, g, b] = self.mix(value);
        if 0.299 * r + 0.587 * g + 0.114 * b < 140.0 { "#ffffff" } else { "#222222" }
    }
}

/// Where words begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Anchor {
    Start,
    Middle,
    End,
}

/// A picture under way. Lengths in pixels.
#[derive(Debug)]
struct Canvas(String);

/// Width of a character, about.
const CHARACTER: usize = 7;

impl Canvas {
    fn new(width: usize, height: usize, title: &str) -> Self {
        let mut canvas = Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
             font-family=\"DejaVu Sans, Helvetica, sans-serif\" font-size=\"12\" fill=\"#222222\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        ));
        canvas.put(format_args!(
            "<text x=\"12\" y=\"24\" font-size=\"15\" font-weight=\"bold\">{}</text>",
            escape(title)
        ));
        canvas
    }

    fn put(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "{line}");
    }

    fn rect(&mut self, [x, y, width, height]: [usize; 4], colour: &str) {
        self.put(format_args!(
            "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{colour}\"/>"
        ));
    }

    fn text(&mut self, x: usize, y: usize, anchor: Anchor, words: &str) {
        self.inked(x, y, anchor, "#222222", words);
    }

    fn inked(&mut self, x: usize, y: usize, anchor: Anchor, ink: &str, words: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let words = escape(words);
        self.put(format_args!(
            "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\" fill=\"{ink}\">{words}</text>"
        ));
    }

    /// Words that run upwards, in the middle of `y`.
    fn upright(&mut self, x: usize, y: usize, words: &str) {
        let words = escape(words);
        self.put(format_args!(
            "<text x=\"{x}\" y=\"{y}\" text-anchor=\"middle\" transform=\"rotate(-90 {x} {y})\">{words}</text>"
        ));
    }

    /// A bar of the scale's colours with what its ends mean.
    fn legend(&mut self, [x, y]: [usize; 2], scale: Scale, low: &str, high: &str) {
        let (steps, wide) = (24, 5);
        self.text(x, y + 11, Anchor::End, low);
        for step in 0..steps {
            let value = step as f64 / (steps - 1) as f64;
            self.rect([x + 6 + step * wide, y, wide, 13], &scale.colour(value));
        }
        self.text(x + 12 + steps * wide, y + 11, Anchor::Start, high);
    }

    fn finish(self) -> String {
        self.0 + "</svg>\n"
    }
}

fn escape(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_have_their_ends() {
        assert_eq!(
            (Scale::Score.colour(0.0), Scale::Score.colour(2.0)),
            ("#c82828".into(), "#329650".into())
        );
        assert_eq!(Scale::Error.colour(0.0), Scale::Score.colour(1.0));
        assert_eq!((Scale::Share.ink(0.0), Scale::Share.ink(1.0)), ("#222222", "#ffffff"));
    }

    #[test]
    fn words_are_escaped() {
        let mut canvas = Canvas::new(10, 10, "a & b");
        canvas.text(1, 2, Anchor::End, "<c>");
        let svg = canvas.finish();
        assert!(svg.contains("a &amp; b") && svg.contains("&lt;c&gt;") && svg.ends_with("</svg>\n"));
    }
}
