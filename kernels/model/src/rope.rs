//! Rotary position embedding: frequencies under every scaling that a model may ask for, and the rotation itself. Angles are
//! computed in f64 from absolute u64 positions, so that they stay exact in contexts of millions; the rotation is in f32.

use std::f64::consts::TAU;

use crate::{Error, RopeConfig, RopeScaling, RopeStyle};

/// Frequencies of a model, ready to rotate heads.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    style: RopeStyle,
    dim: usize,
    frequencies: Vec<f64>,
    magnitude: f64,
}

/// Cosines and sines of one position, `dim / 2` each, f32, magnitude included.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotation {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotation {
    /// Cosines, one for each pair.
    pub fn cos(&self) -> &[f32] {
        &self.cos
    }

    /// Sines, one for each pair.
    pub fn sin(&self) -> &[f32] {
        &self.sin
    }
}

impl Rope {
    /// Computes the frequencies; refuses constants that make none.
    pub fn new(config: &RopeConfig) -> Result<Self, Error> {
        let dim = config.dim;
        if dim < 2 || !dim.is_multiple_of(2) {
            return Err(invalid("rope.dim", format!("is {dim}, must be even and at least 2")));
        }
        let theta = f64::from(config.theta);
        if !theta.is_finite() || theta <= 1.0 {
            return Err(invalid("rope.theta", format!("is {theta}, must be finite and over 1")));
        }
        check_scaling(&config.scaling, dim)?;
        Ok(Self {
            style: config.style,
            dim,
            frequencies: frequencies(theta, dim, &config.scaling),
            magnitude: magnitude(&config.scaling),
        })
    }

    /// Angle per position of each pair, in radians, `dim / 2`.
    pub fn frequencies(&self) -> &[f64] {
        &self.frequencies
    }

    /// Factor on cosine and sine (YaRN's attention factor, else 1).
    pub fn magnitude(&self) -> f64 {
        self.magnitude
    }

    /// Cosines and sines at an absolute position.
    pub fn at(&self, position: u64) -> Rotation {
        let position = position as f64;
        let (mut cos, mut sin) = (Vec::with_capacity(self.dim / 2), Vec::with_capacity(self.dim / 2));
        for frequency in &self.frequencies {
            let (s, c) = (position * frequency).sin_cos();
            cos.push((c * self.magnitude) as f32);
            sin.push((s * self.magnitude) as f32);
        }
        Rotation { cos, sin }
    }

