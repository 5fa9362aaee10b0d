//! Bodies of tiles: where their bytes lie until somebody copies them to where they will stay.

use std::{
    any::Any,
    fmt,
    ops::Deref,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use longshore_blocks::{copy_crc32c, crc32c, fill_crc32c};

use super::HeadPart;
use crate::WireError;

/// Bytes that may be copied but never read in place, because another process can write to them at any time.
pub trait ForeignBytes: Send + Sync {
    /// How many there are.
    fn bytes(&self) -> usize;
    /// Copies those from `offset` on to all of `into`.
    ///
    /// # Panics
    /// Beyond the end.
    fn copy_to(&self, offset: usize, into: &mut [u8]);
}

/// Memory in which a lane puts the bodies of tiles that arrive, so that nobody has to copy them once more.
pub trait TileMemory: Send + Sync + fmt::Debug {
    /// Room for a body of `bytes`, exactly as long. `None`: the lane takes memory of its own, and the body has to be copied out of it.
    fn room(&self, bytes: usize) -> Option<Box<dyn TileRoom>>;
}

/// Room for one body.
pub trait TileRoom: AsRef<[u8]> + AsMut<[u8]> + Send + Sync + 'static {
    /// The same, as whatever it is.
    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
}

impl<T: AsRef<[u8]> + AsMut<[u8]> + Send + Sync + 'static> TileRoom for T {
    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// Lends a room as bytes.
struct Lent(Arc<dyn TileRoom>);

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

/// Body of a tile: contiguous, in the pieces in which it came, in memory shared with its sender, or where its receiver wanted it. Its checksum was not verified
/// yet: [`Self::copy_to`] tells that of the copy, which is what may be used. Cheap to clone. Dereferences to all of its bytes, which
/// first gathers them in private memory where they are not contiguous: for tests and rare paths.
#[derive(Clone)]
pub struct TileData {
    source: Source,
    gathered: OnceLock<Bytes>,
    held: Option<Arc<dyn Any + Send + Sync>>,
    heads: Option<Arc<HeadPart>>,
}

#[derive(Clone)]
enum Source {
    Whole(Bytes),
    Pieces { pieces: Arc<[Bytes]>, bytes: usize },
    Foreign(Arc<dyn ForeignBytes>),
    Landed { room: Arc<dyn TileRoom>, crc32c: u32 },
}

impl TileData {
    /// A body that came in pieces.
    pub fn from_pieces(mut pieces: Vec<Bytes>) -> Self {
        pieces.retain(|piece| !piece.is_empty());
        match pieces.len() {
            0 => Self::of(Source::Whole(Bytes::new())),
            1 => Self::of(Source::Whole(pieces.swap_remove(0))),
            _ => {
                let bytes = pieces.iter().map(Bytes::len).sum();
                Self::of(Source::Pieces { pieces: pieces.into(), bytes })
            }
        }
    }

    /// A body in memory that its sender may still write to.
    pub fn from_foreign(foreign: Arc<dyn ForeignBytes>) -> Self {
        Self::of(Source::Foreign(foreign))
    }

    /// A body that was read into `room`. `crc32c` is that of what was written there.
    pub fn from_landed(room: Box<dyn TileRoom>, crc32c: u32) -> Self {
        Self::of(Source::Landed { room: room.into(), crc32c })
    }

    /// The memory that a body was read into, and the CRC-32C of what was written there, where it is a `T` of its receiver.
    pub fn landed<T: Send + Sync + 'static>(&self) -> Option<(Arc<T>, u32)> {
        match &self.source {
            Source::Landed { room, crc32c } => Some((Arc::clone(room).into_any().downcast().ok()?, *crc32c)),
            Source::Whole(_) | Source::Pieces { .. } | Source::Foreign(_) => None,
        }
    }

    fn of(source: Source) -> Self {
        Self { source, gathered: OnceLock::new(), held: None, heads: None }
    }

    /// The same body, which is not a whole tile but some KV heads of one.
    pub fn of_heads(self, part: HeadPart) -> Self {
        Self { heads: Some(Arc::new(part)), ..self }
    }

    /// Which KV heads of its tile the body has, when it is not a whole tile.
    pub fn heads(&self) -> Option<&HeadPart> {
        self.heads.as_deref()
    }

    /// The same body, keeping `guard` until its last clone is dropped.
    pub fn holding(self, guard: impl Any + Send + Sync) -> Self {
        Self { held: Some(Arc::new((self.held, guard))), ..self }
    }

    /// Bytes of the body.
    pub fn len(&self) -> usize {
        match &self.source {
            Source::Whole(bytes) => bytes.len(),
            Source::Pieces { bytes, .. } => *bytes,
            Source::Foreign(foreign) => foreign.bytes(),
            Source::Landed { room, .. } => (**room).as_ref().len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies the body and returns the CRC-32C of the copy. Refuses an `into` of another length and then writes nothing.
    pub fn copy_to(&self, into: &mut [u8]) -> Result<u32, WireError> {
        if into.len() != self.len() {
            let problem = format!("has {} bytes, its shape needs {}", self.len(), into.len());
            return Err(WireError::invalid("data", problem));
        }
        Ok(match &self.source {
            Source::Whole(bytes) => copy_crc32c(0, into, bytes),
            Source::Pieces { pieces, .. } => {
                let mut left = into;
                pieces.iter().fold(0, |crc, piece| {
                    let (part, rest) = std::mem::take(&mut left).split_at_mut(piece.len());
                    left = rest;
                    copy_crc32c(crc, part, piece)
                })
            }
            Source::Foreign(foreign) => fill_crc32c(0, into, |offset, part| foreign.copy_to(offset, part)),
            Source::Landed { room, .. } => copy_crc32c(0, into, (**room).as_ref()),
        })
    }

    /// Whether the bytes have this CRC-32C. Only what was copied before is proof for memory that its sender may still write to.
    pub fn matches(&self, expected: u32) -> bool {
        crc32c(self) == expected
    }

    /// All bytes in one piece; without a copy where they are in one piece.
    pub fn contiguous(&self) -> &Bytes {
        match &self.source {
            Source::Whole(bytes) => bytes,
            Source::Pieces { .. } | Source::Foreign(_) => self.gathered.get_or_init(|| {
                let mut all = vec![0; self.len()];
                self.copy_to(&mut all).expect("the lengths are equal");
                all.into()
            }),
            Source::Landed { room, .. } => {
                self.gathered.get_or_init(|| Bytes::from_owner(Lent(Arc::clone(room))))
            }
        }
    }

    /// The bytes in the pieces in which they lie, for whoever sends them on.
    pub fn pieces(&self) -> Vec<Bytes> {
        match &self.source {
            Source::Pieces { pieces, .. } => pieces.to_vec(),
            Source::Whole(_) | Source::Foreign(_) | Source::Landed { .. } => vec![self.contiguous().clone()],
        }
    }
}

impl Deref for TileData {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.contiguous()
    }
}

