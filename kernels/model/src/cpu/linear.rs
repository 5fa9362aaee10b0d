//! Matrix products of the CPU backend.
//!
//! # Canonical arithmetic
//!
//! The portable kernels are the specification, and every instruction set gives their bits. A row's outputs depend on that row
//! and the weights alone.
//!
//! *Floating-point weights* (f32, f16, bf16; dequantised ones with [`Linear::F32`]): each output is one chain of fused
//! multiply-adds over the inputs in order, from 0.
//!
//! *Quantised weights*: a row of activations is cut into groups of 32. With `m` the largest magnitude of a group, its scale is
//! `s = m / 127` and its quants `a = round_even(x * (127 / m))`, all in f32. A group whose scale is below 2^-80 counts as zero;
//! one that holds an infinity or NaN has the scale NaN, so that all outputs of its row, and no others, are NaN.
//! A group that stands out of its row, `s² > mean(x²) * (4 / 127)²`, also has finer quants of what the first ones leave:
//! `s' = s / 254`, `a' = round_even(fma(-a, s, x) * (254 / s))`, the product and the rounding fused.
//!
//! Weights are `w = d * (u - z)` or `w = d * u + n` with unsigned integers `u`, as the file has them. The integer sum
//! `D = Σ (u - z) * a` of a group is exact. From 0, and for each group in order, an output `y` takes
//!
//! 1. `y = fma(d * s, D, y)`, where `d * s` is rounded (`Q6_K`, which has scales for 16 inputs, takes two such steps);
//! 2. where there is a minimum, `y = fma(n, s * A, y)`, where `A = Σ a` and `s * A` is rounded;
//! 3. where the group has finer quants, the same two steps with `s'` and `a'`.
//!
//! The relative error that int8 activations bring is about 4e-3 of an output's root mean square where numbers are spread evenly.
//! Outliers make it several times larger, which is why outlying groups are refined (the idea, for whole columns in 16-bit
//! floating point, is that of LLM.int8(), arXiv 2208.07339).

mod floats;
mod format;
mod group;
mod input;
mod kernel;
mod layer;
mod matrix;
mod multiply;
mod panels;

use std::fmt;
use std::str::FromStr;

pub use group::QuantisedGroup;
pub use layer::LinearLayer;

pub(super) use input::{Computed, Forms, Input, Plain};
pub(super) use matrix::PackedMatrix;
pub(super) use multiply::{Then, multiply};

use crate::Error;

/// What products are computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Linear {
    /// int8 activations for weights that the file has quantised, f32 for the others.
    #[default]
    Auto,
    /// int8 activations for all weights; those in floating point are quantised to eight bits (where their rows are multiples
    /// of 32 elements).
    Int8,
    /// f32 for all weights; quantised ones are dequantised at load.
    F32,
}

impl fmt::Display for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Int8 => "int8",
            Self::F32 => "f32",
        })
    }
}

impl FromStr for Linear {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "auto" => Ok(Self::Auto),
            "int8" => Ok(Self::Int8),
            "f32" => Ok(Self::F32),
            other => Err(Error::Invalid {
                field: "linear".to_owned(),
                problem: format!("is `{other}`, must be `auto`, `int8` or `f32`"),
            }),
        }
    }
}

#[cfg(test)]
mod tests;
