//! Named arrays in a file: the magic, for inputs and then for results the number of arrays, and of each its name and its bytes, lengths
//! as u32, all little-endian; in the end the BLAKE3 digest of all that.

use bytemuck::Pod;

use crate::Error;

const MAGIC: &[u8; 8] = b"LSREC\x00\x00\x01";
const DIGEST_BYTES: usize = 32;

/// A name and bytes.
type Array = (String, Vec<u8>);

/// Arrays by name, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Arrays(Vec<Array>);

impl Arrays {
    /// One more array.
    pub(super) fn with<T: Pod>(mut self, name: &str, elements: &[T]) -> Self {
        self.0.push((name.to_owned(), bytemuck::cast_slice(elements).to_vec()));
        self
    }

    /// The elements of an array. Refuses a name that is not there, and bytes that are no whole elements.
    pub(super) fn get<T: Pod>(&self, name: &str) -> Result<Vec<T>, Error> {
        let found = self.0.iter().find(|(own, _)| own == name);
        let (_, bytes) = found.ok_or_else(|| broken(format!("has no array `{name}`")))?;
        if !bytes.len().is_multiple_of(size_of::<T>()) {
            return Err(broken(format!("has {} bytes of `{name}`, no whole elements", bytes.len())));
        }
        let mut elements = vec![T::zeroed(); bytes.len() / size_of::<T>()];
        bytemuck::cast_slice_mut(&mut elements).copy_from_slice(bytes);
        Ok(elements)
    }

    /// Bytes that are others in `found`; infinite where arrays have other names or lengths.
    pub(super) fn differing(&self, found: &Self) -> f64 {
        let same_form = |((a, x), (b, y)): (&Array, &Array)| a == b && x.len() == y.len();
        if self.0.len() != found.0.len() || !self.0.iter().zip(&found.0).all(same_form) {
            return f64::INFINITY;
        }
        let pairs = self.0.iter().zip(&found.0).flat_map(|((_, own), (_, other))| own.iter().zip(other));
        pairs.filter(|(own, other)| own != other).count() as f64
    }

    fn write(&self, to: &mut Vec<u8>) {
        let mut part = |bytes: &[u8]| {
            to.extend((bytes.len() as u32).to_le_bytes());
            to.extend(bytes);
        };
        for (name, bytes) in &self.0 {
            part(name.as_bytes());
            part(bytes);
        }
    }
}

/// A file.
pub(super) fn written(inputs: &Arrays, results: &Arrays) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    for arrays in [inputs, results] {
        bytes.extend((arrays.0.len() as u32).to_le_bytes());
        arrays.write(&mut bytes);
    }
    let digest = blake3::hash(&bytes);
    bytes.extend(digest.as_bytes());
    bytes
}

/// Inputs and results of a file; refuses one that is damaged.
pub(super) fn read(name: &str, bytes: &[u8]) -> Result<(Arrays, Arrays), Error> {
    let parsed = || {
        let (content, digest) = bytes.split_at_checked(bytes.len().checked_sub(DIGEST_BYTES)?)?;
        let mut rest = content.strip_prefix(MAGIC).filter(|_| blake3::hash(content).as_bytes() == digest)?;
        let both = (arrays(&mut rest)?, arrays(&mut rest)?);
        rest.is_empty().then_some(both)
    };
    parsed().ok_or_else(|| broken(format!("`{name}` is damaged; hint: take it from the repository again")))
}

fn arrays(rest: &mut &[u8]) -> Option<Arrays> {
    let count = number(rest)?;
    let mut arrays = Arrays::default();
    for _ in 0..count {
        let name = String::from_utf8(part(rest)?.to_vec()).ok()?;
        arrays.0.push((name, part(rest)?.to_vec()));
    }
    Some(arrays)
}

fn number(rest: &mut &[u8]) -> Option<usize> {
    let (number, after) = rest.split_first_chunk::<4>()?;
    *rest = after;
    usize::try_from(u32::from_le_bytes(*number)).ok()
}

fn part<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let bytes = number(rest)?;
    let (part, after) = rest.split_at_checked(bytes)?;
    *rest = after;
    Some(part)
}

fn broken(problem: String) -> Error {
    Error::Invalid { field: "recorded", problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_damage_is_refused() {
        let inputs = Arrays::default().with("numbers", &[1.5_f32, -2.0]).with("none", &[0_u64; 0]);
        let results = Arrays::default().with("tokens", &[7_u32]);
        let bytes = written(&inputs, &results);
        assert_eq!(read("x", &bytes).unwrap(), (inputs.clone(), results.clone()));
        assert_eq!(inputs.get::<f32>("numbers").unwrap(), [1.5, -2.0]);
        assert!(inputs.get::<u64>("none").unwrap().is_empty());
        assert!(inputs.get::<u32>("tokens").is_err() && results.get::<u64>("tokens").is_err());
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(read("x", &damaged).is_err() && read("x", &bytes[..at]).is_err(), "{at}");
        }
        let other = Arrays::default().with("tokens", &[7_u32 ^ 0x0101]);
        assert_eq!((results.differing(&results), results.differing(&other)), (0.0, 2.0));
        assert_eq!(results.differing(&inputs), f64::INFINITY);
        assert_eq!(results.differing(&Arrays::default().with("tokens", &[7_u64])), f64::INFINITY);
    }
}
