//! What parsers say of numbers, in words that people know.

/// Names that Rust has for numbers, and what they take.
const NUMBERS: [(&str, &str); 7] = [
    ("expected u16", "expected a whole number from 0 to 65535"),
    ("expected u32", "expected a whole number from 0 to 4294967295"),
    ("expected u64", "expected a whole number, not negative"),
    ("expected usize", "expected a whole number, not negative"),
    ("expected i64", "expected a whole number"),
    ("expected f32", "expected a number"),
    ("expected f64", "expected a number"),
];

/// `told` without names of Rust's types of numbers.
pub fn plain_numbers(told: &str) -> String {
    NUMBERS.iter().fold(told.to_owned(), |told, (rust, words)| told.replace(rust, words))
}