    /// Rotates the first `dim` elements of one head (f32 `[head_dim]`, `head_dim >= dim`); the rest pass through.
    #[inline(always)]
    pub fn rotate(&self, head: &mut [f32], rotation: &Rotation) {
        let half = self.dim / 2;
        match self.style {
            RopeStyle::Interleaved => {
                let pairs = head[..self.dim].chunks_exact_mut(2);
                for ((pair, &cos), &sin) in pairs.zip(&rotation.cos).zip(&rotation.sin) {
                    let (a, b) = (pair[0], pair[1]);
                    pair[0] = a * cos - b * sin;
                    pair[1] = a * sin + b * cos;
                }
            }
            RopeStyle::Halves => {
                let (low, high) = head[..self.dim].split_at_mut(half);
                let pairs = low.iter_mut().zip(high);
                for (((a, b), &cos), &sin) in pairs.zip(&rotation.cos).zip(&rotation.sin) {
                    (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                }
            }
        }
    }
}

fn invalid(field: &str, problem: String) -> Error {
    Error::Invalid { field: field.to_owned(), problem }
}

fn check_factor(factor: f32) -> Result<(), Error> {
    if factor.is_finite() && factor >= 1.0 {
        return Ok(());
    }
    Err(invalid("rope.scaling.factor", format!("is {factor}, must be finite and at least 1")))
}

fn check_original(original_context: u64) -> Result<(), Error> {
    if original_context > 0 {
        return Ok(());
    }
    Err(invalid("rope.scaling.original_context", "is 0, must be the training context in tokens".to_owned()))
}

fn check_scaling(scaling: &RopeScaling, dim: usize) -> Result<(), Error> {
    match scaling {
        RopeScaling::None => Ok(()),
        RopeScaling::Linear { factor } => check_factor(*factor),
        RopeScaling::Ntk { factor } if dim > 2 => check_factor(*factor),
        RopeScaling::Ntk { .. } => {
            Err(invalid("rope.dim", format!("is {dim}, must be over 2 for NTK scaling")))
        }
        RopeScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_context } => {
            check_factor(*factor)?;
            check_original(*original_context)?;
            if low.is_finite() && high.is_finite() && *low > 0.0 && high > low {
                return Ok(());
            }
            let problem =
                format!("is {high}, must be finite and over `low_freq_factor` ({low}), which must be over 0");
            Err(invalid("rope.scaling.high_freq_factor", problem))
        }
        RopeScaling::Yarn { factor, original_context, attention_factor, beta_fast, beta_slow } => {
            check_factor(*factor)?;
            check_original(*original_context)?;
            if let Some(attention) = attention_factor
                && !(attention.is_finite() && *attention > 0.0)
            {
                let problem = format!("is {attention}, must be finite and over 0");
                return Err(invalid("rope.scaling.attention_factor", problem));
            }
            if beta_fast.is_finite() && beta_slow.is_finite() && *beta_slow > 0.0 && beta_fast >= beta_slow {
                return Ok(());
            }
            let problem = format!(
                "is {beta_fast}, must be finite and at least `beta_slow` ({beta_slow}), which must be over 0"
            );
            Err(invalid("rope.scaling.beta_fast", problem))
        }
        RopeScaling::Factors(factors) => {
            if factors.len() != dim / 2 {
                let problem = format!("has {} elements, must have {}", factors.len(), dim / 2);
                return Err(invalid("rope.scaling.factors", problem));
            }
            match factors.iter().find(|f| !(f.is_finite() && **f > 0.0)) {
                None => Ok(()),
                Some(f) => {
                    Err(invalid("rope.scaling.factors", format!("has {f}, must be finite and over 0")))
                }
            }
        }
    }
}

fn frequencies(theta: f64, dim: usize, scaling: &RopeScaling) -> Vec<f64> {
    let plain = |theta: f64| (0..dim / 2).map(move |i| theta.powf(-((2 * i) as f64) / dim as f64));
    match scaling {
        RopeScaling::None => plain(theta).collect(),
        RopeScaling::Linear { factor } => plain(theta).map(|f| f / f64::from(*factor)).collect(),
        RopeScaling::Ntk { factor } => {
            let power = dim as f64 / (dim as f64 - 2.0);
            plain(theta * f64::from(*factor).powf(power)).collect()
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let (low, high) = (f64::from(*low_freq_factor), f64::from(*high_freq_factor));
            let scale = |f: f64| {
                // Rotations within the training context decide: many keep the frequency, few divide it.
                let rotations = *original_context as f64 * f / TAU;
                let keep = ((rotations - low) / (high - low)).clamp(0.0, 1.0);
                keep * f + (1.0 - keep) * f / f64::from(*factor)
            };
            plain(theta).map(scale).collect()
        }
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, .. } => {
            let pair_with = |rotations: f64| {
                dim as f64 * (*original_context as f64 / (rotations * TAU)).ln() / (2.0 * theta.ln())
            };
            let low = pair_with(f64::from(*beta_fast)).floor().max(0.0);
            let high = pair_with(f64::from(*beta_slow)).ceil().min(dim as f64 - 1.0);
            let width = (high - low).max(0.001);
            let scale = |(i, f): (usize, f64)| {
                let interpolate = ((i as f64 - low) / width).clamp(0.0, 1.0);
                (1.0 - interpolate) * f + interpolate * f / f64::from(*factor)
            };
            plain(theta).enumerate().map(scale).collect()
        }
        RopeScaling::Factors(factors) => plain(theta).zip(factors).map(|(f, d)| f / f64::from(*d)).collect(),
    }
}

fn magnitude(scaling: &RopeScaling) -> f64 {
    match scaling {
        RopeScaling::Yarn { attention_factor: Some(factor), .. } => f64::from(*factor),
        RopeScaling::Yarn { factor, attention_factor: None, .. } => 0.1 * f64::from(*factor).ln() + 1.0,
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests;
