//! Bounds-checked reading of GGUF's primitive values. Nothing here allocates in proportion to a number from the file:
//! strings and arrays are borrowed from it.

use crate::files::fault::{Fault, quote};

/// Longest string value, in bytes; chat templates and tokens are far shorter.
const STRING_BYTES_MAX: u64 = 16 << 20;
/// Deepest nesting of arrays.
const ARRAY_DEPTH_MAX: usize = 4;

/// A position in the file's bytes.
#[derive(Debug, Clone)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(crate) fn position(&self) -> usize {
        self.at
    }

    /// Bytes left.
    pub(crate) fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next `count` bytes; the error names `field`.
    pub(crate) fn take(&mut self, count: u64, field: &str) -> Result<&'a [u8], Fault> {
        let available = self.remaining();
        let count = usize::try_from(count).ok().filter(|count| *count <= available).ok_or_else(|| {
            let problem = format!("needs {count} bytes at offset {}, where {available} are left", self.at);
            Fault::corrupt(field, problem)
        })?;
        let taken = &self.bytes[self.at..self.at + count];
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N], Fault> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, field)?);
        Ok(out)
    }

    pub(crate) fn u32(&mut self, field: &str) -> Result<u32, Fault> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    pub(crate) fn u64(&mut self, field: &str) -> Result<u64, Fault> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    /// A count of things that take at least `min_bytes` each; refuses more than can be in the rest of the file.
    pub(crate) fn count(&mut self, min_bytes: u64, field: &str) -> Result<u64, Fault> {
        let count = self.u64(field)?;
        let most = self.remaining() as u64 / min_bytes;
        if count > most {
            return Err(Fault::corrupt(
                field,
                format!("is {count}, where the file has room for {most} at most"),
            ));
        }
        Ok(count)
    }

    /// A string of at most `max_bytes`.
    pub(crate) fn text(&mut self, max_bytes: u64, field: &str) -> Result<&'a str, Fault> {
        let bytes = self.u64(field)?;
        if bytes > max_bytes {
            let problem = format!("is a string of {bytes} bytes, where {max_bytes} are the limit");
            return Err(Fault::corrupt(field, problem));
        }
        let bytes = self.take(bytes, field)?;
        std::str::from_utf8(bytes).map_err(|_| Fault::corrupt(field, "is not valid UTF-8"))
    }

    /// A metadata value of the given type.
    pub(crate) fn value(&mut self, kind: ValueKind, field: &str) -> Result<Value<'a>, Fault> {
        Ok(match kind {
            ValueKind::U8 => Value::Unsigned(self.array::<1>(field)?[0].into()),
            ValueKind::I8 => Value::Signed((self.array::<1>(field)?[0] as i8).into()),
            ValueKind::U16 => Value::Unsigned(u16::from_le_bytes(self.array(field)?).into()),
            ValueKind::I16 => Value::Signed(i16::from_le_bytes(self.array(field)?).into()),
            ValueKind::U32 => Value::Unsigned(self.u32(field)?.into()),
            ValueKind::I32 => Value::Signed(i32::from_le_bytes(self.array(field)?).into()),
            ValueKind::U64 => Value::Unsigned(self.u64(field)?),
            ValueKind::I64 => Value::Signed(i64::from_le_bytes(self.array(field)?)),
            ValueKind::F32 => Value::Float(f32::from_le_bytes(self.array(field)?).into()),
            ValueKind::F64 => Value::Float(f64::from_le_bytes(self.array(field)?)),
            ValueKind::Bool => match self.array::<1>(field)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(Fault::corrupt(field, format!("is a boolean with the value {other}"))),
            },
            ValueKind::Text => Value::Text(self.text(STRING_BYTES_MAX, field)?),
            ValueKind::Array => Value::Array(self.values(1, field)?),
        })
    }

    /// An array, walked once so that reading it later cannot fail.
    fn values(&mut self, depth: usize, field: &str) -> Result<Array<'a>, Fault> {
        if depth > ARRAY_DEPTH_MAX {
            return Err(Fault::corrupt(field, format!("nests arrays deeper than {ARRAY_DEPTH_MAX}")));
        }
        let kind = ValueKind::read(self, field)?;
        let count = self.count(kind.min_bytes(), field)?;
        let start = self.at;
        for _ in 0..count {
            match kind {
                ValueKind::Array => drop(self.values(depth + 1, field)?),
                ValueKind::Text | ValueKind::Bool => drop(self.value(kind, field)?),
                _ => {
                    self.take(count * kind.min_bytes(), field)?;
                    break;
                }
            }
        }
        Ok(Array { kind, count: count as usize, bytes: &self.bytes[start..self.at] })
    }
}

