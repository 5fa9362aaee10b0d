//! Checked conversions of tensors, identities, shapes and tiles.

use bytes::Bytes;
use longshore_blocks::{BlockKey, BlockPlace, Deployment, Namespace, crc32c};

use super::{Dtype, Identity, Tensor, TileData, TileMessage, WireTileShape};
use crate::{WireError, types::check, v1};

/// Most axes of a tensor.
const AXES_MAX: usize = 4;

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }

    fn from_wire(value: i32) -> Result<Self, WireError> {
        match v1::Dtype::try_from(value) {
            Ok(v1::Dtype::F32) => Ok(Self::F32),
            Ok(v1::Dtype::F16) => Ok(Self::F16),
            Ok(v1::Dtype::Bf16) => Ok(Self::Bf16),
            Ok(v1::Dtype::Int8) => Ok(Self::Int8),
            Ok(v1::Dtype::Unspecified) => Err(WireError::invalid("dtype", "is not set")),
            Err(_) => Err(WireError::invalid("dtype", format!("is {value}, which is no known element type"))),
        }
    }
}

impl From<Dtype> for v1::Dtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::Bf16,
            Dtype::Int8 => Self::Int8,
        }
    }
}

impl Tensor {
    /// An f32 tensor of `shape`.
    ///
    /// # Panics
    /// When the product of `shape` is not the number of `values`.
    pub fn from_f32(shape: &[u64], values: &[f32]) -> Self {
        let elements = shape.iter().product::<u64>();
        assert_eq!(elements, values.len() as u64, "shape {shape:?} does not fit {} values", values.len());
        let mut data = Vec::with_capacity(values.len() * 4);
        values.iter().for_each(|value| data.extend_from_slice(&value.to_le_bytes()));
        Self { dtype: Dtype::F32, shape: shape.to_vec(), data: data.into() }
    }

    /// The elements of an f32 tensor; `None` for other element types.
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        let (elements, rest) = self.data.as_chunks::<4>();
        (self.dtype == Dtype::F32 && rest.is_empty())
            .then(|| elements.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    /// Refuses other element types than f32 and other numbers of axes than `axes`.
    pub(crate) fn expect_f32(self, axes: usize) -> Result<Self, WireError> {
        if self.dtype != Dtype::F32 {
            return Err(WireError::invalid("dtype", "is not F32"));
        }
        if self.shape.len() != axes {
            return Err(WireError::invalid(
                "shape",
                format!("has {} axes, must have {axes}", self.shape.len()),
            ));
        }
        Ok(self)
    }
}

/// Bytes that `shape` needs; `None` when that is no number of bytes at all.
fn bytes_of(shape: &[u64], dtype: Dtype) -> Option<u64> {
    // A zero extent makes the product 0, whatever the others overflow to.
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(dtype.bytes() as u64, |bytes, extent| bytes.checked_mul(*extent))
}

impl v1::Tensor {
    /// Bytes of the elements, by type and shape.
    pub(crate) fn bytes_of_shape(&self) -> Result<u64, WireError> {
        let dtype = Dtype::from_wire(self.dtype)?;
        check::at_most(self.shape.len(), AXES_MAX, "axes", "shape")?;
        bytes_of(&self.shape, dtype).ok_or_else(|| {
            WireError::invalid("shape", format!("is {:?}, which is no number of bytes", self.shape))
        })
    }
}

impl TryFrom<v1::Tensor> for Tensor {
    type Error = WireError;

