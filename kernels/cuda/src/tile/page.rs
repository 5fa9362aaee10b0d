//! The layout of pages ([`longshore_attention::LAYOUT_ROWS`]), and tiles as pages on the host.

use longshore_attention::{KvDtype, Tile, TileShape};

use crate::Error;

/// Keys of a K panel, columns of a V panel, of a tile in the layout of the CPU.
const LANES: usize = 16;

/// Element type of K and V in a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PageElement {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    F16,
    /// 2 bytes.
    Bf16,
    /// 1 byte, from −127 to 127, times an f32 scale per token and KV head, one for K and one for V.
    Int8,
    /// 1 byte of 4 bits of exponent and 3 of mantissa, largest 448, times scales as in int8. Only on devices: no tile has it.
    E4m3,
}

impl PageElement {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Bf16, Self::Int8, Self::E4m3];

    /// Those without scales.
    pub const FLOATS: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes of one element, without its share of a scale.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Int8 | Self::E4m3 => 1,
        }
    }

    /// Whether it counts in units of a scale.
    pub fn is_scaled(self) -> bool {
        matches!(self, Self::Int8 | Self::E4m3)
    }

    /// Value of the constant `DTYPE` of the sources.
    pub fn constant(self) -> i64 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 2,
            Self::Int8 => 3,
            Self::E4m3 => 4,
        }
    }

    /// The type of tiles that have such elements.
    pub fn kv_dtype(self) -> Option<KvDtype> {
        match self {
            Self::F32 => Some(KvDtype::F32),
            Self::F16 => Some(KvDtype::F16),
            Self::Bf16 => Some(KvDtype::Bf16),
            Self::Int8 => Some(KvDtype::Int8),
            Self::E4m3 => None,
        }
    }
}

impl From<KvDtype> for PageElement {
    fn from(dtype: KvDtype) -> Self {
        match dtype {
            KvDtype::F32 => Self::F32,
            KvDtype::F16 => Self::F16,
            KvDtype::Bf16 => Self::Bf16,
            KvDtype::Int8 => Self::Int8,
        }
    }
}

/// Shape of a page: K and V of one block in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageShape {
    /// Token positions; a power of two from 16 to 256.
    pub tokens: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Elements of one head; a multiple of 16 up to 256.
    pub head_dim: usize,
    /// Element type.
    pub element: PageElement,
}

impl PageShape {
    /// Head sizes of models, which kernels are checked with.
    pub const HEAD_DIMS: [usize; 5] = [64, 80, 96, 128, 256];
    /// Largest head size of the kernels.
    pub const HEAD_DIM_MAX: usize = 256;

    /// The shape of the page of a tile; refuses what the kernels do not know.
    pub fn of(tile: TileShape) -> Result<Self, Error> {
        let TileShape { block_tokens: tokens, kv_heads, head_dim, dtype } = tile;
        let shape = Self { tokens, kv_heads, head_dim, element: dtype.into() };
        shape.validate()?;
        Ok(shape)
    }

    /// The shape of a tile with this content; none has E4M3.
    pub fn tile(&self) -> Option<TileShape> {
        let Self { tokens: block_tokens, kv_heads, head_dim, element } = *self;
        Some(TileShape { block_tokens, kv_heads, head_dim, dtype: element.kv_dtype()? })
    }

    /// Checks the ranges: blocks of 16 to 256 (power of two), 1 to 1,024 heads, head size a multiple of 16 up to 256.
    pub fn validate(&self) -> Result<(), Error> {
        let invalid = |field, problem: String| Err(Error::Invalid { field, problem });
        if !self.tokens.is_power_of_two() || !(16..=256).contains(&self.tokens) {
            return invalid(
                "block_tokens",
                format!("is {}, must be a power of two from 16 to 256", self.tokens),
            );
        }
        if !(1..=1024).contains(&self.kv_heads) {
            return invalid("kv_heads", format!("is {}, must be from 1 to 1024", self.kv_heads));
        }
        if !self.head_dim.is_multiple_of(LANES) || !(LANES..=Self::HEAD_DIM_MAX).contains(&self.head_dim) {
            let problem = format!("is {}, GPU kernels need a multiple of 16 from 16 to 256", self.head_dim);
            return invalid("head_dim", problem);
        }
        Ok(())
    }

