//! Block files: one block with all that names it and checks it. The format is described in docs/protocol.md; its version changes
//! with it.

mod heads;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io::{self, Read, Write},
    path::Path,
};

use bytes::Bytes;
use longshore_attention::{KvDtype, LAYOUT_CPU_PANELS, TileShape};
use longshore_blocks::{BlockKey, BlockPlace, Deployment, Namespace, crc32c};
use longshore_proto::types::{Dtype, WireTileShape};

pub(super) use heads::{HeadsFile, HeadsLayer};

/// First bytes of every block file.
const MAGIC: [u8; 8] = *b"LSBLOCK\0";
/// Version that this program writes and reads.
const VERSION: u32 = 1;
/// Bytes before the checksums of the tiles.
const FIXED_BYTES: usize = 168;
/// Flag: stripe seed and index mean something.
const PLACED: u32 = 1;
/// Most layers of a block.
const LAYERS_MAX: u32 = 4_096;

/// Why a file is no sound block file, or could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
    /// The system refused.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A field has a value that can never work.
    #[error("`{field}` {problem}")]
    Invalid {
        /// Field of the format.
        field: &'static str,
        /// What is wrong with it, as a verb phrase.
        problem: String,
    },
    /// Bytes do not match their checksum.
    #[error("`{field}` does not match its checksum: the file is damaged")]
    Checksum {
        /// `header`, or `tiles[N]`.
        field: String,
    },
}

fn invalid(field: &'static str, problem: impl Into<String>) -> FileError {
    FileError::Invalid { field, problem: problem.into() }
}

/// A block in a file, every byte of it checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BlockFile {
    /// What the KV depends on, without the tenant.
    pub(super) deployment: Deployment,
    /// The same with the tenant.
    pub(super) namespace: Namespace,
    /// Key.
    pub(super) key: BlockKey,
    /// What places the block, where that is known.
    pub(super) place: Option<BlockPlace>,
    /// Shape of its tiles.
    pub(super) shape: WireTileShape,
    /// CRC-32C and body of each tile, by layer.
    pub(super) tiles: Vec<(u32, Bytes)>,
}

/// A header whose fields make sense.
struct Header {
    block: BlockFile,
    tile_bytes: usize,
}

impl BlockFile {
    /// Writes it to `path`, in the place of what is there only when all of it is written. Refuses a block that it would not read.
    pub(super) fn write(&self, path: &Path) -> Result<u64, FileError> {
        replace(path, &self.header()?, self.tiles.iter().map(|(_, body)| body))
    }

