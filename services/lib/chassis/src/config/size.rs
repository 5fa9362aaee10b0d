//! Numbers of bytes as people write them.

/// Units and the powers of two that they stand for. Those without an `i` mean the same: nobody sizes memory in powers of ten.
const UNITS: [(&str, u32); 14] = [
    ("", 0),
    ("b", 0),
    ("k", 10),
    ("ki", 10),
    ("kib", 10),
    ("m", 20),
    ("mi", 20),
    ("mib", 20),
    ("g", 30),
    ("gi", 30),
    ("gib", 30),
    ("t", 40),
    ("ti", 40),
    ("tib", 40),
];

/// Reads `34359738368`, `32GiB`, `32 GiB` or `1.5g`; units are powers of 1024. The problem is a verb phrase.
pub fn bytes(text: &str) -> Result<u64, String> {
    let form = || "must be a number of bytes, as `34359738368`, or one with a unit: KiB, MiB, GiB or TiB, as `32GiB`";
    let text = text.trim();
    let digits = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
    let (number, unit) = (&text[..digits], text[digits..].trim().to_ascii_lowercase());
    let power = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, power)| *power).ok_or_else(form)?;
    if let Ok(whole) = number.parse::<u64>() {
        let bytes = whole.checked_mul(1 << power);
        return bytes.ok_or_else(|| format!("is more than {} bytes; it {}", u64::MAX, form()));
    }
    let value = number.parse::<f64>().map_err(|_| form())? * (1u64 << power) as f64;
    if power == 0 || value.fract() != 0.0 || value >= u64::MAX as f64 {
        return Err(format!("is no whole number of bytes; it {}", form()));
    }
    Ok(value as u64)
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn units_are_powers_of_two_in_any_spelling() {
        for (text, expected) in [
            ("0", 0),
            ("34359738368", 32 << 30),
            ("32GiB", 32 << 30),
            ("32 gib", 32 << 30),
            ("32g", 32 << 30),
            ("32Gi", 32 << 30),
            ("1.5MiB", 3 << 19),
            ("2TiB", 2 << 40),
            ("7kib", 7 << 10),
            ("9B", 9),
        ] {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn anything_else_is_told_the_forms() {
        for text in ["", "GiB", "1XB", "1GB", "-1", "1.5", "0.3KiB", "1e9", "99999999999TiB", "..5g", "1 2"] {
            let error = bytes(text).unwrap_err();
            assert!(error.contains("`34359738368`") && error.contains("`32GiB`"), "{text}: {error}");
        }
    }
}
