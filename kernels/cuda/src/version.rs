//! Versions of CUDA.

use std::fmt;

/// A version of CUDA: of a driver (the newest that it knows), a compiler, a library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Before the point.
    pub major: u32,
    /// Behind the point.
    pub minor: u32,
}

impl Version {
    /// `major.minor`.
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    /// As the driver writes it: 1000 × major + 10 × minor.
    pub const fn of_driver(number: u32) -> Self {
        Self::new(number / 1000, number % 1000 / 10)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_the_driver_are_versions() {
        assert_eq!(Version::of_driver(13_000), Version::new(13, 0));
        assert_eq!(Version::of_driver(12_080).to_string(), "12.8");
        assert!(Version::new(12, 8) < Version::new(13, 0));
    }
}