    /// Bytes of K, or of V, of one head, without scales.
    pub fn side_bytes(&self) -> usize {
        self.tokens * self.head_dim * self.element.bytes()
    }

    /// Bytes of one head: K, V and, where the type has them, scales. A tile's head has as many: head sizes are whole panels.
    pub fn head_bytes(&self) -> usize {
        let scales = if self.element.is_scaled() { 2 * self.tokens * size_of::<f32>() } else { 0 };
        2 * self.side_bytes() + scales
    }

    /// Bytes of the page.
    pub fn bytes(&self) -> usize {
        self.kv_heads * self.head_bytes()
    }
}

/// The page with what a tile holds; refuses shapes that pages do not have.
pub fn page_of(tile: &Tile) -> Result<Vec<u8>, Error> {
    let shape = PageShape::of(tile.shape())?;
    let mut page = vec![0; shape.bytes()];
    for (to, from) in heads(&shape, &mut page).zip(tile.as_bytes().chunks_exact(shape.head_bytes())) {
        for_each_element(&shape, |panels, rows, bytes| {
            to[rows..rows + bytes].copy_from_slice(&from[panels..panels + bytes]);
        });
        to[2 * shape.side_bytes()..].copy_from_slice(&from[2 * shape.side_bytes()..]);
    }
    Ok(page)
}

/// The tile with what a page holds; refuses another length, and elements that tiles do not have.
pub fn tile_of(shape: &PageShape, page: &[u8]) -> Result<Tile, Error> {
    shape.validate()?;
    let invalid = |field, problem: String| Error::Invalid { field, problem };
    let tile = shape.tile().ok_or_else(|| invalid("element", "is E4M3, which no tile has".to_owned()))?;
    if page.len() != shape.bytes() {
        let problem = format!("has {} bytes, its shape needs {}", page.len(), shape.bytes());
        return Err(invalid("page", problem));
    }
    let mut body = vec![0; shape.bytes()];
    for (to, from) in heads(shape, &mut body).zip(page.chunks_exact(shape.head_bytes())) {
        for_each_element(shape, |panels, rows, bytes| {
            to[panels..panels + bytes].copy_from_slice(&from[rows..rows + bytes]);
        });
        to[2 * shape.side_bytes()..].copy_from_slice(&from[2 * shape.side_bytes()..]);
    }
    Tile::from_bytes(tile, &body).map_err(|error| invalid("page", error.to_string()))
}

fn heads<'a>(shape: &PageShape, bytes: &'a mut [u8]) -> impl Iterator<Item = &'a mut [u8]> {
    bytes.chunks_exact_mut(shape.head_bytes())
}

/// Calls `take` (offset in a head of a tile, offset in a head of a page, bytes) for all of K and V: element by element in K, by the
/// columns of a panel in V.
fn for_each_element(shape: &PageShape, mut take: impl FnMut(usize, usize, usize)) {
    let (dim, bytes, side) = (shape.head_dim, shape.element.bytes(), shape.side_bytes());
    for token in 0..shape.tokens {
        for element in 0..dim {
            let panels = (token / LANES * dim + element) * LANES + token % LANES;
            take(panels * bytes, (token * dim + element) * bytes, bytes);
        }
        for panel in 0..dim / LANES {
            let panels = (panel * shape.tokens + token) * LANES;
            take(side + panels * bytes, side + (token * dim + panel * LANES) * bytes, LANES * bytes);
        }
    }
}

#[cfg(test)]
mod tests;
