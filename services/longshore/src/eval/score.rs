//! Scores as the papers define them.

use serde::Serialize;

/// How an answer is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Metric {
    /// The share of the references that the answer contains (RULER's `string_match_all`).
    All,
    /// 1 when the answer contains one of them (RULER's `string_match_part`).
    Part,
}

impl Metric {
    /// From 0 to 1; upper and lower case are equal.
    pub(super) fn score(self, answer: &str, references: &[String]) -> f64 {
        let answer = answer.to_lowercase();
        let found = references.iter().filter(|reference| answer.contains(&reference.to_lowercase())).count();
        match self {
            Self::All => found as f64 / references.len().max(1) as f64,
            Self::Part => f64::from(u8::from(found > 0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_those_of_the_definitions() {
        let references = ["12", "Ab", "zz", "9"].map(str::to_owned);
        assert_eq!(Metric::All.score("is 12 and aB.", &references), 0.5);
        assert_eq!(Metric::Part.score("is 12 and aB.", &references), 1.0);
        assert_eq!((Metric::All.score("", &references), Metric::Part.score("x", &references)), (0.0, 0.0));
        assert_eq!(Metric::All.score("9 zz ab 12", &references), 1.0);
    }
}
