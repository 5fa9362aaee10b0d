//! `model.rope_scaling`: rotary scaling that replaces the model's own.

use longshore_model::{ModelConfig, RopeScaling};

/// What the setting may be.
pub(super) const VALID: &str =
    "empty (the model's own), `none`, `linear:F` or `yarn:F` with a factor F from 1 to 1024";

/// Scaling of positions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum PositionScaling {
    /// As the model says.
    Own,
    /// None, whatever the model says.
    None,
    /// Positions divided by a factor.
    Linear(f32),
    /// YaRN with the usual constants.
    Yarn(f32),
}

impl PositionScaling {
    /// Reads the setting; `None` when it is not valid.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let factor = |text: &str| text.parse().ok().filter(|factor| (1.0..=1024.0).contains(factor));
        match (text, text.split_once(':')) {
            ("", _) => Some(Self::Own),
            ("none", _) => Some(Self::None),
            (_, Some(("linear", text))) => factor(text).map(Self::Linear),
            (_, Some(("yarn", text))) => factor(text).map(Self::Yarn),
            _ => None,
        }
    }

    /// Changes what the model says of its rotation and of how far it reaches.
    pub(crate) fn apply(self, config: &mut ModelConfig) {
        let original = original_context(config);
        let reach = |factor: f32| (original as f64 * f64::from(factor)) as u64;
        (config.rope.scaling, config.context_tokens) = match self {
            Self::Own => return,
            Self::None => (RopeScaling::None, original),
            Self::Linear(factor) => (RopeScaling::Linear { factor }, reach(factor)),
            Self::Yarn(factor) => {
                let scaling = RopeScaling::Yarn {
                    factor,
                    original_context: original,
                    attention_factor: None,
                    beta_fast: 32.0,
                    beta_slow: 1.0,
                };
                (scaling, reach(factor))
            }
        };
    }
}

/// Positions that the model reaches without its own scaling.
fn original_context(config: &ModelConfig) -> u64 {
    match config.rope.scaling {
        RopeScaling::Yarn { original_context, .. } | RopeScaling::Llama3 { original_context, .. } => {
            original_context
        }
        RopeScaling::Linear { factor } => (config.context_tokens as f64 / f64::from(factor)) as u64,
        RopeScaling::None | RopeScaling::Ntk { .. } | RopeScaling::Factors(_) => config.context_tokens,
    }
}

#[cfg(test)]
mod tests {
    use longshore_attention::HeadShape;
    use longshore_model::{RopeConfig, RopeStyle};

    use super::*;

    fn model() -> ModelConfig {
        ModelConfig {
            architecture: "llama".into(),
            name: "m".into(),
            layers: 1,
            hidden: 64,
            heads: HeadShape { kv_heads: 1, group: 1, head_dim: 64 },
            ffn: 64,
            vocabulary: 10,
            norm_eps: 1e-5,
            context_tokens: 8192,
            rope: RopeConfig { style: RopeStyle::Halves, theta: 1e4, dim: 64, scaling: RopeScaling::None },
            tied_embeddings: true,
            qkv_bias: false,
            qk_norm: false,
        }
    }

    #[test]
    fn settings_change_reach_and_fingerprint() {
        let plain = model();
        let scaled = |text: &str, mut config: ModelConfig| {
            PositionScaling::parse(text).unwrap().apply(&mut config);
            config
        };
        assert_eq!(scaled("", plain.clone()), plain);
        assert_eq!(scaled("none", plain.clone()), plain);
        let linear = scaled("linear:4", plain.clone());
        assert_eq!(linear.context_tokens, 32_768);
        assert_ne!(linear.position_fingerprint(), plain.position_fingerprint());
        let yarn = scaled("yarn:4", linear);
        assert_eq!((yarn.context_tokens, &yarn.rope.dim), (32_768, &64));
        assert!(
            yarn.position_fingerprint().contains("original_context: 8192"),
            "of the model, not of `linear`"
        );
        assert_eq!(scaled("none", yarn), plain);
    }

    #[test]
    fn what_is_no_scaling_is_refused() {
        for bad in ["yarn", "yarn:", "yarn:0.5", "yarn:nan", "linear:1e9", "ntk:2", "none:1", "linear:-1"] {
            assert_eq!(PositionScaling::parse(bad), None, "{bad}");
        }
    }
}
