//! Text of a growing sequence of tokens, without ever showing half a character.

use crate::Tokenizer;

/// Incremental detokenizer. Everything that [`Self::push`] and [`Self::finish`] give, put together, is what
/// [`Tokenizer::decode`] gives for all tokens at once.
#[derive(Debug, Clone, Default)]
pub struct TextStream {
    /// Start of a character whose end has not come; at most three bytes between calls.
    pending: Vec<u8>,
}

impl TextStream {
    /// Nothing decoded yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a token and gives the text that is complete now; bytes that can never be UTF-8 come as U+FFFD.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        self.push_bytes(tokenizer.piece(id))
    }

    /// Adds raw bytes, as [`Self::push`] does.
    pub fn push_bytes(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut kept = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            // Only at the very end can a chunk be the start of a character, and then more bytes would still fit it.
            let at_end = chunk_ends(&self.pending, invalid);
            if at_end && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none()) {
                kept = invalid.len();
            } else if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..self.pending.len() - kept);
        text
    }

    /// The rest: U+FFFD when the last character never became complete.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}

/// Whether `part` is the last part of `whole`.
fn chunk_ends(whole: &[u8], part: &[u8]) -> bool {
    std::ptr::eq(whole.as_ptr_range().end, part.as_ptr_range().end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn half_a_character_is_never_shown() {
        let mut stream = TextStream::new();
        let bytes = "a😀é".as_bytes();
        let shown: Vec<String> = bytes.iter().map(|byte| stream.push_bytes(&[*byte])).collect();
        assert_eq!(shown, ["a", "", "", "", "😀", "", "é"]);
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn hopeless_bytes_become_replacement_characters_at_once() {
        let mut stream = TextStream::new();
        assert_eq!(stream.push_bytes(&[0xff]), "\u{fffd}");
        assert_eq!(stream.push_bytes(&[0xe2, 0x82]), "");
        assert_eq!(stream.push_bytes(b"x"), "\u{fffd}x");
        assert_eq!(stream.push_bytes(&[0xf0, 0x9f]), "");
        assert_eq!(stream.finish(), "\u{fffd}");
    }

    proptest! {
        #[test]
        fn pieces_together_are_the_whole(
            pieces in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 0..6),
                    any::<String>().prop_map(String::into_bytes),
                    prop::sample::select("é€😀ab\u{301}".as_bytes().to_vec()).prop_map(|byte| vec![byte]),
                ],
                0..40,
            )
        ) {
            let mut stream = TextStream::new();
            let mut text: String = String::new();
            for piece in &pieces {
                text.push_str(&stream.push_bytes(piece));
                prop_assert!(stream.pending.len() < 4);
            }
            text.push_str(&stream.finish());
            prop_assert_eq!(text, String::from_utf8_lossy(&pieces.concat()).into_owned());
        }
    }
}
