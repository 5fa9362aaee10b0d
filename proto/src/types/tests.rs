//! Conversions: round trips, hostile bytes, and the name of every bad field.

mod fields;
mod hostile;
mod round_trip;
mod sampling;

use bytes::Bytes;
use longshore_blocks::{BlockKey, Deployment, Namespace, crc32c};

use super::{Identity, SummariesMessage, Tensor};
use crate::v1;

fn identity() -> Identity {
    Identity {
        deployment: Deployment::from_bytes([1; 32]),
        namespace: Namespace::from_bytes([2; 32]),
        shard_map_epoch: 3,
    }
}

fn wire_identity() -> Option<v1::Identity> {
    Some(identity().into())
}

fn key(byte: u8) -> BlockKey {
    BlockKey([byte; 16])
}

fn wire_tensor(shape: &[u64], values: usize) -> v1::Tensor {
    let data = Bytes::from(vec![0; values * 4]);
    v1::Tensor {
        dtype: v1::Dtype::F32.into(),
        shape: shape.to_vec(),
        crc32c: crc32c(&data),
        data,
        shared: None,
    }
}

fn wire_tile() -> v1::Tile {
    let data = Bytes::from_static(b"a tile");
    let key = key(7).0.to_vec().into();
    v1::Tile { key, layer: 1, crc32c: crc32c(&data), data, ..Default::default() }
}

fn tensor(rows: usize, heads: usize, elements: usize) -> Tensor {
    let values: Vec<f32> = (0..rows * heads * elements).map(|index| index as f32).collect();
    Tensor::from_f32(&[rows as u64, heads as u64, elements as u64], &values)
}

fn summaries() -> SummariesMessage {
    let cosines = Tensor::from_f32(&[3, 2], &[0.5; 6]);
    SummariesMessage {
        layer: 1,
        first: 7,
        keys: tensor(3, 2, 4),
        values: Some(tensor(3, 2, 4)),
        spreads: None,
        cosines: Some(cosines),
    }
}
