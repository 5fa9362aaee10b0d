//! Secrets of tile connections.

use std::{fmt, hint::black_box};

use crate::{Code, Error};

/// 128 random bits.
#[derive(Clone, Copy)]
pub(crate) struct Token([u8; Self::BYTES]);

impl Token {
    pub(crate) const BYTES: usize = 16;

    /// A new one, of the system's random numbers.
    pub(crate) fn fresh() -> Result<Self, Error> {
        let mut bytes = [0; Self::BYTES];
        // So few bytes come whole or not at all.
        match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) {
            Ok(Self::BYTES) => Ok(Self(bytes)),
            _ => Err(Error::new(Code::Internal, "the system gives no random numbers")),
        }
    }

    /// What a peer sent as one; `None` when it is not as long.
    pub(crate) fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    pub(crate) fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// Whether both are the same, in a time that does not tell how far they are.
    pub(crate) fn matches(&self, other: &Self) -> bool {
        let differing = self.0.iter().zip(&other.0).fold(0, |all, (a, b)| black_box(all | (a ^ b)));
        black_box(differing) == 0
    }
}

/// Secrets stay out of logs.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_differ_and_match_themselves_only() {
        let (a, b) = (Token::fresh().unwrap(), Token::fresh().unwrap());
        assert!(a.matches(&a) && b.matches(&b) && !a.matches(&b));
        for bit in 0..128 {
            let mut bytes = *a.as_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(!a.matches(&Token(bytes)), "bit {bit}");
        }
        assert!(Token::from_slice(&[0; 15]).is_none() && Token::from_slice(&[0; 17]).is_none());
        assert_eq!(format!("{a:?}"), "Token");
    }
}