    /// Reads `path` whole and checks it.
    pub(super) fn read(path: &Path) -> Result<Self, FileError> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        Self::read_from(&mut file, length)
    }

    /// The same of `length` bytes from anywhere. Nothing is allocated that these bytes do not account for.
    fn read_from(from: &mut impl Read, length: u64) -> Result<Self, FileError> {
        let mut fixed = [0; FIXED_BYTES];
        exact(from, &mut fixed, "header")?;
        let layers = begins_well(&fixed)?;
        let table_bytes = 4 * layers as usize;
        let mut header = fixed.to_vec();
        header.resize(FIXED_BYTES + table_bytes, 0);
        exact(from, &mut header[FIXED_BYTES..], "checksums")?;
        let mut crc = [0; 4];
        exact(from, &mut crc, "header_crc32c")?;
        if crc32c(&header) != u32::from_le_bytes(crc) {
            return Err(FileError::Checksum { field: "header".to_owned() });
        }
        let Header { mut block, tile_bytes } = parse(&fixed)?;
        let expected = (header.len() + crc.len()) as u64 + u64::from(layers) * tile_bytes as u64;
        if length != expected {
            let problem = format!("are {length} bytes, the header tells {expected}");
            return Err(invalid("tiles", problem));
        }
        let (checksums, _) = header[FIXED_BYTES..].as_chunks::<4>();
        for (layer, crc) in checksums.iter().enumerate() {
            let mut body = vec![0; tile_bytes];
            exact(from, &mut body, "tiles")?;
            let crc = u32::from_le_bytes(*crc);
            if crc32c(&body) != crc {
                return Err(FileError::Checksum { field: format!("tiles[{layer}]") });
            }
            block.tiles.push((crc, body.into()));
        }
        Ok(block)
    }

    /// Header with its checksum, of a block whose tiles match theirs.
    fn header(&self) -> Result<Vec<u8>, FileError> {
        let tile_bytes = tile_bytes(&self.shape)?;
        if self.tiles.len() != self.shape.layers as usize {
            return Err(invalid(
                "layers",
                format!("are {}, there are {} tiles", self.shape.layers, self.tiles.len()),
            ));
        }
        for (layer, (crc, body)) in self.tiles.iter().enumerate() {
            if body.len() != tile_bytes {
                let problem =
                    format!("has {} bytes in layer {layer}, its shape needs {tile_bytes}", body.len());
                return Err(invalid("tiles", problem));
            }
            if crc32c(body) != *crc {
                return Err(FileError::Checksum { field: format!("tiles[{layer}]") });
            }
        }
        let mut header = self.fixed(MAGIC, tile_bytes);
        self.tiles.iter().for_each(|(crc, _)| header.extend_from_slice(&crc.to_le_bytes()));
        let crc = crc32c(&header);
        header.extend_from_slice(&crc.to_le_bytes());
        Ok(header)
    }

    /// What comes before the checksums of the tiles.
    fn fixed(&self, magic: [u8; 8], tile_bytes: usize) -> Vec<u8> {
        let mut header = Vec::with_capacity(FIXED_BYTES + 4 * self.tiles.len() + 4);
        let place = self.place.unwrap_or(BlockPlace { stripe_seed: [0; 32], index: 0 });
        let shape = &self.shape;
        header.extend_from_slice(&magic);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&(if self.place.is_some() { PLACED } else { 0 }).to_le_bytes());
        header.extend_from_slice(self.deployment.as_bytes());
        header.extend_from_slice(self.namespace.as_bytes());
        header.extend_from_slice(&self.key.0);
        header.extend_from_slice(&place.stripe_seed);
        header.extend_from_slice(&place.index.to_le_bytes());
        let numbers = [
            shape.block_tokens,
            shape.kv_heads,
            shape.head_dim,
            dtype_number(shape.dtype),
            shape.layout,
            shape.layers,
        ];
        numbers.iter().for_each(|number| header.extend_from_slice(&number.to_le_bytes()));
        header.extend_from_slice(&(tile_bytes as u64).to_le_bytes());
        debug_assert_eq!(header.len(), FIXED_BYTES);
        header
    }
}

/// Writes a header and bodies to `path`, in the place of what is there only when all of it is written; returns the bytes.
fn replace<'a>(
    path: &Path,
    header: &[u8],
    bodies: impl Iterator<Item = &'a Bytes>,
) -> Result<u64, FileError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut file = tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))?;
    file.write_all(header)?;
    let mut bytes = header.len();
    for body in bodies {
        file.write_all(body)?;
        bytes += body.len();
    }
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(bytes as u64)
}

/// Fills `into`; a file that ends before is said to lack `field`.
fn exact(from: &mut impl Read, into: &mut [u8], field: &'static str) -> Result<(), FileError> {
    from.read_exact(into).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => invalid(
            field,
            "is cut short: the file ends inside it; hint: get the block again with `longshore store get`",
        ),
        _ => FileError::Io(error),
    })
}

fn word(fixed: &[u8; FIXED_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]])
}

fn long(fixed: &[u8; FIXED_BYTES], at: usize) -> u64 {
    u64::from(word(fixed, at)) | u64::from(word(fixed, at + 4)) << 32
}

fn digest<const N: usize>(fixed: &[u8; FIXED_BYTES], at: usize) -> [u8; N] {
    std::array::from_fn(|index| fixed[at + index])
}