/// Type of a metadata value, numbered as in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ValueKind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

impl ValueKind {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::Text,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    pub(crate) fn read(cursor: &mut Cursor<'_>, field: &str) -> Result<Self, Fault> {
        let id = cursor.u32(field)?;
        Self::ALL.get(id as usize).copied().ok_or_else(|| {
            Fault::corrupt(field, format!("has the unknown value type {id} (0 to 12 are known)"))
        })
    }

    /// Fewest bytes of one value.
    fn min_bytes(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::Text => 8,
            Self::Array => 12,
        }
    }
}

/// A metadata value; text and arrays lie in the file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(&'a str),
    Array(Array<'a>),
}

impl Value<'_> {
    /// For messages.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Unsigned(x) => format!("the integer {x}"),
            Self::Signed(x) => format!("the integer {x}"),
            Self::Float(x) => format!("the number {x}"),
            Self::Bool(x) => format!("the boolean {x}"),
            Self::Text(x) => format!("the string `{}`", quote(x)),
            Self::Array(x) => format!("an array of {} values", x.count),
        }
    }

    /// The value as a count, if it is a non-negative integer.
    pub(crate) fn unsigned(&self) -> Option<u64> {
        match self {
            Self::Unsigned(x) => Some(*x),
            Self::Signed(x) => u64::try_from(*x).ok(),
            _ => None,
        }
    }

    /// The value as a number.
    pub(crate) fn float(&self) -> Option<f64> {
        match self {
            Self::Unsigned(x) => Some(*x as f64),
            Self::Signed(x) => Some(*x as f64),
            Self::Float(x) => Some(*x),
            _ => None,
        }
    }
}

/// A metadata array whose bytes were walked once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Array<'a> {
    kind: ValueKind,
    /// Elements.
    pub(crate) count: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// The elements in order; nested arrays come as arrays.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let (kind, mut cursor) = (self.kind, Cursor::new(self.bytes));
        (0..self.count)
            .map(move |_| cursor.value(kind, "array").expect("the array was walked when it was read"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array_bytes(depth: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 1..depth {
            bytes.extend(9u32.to_le_bytes());
            bytes.extend(1u64.to_le_bytes());
        }
        bytes.extend(5u32.to_le_bytes());
        bytes.extend(2u64.to_le_bytes());
        bytes.extend((-3i32).to_le_bytes());
        bytes.extend(4i32.to_le_bytes());
        bytes
    }

    #[test]
    fn nested_arrays_are_read_to_the_limit() {
        for depth in 1..=6 {
            let bytes = array_bytes(depth);
            let read = Cursor::new(&bytes).value(ValueKind::Array, "k");
            if depth > ARRAY_DEPTH_MAX {
                assert_eq!(read.unwrap_err(), Fault::corrupt("k", "nests arrays deeper than 4"));
                continue;
            }
            let mut value = read.unwrap();
            for _ in 1..depth {
                let Value::Array(array) = value else { panic!("array expected at depth {depth}") };
                value = array.iter().next().unwrap();
            }
            let Value::Array(array) = value else { panic!("array expected") };
            assert_eq!(array.iter().collect::<Vec<_>>(), [Value::Signed(-3), Value::Signed(4)]);
        }
    }

    #[test]
    fn counts_are_checked_against_the_bytes_that_are_left() {
        let mut bytes = (1u64 << 60).to_le_bytes().to_vec();
        bytes.extend([0; 24]);
        let fault = Cursor::new(&bytes).count(8, "n").unwrap_err();
        let expected = "is 1152921504606846976, where the file has room for 3 at most";
        assert_eq!(fault, Fault::corrupt("n", expected));
    }

    #[test]
    fn strings_are_bounded_and_utf8() {
        let mut bytes = 4u64.to_le_bytes().to_vec();
        bytes.extend([0xff; 4]);
        let fault = Cursor::new(&bytes).text(10, "s").unwrap_err();
        assert_eq!(fault, Fault::corrupt("s", "is not valid UTF-8"));
        let fault = Cursor::new(&bytes).text(3, "s").unwrap_err();
        assert_eq!(fault, Fault::corrupt("s", "is a string of 4 bytes, where 3 are the limit"));
        let fault = Cursor::new(&bytes[..9]).text(10, "s").unwrap_err();
        assert_eq!(fault, Fault::corrupt("s", "needs 4 bytes at offset 8, where 1 are left"));
    }
}