    fn try_from(wire: v1::Tensor) -> Result<Self, WireError> {
        let dtype = Dtype::from_wire(wire.dtype)?;
        if wire.shared.is_some() {
            return Err(WireError::invalid("shared", "is set, this connection shares no memory"));
        }
        check::at_most(wire.shape.len(), AXES_MAX, "axes", "shape")?;
        if bytes_of(&wire.shape, dtype) != Some(wire.data.len() as u64) {
            let problem =
                format!("is {:?}, which does not fit {} bytes of data", wire.shape, wire.data.len());
            return Err(WireError::invalid("shape", problem));
        }
        verify(&wire.data, wire.crc32c)?;
        Ok(Self { dtype, shape: wire.shape, data: wire.data })
    }
}

impl From<Tensor> for v1::Tensor {
    fn from(tensor: Tensor) -> Self {
        Self {
            dtype: v1::Dtype::from(tensor.dtype).into(),
            shape: tensor.shape,
            crc32c: crc32c(&tensor.data),
            data: tensor.data,
            shared: None,
        }
    }
}

fn verify(data: &[u8], expected: u32) -> Result<(), WireError> {
    if crc32c(data) == expected { Ok(()) } else { Err(WireError::Checksum { field: "data".to_owned() }) }
}

impl TryFrom<v1::Identity> for Identity {
    type Error = WireError;

    fn try_from(wire: v1::Identity) -> Result<Self, WireError> {
        Ok(Self {
            deployment: Deployment::from_bytes(check::exact(&wire.deployment, "deployment")?),
            namespace: Namespace::from_bytes(check::exact(&wire.namespace, "namespace")?),
            shard_map_epoch: wire.shard_map_epoch,
        })
    }
}

impl From<Identity> for v1::Identity {
    fn from(identity: Identity) -> Self {
        Self {
            deployment: Bytes::copy_from_slice(identity.deployment.as_bytes()),
            namespace: Bytes::copy_from_slice(identity.namespace.as_bytes()),
            shard_map_epoch: identity.shard_map_epoch,
        }
    }
}

impl TryFrom<v1::TileShape> for WireTileShape {
    type Error = WireError;

    fn try_from(wire: v1::TileShape) -> Result<Self, WireError> {
        Ok(Self {
            block_tokens: wire.block_tokens,
            kv_heads: wire.kv_heads,
            head_dim: wire.head_dim,
            dtype: Dtype::from_wire(wire.dtype)?,
            layout: wire.layout,
            layers: wire.layers,
        })
    }
}

impl From<WireTileShape> for v1::TileShape {
    fn from(shape: WireTileShape) -> Self {
        Self {
            block_tokens: shape.block_tokens,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            dtype: v1::Dtype::from(shape.dtype).into(),
            layout: shape.layout,
            layers: shape.layers,
        }
    }
}

impl TryFrom<v1::Tile> for TileMessage {
    type Error = WireError;

    fn try_from(wire: v1::Tile) -> Result<Self, WireError> {
        let key = BlockKey(check::exact(&wire.key, "key")?);
        if wire.shared.is_some() {
            return Err(WireError::invalid("shared", "is set, this connection shares no memory"));
        }
        if wire.nccl.is_some() {
            return Err(WireError::invalid("nccl", "is set, this call has no epoch of the lane `nccl`"));
        }
        let place = match wire.stripe_seed.is_empty() {
            true => None,
            false => Some(BlockPlace {
                stripe_seed: check::exact(&wire.stripe_seed, "stripe_seed")?,
                index: wire.block_index,
            }),
        };
        let mut data = TileData::from(wire.data);
        if let Some(part) = wire.heads {
            data = data.of_heads(part.try_into().map_err(|fault: WireError| fault.within("heads"))?);
        }
        Ok(Self { key, layer: wire.layer, data, crc32c: wire.crc32c, place })
    }
}

impl From<TileMessage> for v1::Tile {
    fn from(tile: TileMessage) -> Self {
        Self {
            key: Bytes::copy_from_slice(&tile.key.0),
            layer: tile.layer,
            heads: tile.data.heads().map(Into::into),
            data: tile.data.into(),
            crc32c: tile.crc32c,
            shared: None,
            stripe_seed: tile
                .place
                .map_or_else(Bytes::new, |place| Bytes::copy_from_slice(&place.stripe_seed)),
            block_index: tile.place.map_or(0, |place| place.index),
            nccl: None,
        }
    }
}