/// Checks what must be known before the header's checksum can be; returns the layers.
fn begins_well(fixed: &[u8; FIXED_BYTES]) -> Result<u32, FileError> {
    if fixed[..8] == heads::MAGIC {
        let problem =
            "is that of a file of heads, not of a whole block; hint: `longshore store get` without `--heads`";
        return Err(invalid("magic", problem));
    }
    if fixed[..8] != MAGIC {
        return Err(invalid("magic", "is not that of a block file; hint: `longshore store get` writes them"));
    }
    let version = word(fixed, 8);
    if version != VERSION {
        let problem =
            format!("is {version}, this program reads {VERSION}; hint: use the version that wrote the file");
        return Err(invalid("version", problem));
    }
    let layers = word(fixed, 156);
    if !(1..=LAYERS_MAX).contains(&layers) {
        return Err(invalid("layers", format!("is {layers}, must be from 1 to {LAYERS_MAX}")));
    }
    Ok(layers)
}

/// Everything but the tiles, of a header whose checksum is right.
fn parse(fixed: &[u8; FIXED_BYTES]) -> Result<Header, FileError> {
    let flags = word(fixed, 12);
    if flags & !PLACED != 0 {
        return Err(invalid("flags", format!("is {flags:#x}, of which this program knows {PLACED:#x}")));
    }
    let (stripe_seed, index) = (digest::<32>(fixed, 96), long(fixed, 128));
    let place = (flags & PLACED != 0).then_some(BlockPlace { stripe_seed, index });
    if place.is_none() && (stripe_seed != [0; 32] || index != 0) {
        return Err(invalid("stripe_seed", "is set, and `flags` says that it is not"));
    }
    let shape = WireTileShape {
        block_tokens: word(fixed, 136),
        kv_heads: word(fixed, 140),
        head_dim: word(fixed, 144),
        dtype: dtype_of(word(fixed, 148))?,
        layout: word(fixed, 152),
        layers: word(fixed, 156),
    };
    let (tile_bytes, told) = (tile_bytes(&shape)?, long(fixed, 160));
    if told != tile_bytes as u64 {
        return Err(invalid("tile_bytes", format!("is {told}, the shape makes {tile_bytes}")));
    }
    let block = BlockFile {
        deployment: Deployment::from_bytes(digest(fixed, 16)),
        namespace: Namespace::from_bytes(digest(fixed, 48)),
        key: BlockKey(digest(fixed, 80)),
        place,
        shape,
        tiles: Vec::new(),
    };
    Ok(Header { block, tile_bytes })
}

/// Bytes of a tile of a shape that this program knows; refuses others by the name of the field.
pub(super) fn tile_bytes(shape: &WireTileShape) -> Result<usize, FileError> {
    if shape.layout != LAYOUT_CPU_PANELS {
        return Err(invalid(
            "layout",
            format!("is {}, this program knows {LAYOUT_CPU_PANELS}", shape.layout),
        ));
    }
    if !(1..=LAYERS_MAX).contains(&shape.layers) {
        return Err(invalid("layers", format!("is {}, must be from 1 to {LAYERS_MAX}", shape.layers)));
    }
    let own = TileShape {
        block_tokens: shape.block_tokens as usize,
        kv_heads: shape.kv_heads as usize,
        head_dim: shape.head_dim as usize,
        dtype: match shape.dtype {
            Dtype::F32 => KvDtype::F32,
            Dtype::F16 => KvDtype::F16,
            Dtype::Bf16 => KvDtype::Bf16,
            Dtype::Int8 => KvDtype::Int8,
        },
    };
    match own.validate() {
        Ok(()) => Ok(own.bytes()),
        Err(longshore_attention::Error::Invalid { field, problem }) => Err(invalid(field, problem)),
        Err(other) => Err(invalid("shape", other.to_string())),
    }
}

/// Numbers of the element types, those of the schema.
fn dtype_number(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 1,
        Dtype::F16 => 2,
        Dtype::Bf16 => 3,
        Dtype::Int8 => 4,
    }
}

fn dtype_of(number: u32) -> Result<Dtype, FileError> {
    [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::Int8]
        .into_iter()
        .find(|dtype| dtype_number(*dtype) == number)
        .ok_or_else(|| {
            invalid("dtype", format!("is {number}, must be 1 (f32), 2 (f16), 3 (bf16) or 4 (int8)"))
        })
}
