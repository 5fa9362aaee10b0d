//! Stop strings over text that arrives in pieces: holds back what may still become a stop string, byte-exact.

/// Finds the first stop string in a growing text. The match that ends first wins, the longest one where several end
/// together, so that the result does not depend on how the text was cut into pieces.
#[derive(Debug, Clone)]
pub(crate) struct StopFilter {
    stops: Vec<String>,
    held: String,
}

/// What became certain with one piece of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Released {
    /// Text that belongs to the answer for certain.
    pub(crate) text: String,
    /// A stop string was found; it and everything after it is not part of the answer.
    pub(crate) stopped: bool,
}

impl StopFilter {
    /// `stops` must not contain empty strings; the request was checked for that.
    pub(crate) fn new(stops: Vec<String>) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()));
        Self { stops, held: String::new() }
    }

    /// Takes the next piece of text.
    pub(crate) fn push(&mut self, text: &str) -> Released {
        if self.stops.is_empty() {
            return Released { text: text.to_owned(), stopped: false };
        }
        let seen = self.held.len();
        self.held.push_str(text);
        if let Some(start) = self.first_stop(seen) {
            self.held.truncate(start);
            return Released { text: std::mem::take(&mut self.held), stopped: true };
        }
        let keep_from = self.possible_start();
        let rest = self.held.split_off(keep_from);
        Released { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// The text ends here: what was held back is part of the answer after all.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Start of the match that ends first, among those that end after byte `seen`.
    fn first_stop(&self, seen: usize) -> Option<usize> {
        let text = self.held.as_bytes();
        (seen + 1..=text.len()).find_map(|end| {
            let matching = self.stops.iter().filter(|stop| text[..end].ends_with(stop.as_bytes()));
            matching.map(|stop| end - stop.len()).min()
        })
    }

    /// Start of the longest tail that is the beginning of a stop string; the text's length when there is none. Always a
    /// character boundary, because a stop string starts with the first byte of a character.
    fn possible_start(&self) -> usize {
        let text = self.held.as_bytes();
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let first = (text.len() + 1).saturating_sub(longest);
        (first..text.len())
            .find(|&start| self.stops.iter().any(|stop| stop.as_bytes().starts_with(&text[start..])))
            .unwrap_or(text.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Pushes `pieces`, returns (answer, stopped).
    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut filter = StopFilter::new(stops.iter().map(|&s| s.to_owned()).collect());
        let mut answer = String::new();
        for piece in pieces {
            let released = filter.push(piece);
            answer.push_str(&released.text);
            if released.stopped {
                return (answer, true);
            }
        }
        answer.push_str(&filter.finish());
        (answer, false)
    }

    /// Slow and obvious: grow the text byte by byte and look whether it ends with a stop string.
    fn naive(stops: &[String], text: &str) -> (String, bool) {
        for end in 1..=text.len() {
            let mut ending: Vec<_> =
                stops.iter().filter(|stop| text.as_bytes()[..end].ends_with(stop.as_bytes())).collect();
            ending.sort_by_key(|stop| std::cmp::Reverse(stop.len()));
            if let Some(stop) = ending.first() {
                return (text[..end - stop.len()].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    #[test]
    fn cuts_before_a_stop_string_that_spans_pieces() {
        assert_eq!(run(&["STOP"], &["one S", "T", "OP two"]), ("one ".to_owned(), true));
    }

    #[test]
    fn releases_a_false_start() {
        assert_eq!(run(&["STOP"], &["a ST", "ART b"]), ("a START b".to_owned(), false));
        assert_eq!(run(&["aab"], &["a", "a", "a", "b", "c"]), ("a".to_owned(), true));
    }

    #[test]
    fn releases_what_is_held_at_the_end() {
        assert_eq!(run(&["\n\n"], &["line\n"]), ("line\n".to_owned(), false));
    }

    #[test]
    fn holds_back_no_more_than_needed() {
        let mut filter = StopFilter::new(vec!["xyz".to_owned()]);
        assert_eq!(filter.push("abx").text, "ab");
        assert_eq!(filter.push("q").text, "xq");
    }

    #[test]
    fn keeps_characters_whole() {
        assert_eq!(run(&["é!"], &["caf", "é", "!"]), ("caf".to_owned(), true));
        assert_eq!(run(&["é!"], &["caf", "é", "?"]), ("café?".to_owned(), false));
    }

    proptest! {
        #[test]
        fn agrees_with_naive_search(
            text in "[abé]{0,40}",
            stops in prop::collection::vec("[abé]{1,5}", 0..4),
            cuts in prop::collection::vec(0usize..40, 0..12),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|&c| c <= text.len() && text.is_char_boundary(c)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let names: Vec<&str> = stops.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&names, &pieces), naive(&stops, &text));
        }
    }
}
