//! The bytes of every token, in one allocation.

use std::collections::HashMap;

/// How a vocabulary writes bytes as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// GPT-2: each byte is a printable character.
    ByteLevel,
    /// SentencePiece: `▁` is a space and `<0x0A>` is a byte.
    SentencePiece,
}

/// What one token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// A spelled piece of text.
    Text,
    /// Text as it is.
    Literal,
    /// Stands for something other than text; its name is literal.
    Control,
    /// A hole in the vocabulary.
    Unused,
}

/// Bytes and role of every token.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    bytes: Vec<u8>,
    /// End of each token's bytes.
    ends: Vec<usize>,
    control: Vec<bool>,
    longest: usize,
}

impl Pieces {
    /// Spells tokens out, in the order of their ids.
    pub(crate) fn new<'a>(spelling: Spelling, tokens: impl Iterator<Item = (&'a str, Role)>) -> Self {
        let byte_of = byte_level_bytes();
        let mut pieces = Self::default();
        for (text, role) in tokens {
            let start = pieces.bytes.len();
            match (role, spelling) {
                (Role::Text, Spelling::ByteLevel) => push_byte_level(&mut pieces.bytes, text, &byte_of),
                (Role::Text, Spelling::SentencePiece) => push_sentence_piece(&mut pieces.bytes, text),
                (Role::Literal | Role::Control, _) => pieces.bytes.extend(text.as_bytes()),
                (Role::Unused, _) => {}
            }
            pieces.longest = pieces.longest.max(pieces.bytes.len() - start);
            pieces.ends.push(pieces.bytes.len());
            pieces.control.push(role == Role::Control);
        }
        pieces
    }

    /// Tokens.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Bytes of a token; empty outside the vocabulary.
    pub(crate) fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..*end]
    }

    /// Whether a token is control.
    pub(crate) fn is_control(&self, id: u32) -> bool {
        self.control.get(id as usize).copied().unwrap_or(false)
    }

    /// Bytes of the longest token.
    pub(crate) fn longest(&self) -> usize {
        self.longest
    }
}

/// GPT-2's table: printable Latin-1 bytes stand for themselves, the others for U+0100 and up in their order.
pub(crate) fn byte_level_chars() -> [char; 256] {
    let mut next = 256;
    std::array::from_fn(|byte| {
        let printable = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if printable {
            byte as u32
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).expect("codes below 0x200 are characters")
    })
}

fn byte_level_bytes() -> HashMap<char, u8> {
    byte_level_chars().into_iter().zip(0..=255).collect()
}

/// A token with a character outside the table is taken literally, as other runtimes do.
fn push_byte_level(out: &mut Vec<u8>, text: &str, byte_of: &HashMap<char, u8>) {
    let start = out.len();
    for character in text.chars() {
        let Some(byte) = byte_of.get(&character) else {
            out.truncate(start);
            out.extend(text.as_bytes());
            return;
        };
        out.push(*byte);
    }
}

fn push_sentence_piece(out: &mut Vec<u8>, text: &str) {
    match byte_token(text) {
        Some(byte) => out.push(byte),
        None => out.extend(text.replace('▁', " ").as_bytes()),
    }
}

/// The byte that `<0x0A>` stands for.
pub(crate) fn byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_table_is_a_bijection_with_the_known_ends() {
        let chars = byte_level_chars();
        assert_eq!(byte_level_bytes().len(), 256);
        // Known from GPT-2's vocabulary: space, newline, NUL and DEL.
        assert_eq!(
            (chars[b' ' as usize], chars[b'\n' as usize], chars[0], chars[0x7f]),
            ('Ġ', 'Ċ', 'Ā', 'ġ')
        );
        assert_eq!((chars[b'A' as usize], chars[0xad]), ('A', 'Ń'));
    }

    #[test]
    fn pieces_are_spelled_out_by_role() {
        let tokens = [
            ("Ġhi", Role::Text),
            ("Ã©", Role::Text),
            ("日", Role::Text),
            ("Ġraw", Role::Literal),
            ("<s>", Role::Control),
            ("[PAD]", Role::Unused),
        ];
        let pieces = Pieces::new(Spelling::ByteLevel, tokens.into_iter());
        let all: Vec<&[u8]> = (0..8).map(|id| pieces.get(id)).collect();
        let expected: [&[u8]; 8] =
            [b" hi", "é".as_bytes(), "日".as_bytes(), "Ġraw".as_bytes(), b"<s>", b"", b"", b""];
        assert_eq!(all, expected);
        assert!(pieces.is_control(4) && !pieces.is_control(0) && !pieces.is_control(99));
        assert_eq!((pieces.len(), pieces.longest()), (6, 5));
    }

    #[test]
    fn sentence_pieces_know_spaces_and_bytes() {
        let tokens =
            [("▁a▁b", Role::Text), ("<0x0A>", Role::Text), ("<0xZZ>", Role::Text), ("<0x+1>", Role::Text)];
        let pieces = Pieces::new(Spelling::SentencePiece, tokens.into_iter());
        assert_eq!(pieces.get(0), b" a b");
        assert_eq!(pieces.get(1), b"\n");
        assert_eq!(pieces.get(2), b"<0xZZ>");
        assert_eq!(pieces.get(3), b"<0x+1>");
    }
}
