//! Errors behind the output projection: what of a head's error the rest of the model sees.

use anyhow::{Context, Result};
use longshore_attention::HeadShape;
use longshore_model::{LayerWeight, LoadedModel, Matrix, WeightName};

use crate::eval::subject::Subject;

/// WᵀW of the columns that each KV head's group has in the output projection: |W x|² is xᵀ(WᵀW)x.
#[derive(Debug)]
pub(super) struct Projection {
    /// `[layer][KV head]`, `[width, width]` with the width of a group.
    grams: Vec<Vec<Vec<f32>>>,
    width: usize,
}

impl Projection {
    /// Reads the output projections of the model's file.
    pub(super) fn of(subject: &Subject) -> Result<Self> {
        let info = &subject.node.info;
        let loaded = LoadedModel::open(&info.path, &|_| ()).context("cannot read the model again")?;
        let read = |layer| {
            let matrix = loaded.weights.tensor(WeightName::Layer(layer, LayerWeight::AttnOut))?;
            Ok::<_, longshore_model::Error>(grams(&matrix, info.config.heads))
        };
        let grams = (0..subject.layers()).map(read).collect::<Result<_, _>>();
        let width = info.config.heads.group * info.config.heads.head_dim;
        Ok(Self { grams: grams.context("cannot read the output projection")?, width })
    }

    /// |W (ours − exact)| / |W exact| of one KV head's group; rows are `[query_heads * head_dim]`.
    pub(super) fn distance(&self, layer: usize, kv_head: usize, ours: &[f32], exact: &[f32]) -> f32 {
        let columns = kv_head * self.width..(kv_head + 1) * self.width;
        let (ours, exact) = (&ours[columns.clone()], &exact[columns]);
        let difference: Vec<f32> = ours.iter().zip(exact).map(|(a, b)| a - b).collect();
        let gram = &self.grams[layer][kv_head];
        let (distance, norm) = (self.norm(gram, &difference), self.norm(gram, exact));
        if norm == 0.0 { distance } else { distance / norm }
    }

    /// |W x|.
    fn norm(&self, gram: &[f32], x: &[f32]) -> f32 {
        let row = |(row, &factor): (&[f32], &f32)| {
            f64::from(factor * row.iter().zip(x).map(|(g, x)| g * x).sum::<f32>())
        };
        let square: f64 = gram.chunks_exact(self.width).zip(x).map(row).sum();
        // Rounding can make it a little less than 0.
        square.max(0.0).sqrt() as f32
    }
}

fn grams(matrix: &Matrix, heads: HeadShape) -> Vec<Vec<f32>> {
    let width = heads.group * heads.head_dim;
    let gram = |kv_head: usize| {
        let mut gram = vec![0.0f32; width * width];
        for row in matrix.data.chunks_exact(matrix.cols) {
            let row = &row[kv_head * width..(kv_head + 1) * width];
            for (sums, &factor) in gram.chunks_exact_mut(width).zip(row) {
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += factor * x);
            }
        }
        gram
    };
    (0..heads.kv_heads).map(gram).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::calibrate::measure::relative_distance;

    #[test]
    fn distances_are_those_behind_the_matrix() {
        let heads = HeadShape { kv_heads: 2, group: 2, head_dim: 3 };
        let wave =
            |count: usize, step: f32| -> Vec<f32> { (0..count).map(|i| (i as f32 * step).sin()).collect() };
        let (rows, cols) = (7, heads.query_heads() * heads.head_dim);
        let matrix = Matrix { rows, cols, data: wave(rows * cols, 0.7) };
        let projection = Projection { grams: vec![grams(&matrix, heads)], width: 6 };
        let (ours, exact) = (wave(cols, 1.3), wave(cols, 0.4));
        for kv_head in 0..2 {
            let own = kv_head * 6..(kv_head + 1) * 6;
            let behind = |x: &[f32]| -> Vec<f32> {
                let product =
                    |row: &[f32]| row[own.clone()].iter().zip(&x[own.clone()]).map(|(w, x)| w * x).sum();
                matrix.data.chunks_exact(cols).map(product).collect()
            };
            let right = relative_distance(&behind(&ours), &behind(&exact));
            let found = projection.distance(0, kv_head, &ours, &exact);
            assert!((found - right).abs() < 1e-4 * right, "{found} {right}");
        }
        assert_eq!(projection.distance(0, 0, &exact, &exact), 0.0);
    }
}