impl From<Bytes> for TileData {
    fn from(bytes: Bytes) -> Self {
        Self::of(Source::Whole(bytes))
    }
}

impl From<Vec<u8>> for TileData {
    fn from(bytes: Vec<u8>) -> Self {
        Bytes::from(bytes).into()
    }
}

impl From<TileData> for Bytes {
    fn from(data: TileData) -> Self {
        data.contiguous().clone()
    }
}

impl PartialEq for TileData {
    fn eq(&self, other: &Self) -> bool {
        self.heads == other.heads && **self == **other
    }
}

impl Eq for TileData {}

impl fmt::Debug for TileData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.source {
            Source::Whole(_) => "whole",
            Source::Pieces { .. } => "pieces",
            Source::Foreign(_) => "foreign",
            Source::Landed { .. } => "landed",
        };
        f.debug_struct("TileData").field("bytes", &self.len()).field("kind", &kind).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Private memory that pretends to be shared.
    struct Pretended(Vec<u8>);

    impl ForeignBytes for Pretended {
        fn bytes(&self) -> usize {
            self.0.len()
        }

        fn copy_to(&self, offset: usize, into: &mut [u8]) {
            into.copy_from_slice(&self.0[offset..offset + into.len()]);
        }
    }

    #[test]
    fn every_kind_of_body_copies_to_the_same_bytes() {
        let all: Vec<u8> = (0..30_000u32).map(|i| (i % 251) as u8).collect();
        let cut = |bounds: &[usize]| {
            let ends = bounds.windows(2).map(|pair| Bytes::copy_from_slice(&all[pair[0]..pair[1]]));
            TileData::from_pieces(ends.collect())
        };
        let bodies = [
            TileData::from(all.clone()),
            cut(&[0, 30_000]),
            cut(&[0, 0, 1, 9_000, 9_000, 29_999, 30_000]),
            TileData::from_foreign(Arc::new(Pretended(all.clone()))),
            TileData::from_landed(Box::new(all.clone()), crc32c(&all)),
        ];
        for body in &bodies {
            let mut copy = vec![0; all.len()];
            assert_eq!(body.copy_to(&mut copy), Ok(crc32c(&all)), "{body:?}");
            assert_eq!(copy, all);
            assert_eq!((body.len(), &body[..], body.matches(crc32c(&all))), (30_000, &all[..], true));
            assert_eq!(body.pieces().concat(), all);
            assert_eq!(body, &bodies[0]);
            let fault = body.copy_to(&mut vec![0; 29_999]).unwrap_err();
            assert_eq!(fault.field(), "data");
        }
        assert!(cut(&[0, 0]).is_empty() && cut(&[0, 0]).pieces().concat().is_empty());
    }

    #[test]
    fn a_landed_body_is_the_memory_that_it_was_read_into() {
        let room = vec![7u8; 100];
        let place = room.as_ptr();
        let body = TileData::from_landed(Box::new(room), 9);
        let (landed, crc32c) = body.landed::<Vec<u8>>().unwrap();
        assert_eq!((landed.as_ptr(), crc32c, body.contiguous().as_ptr()), (place, 9, place));
        assert!(body.landed::<String>().is_none(), "what its receiver did not give it cannot take");
        assert!(TileData::from(vec![7u8; 100]).landed::<Vec<u8>>().is_none());
        assert_ne!(body.copy_to(&mut [0; 100]), Ok(9), "a copy has a checksum of its own");
    }
}
