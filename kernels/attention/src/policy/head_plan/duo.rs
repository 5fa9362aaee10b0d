//! DuoAttention's gates: how much each KV head needs all of its keys, from 0 to 1.

use crate::Error;

use super::super::{invalid, shown};

/// Which heads are dense.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum GatesCut {
    /// Those whose gate is at least this, 0 to 1.
    Threshold(f64),
    /// Those whose gate is at least the quantile at this share of all gates, 0 to 1 (interpolated linearly); of 1, none.
    Sparsity(f64),
}

impl GatesCut {
    /// The least gate of a dense head.
    pub(super) fn threshold(self, gates: &[f64]) -> Result<f64, Error> {
        let (field, value) = match self {
            Self::Threshold(value) => ("threshold", value),
            Self::Sparsity(value) => ("sparsity", value),
        };
        if !(0.0..=1.0).contains(&value) {
            return invalid(field, format!("is {value}, must be from 0 to 1"));
        }
        match self {
            Self::Threshold(threshold) => Ok(threshold),
            Self::Sparsity(1.0) => Ok(f64::INFINITY),
            Self::Sparsity(share) => {
                let mut sorted = gates.to_vec();
                sorted.sort_by(f64::total_cmp);
                let place = share * (sorted.len() - 1) as f64;
                let below = place.floor() as usize;
                let above = sorted[(below + 1).min(sorted.len() - 1)];
                Ok(sorted[below] + (above - sorted[below]) * (place - below as f64))
            }
        }
    }
}

/// Gates, `[layers][kv_heads]`.
pub(super) fn read(text: &str, layers: usize, kv_heads: usize) -> Result<Vec<f64>, Error> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    if lines.len() != layers || layers == 0 || kv_heads == 0 {
        return invalid("plan", format!("has {} lines, the model has {layers} layers", lines.len()));
    }
    let mut gates = Vec::with_capacity(layers * kv_heads);
    for (layer, line) in lines.iter().enumerate() {
        let before = gates.len();
        for part in line.split_whitespace() {
            match part.parse::<f64>() {
                Ok(gate) if (0.0..=1.0).contains(&gate) => gates.push(gate),
                _ => {
                    let problem =
                        format!("has {} in line {layer}, must be a number from 0 to 1", shown(part));
                    return invalid("plan", problem);
                }
            }
            if gates.len() - before > kv_heads {
                break;
            }
        }
        if gates.len() - before != kv_heads {
            let found = line.split_whitespace().count();
            return invalid(
                "plan",
                format!("has {found} columns in line {layer}, the model has {kv_heads} KV heads"),
            );
        }
    }
    Ok(gates)
}
