//! Splitting, joining, and a link over a scripted shard.

mod joining;
mod scripted;
mod streams;

use longshore_attention::Partials;
use longshore_blocks::{Deployment, Namespace};
use longshore_proto::types::{AttendItem, AttendPartial, AttendQuery, Identity, Tensor};

fn identity() -> Identity {
    Identity {
        deployment: Deployment::from_bytes([1; 32]),
        namespace: Namespace::from_bytes([2; 32]),
        shard_map_epoch: 3,
    }
}

/// An item whose element `e` of (row, head) says where it comes from.
fn item(view_id: u64, rows: usize, heads: usize, head_dim: usize) -> AttendItem {
    let values: Vec<f32> =
        (0..rows * heads * head_dim).map(|index| view_id as f32 * 1e6 + index as f32).collect();
    let shape = [rows as u64, heads as u64, head_dim as u64];
    let queries = Tensor::from_f32(&shape, &values);
    AttendItem { view_id, first_position: 1000, queries, scale: 0.5, sparse: None }
}

fn query(items: Vec<AttendItem>) -> AttendQuery {
    AttendQuery { query_id: 0, identity: identity(), layer: 3, items }
}

/// What the scripted shard answers for a row: m says which stripe, l which absolute position, o repeats the query.
fn partial_of(item: &AttendItem, index: u32, stripe: u64) -> AttendPartial {
    let &[rows, heads, head_dim] = item.queries.shape.as_slice() else { panic!("queries have three axes") };
    let queries = item.queries.to_f32().unwrap();
    let mut values = Vec::new();
    for (row, head) in queries.chunks_exact(head_dim as usize).enumerate() {
        let position = item.first_position + row as u64 / heads;
        values.extend([stripe as f32, position as f32]);
        values.extend_from_slice(head);
    }
    AttendPartial { item: index, stripe, partial: Tensor::from_f32(&[rows, heads, head_dim + 2], &values) }
}

/// The same for a whole item, as the caller must see it.
fn expected_of(item: &AttendItem, stripe: u64) -> Partials {
    let partial = partial_of(item, 0, stripe).partial;
    let shape: Vec<usize> = item.queries.shape.iter().map(|extent| *extent as usize).collect();
    Partials::from_interleaved(shape[0], shape[1], shape[2], &partial.to_f32().unwrap()).unwrap()
}
